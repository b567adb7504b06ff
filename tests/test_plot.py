"""plot_loss.py: pictures of one or several logs."""

import json

import pytest

import plot_loss
from metrics import train_line, val_line


@pytest.fixture
def log(workspace):
    def make(name="train_a.log", n=40, start=4.0, rest=""):
        lines = [val_line(0, start, start, 0, 0.0)]
        lines += [train_line(i / 10, i, start - i / 20, 1e-3, 0.1, 10, 10, 100 * i, i) for i in range(1, n)]
        lines += [val_line(n, start - n / 20, start - n / 20, 100 * n, n)]
        (workspace.path / name).write_text("\n".join(lines) + "\n" + rest)
        return name
    return make


def drawn(workspace, *words):
    with workspace.here("plot_loss.py", *words):
        plot_loss.main()
    return workspace.path


PNG = b"\x89PNG\r\n\x1a\n"


def test_without_a_display_a_png_appears_beside_the_log(workspace, log):
    path = drawn(workspace, "-n", log()) / "train_a.png"
    assert path.read_bytes().startswith(PNG)


def test_several_logs_go_into_one_picture(workspace, log, capsys):
    path = drawn(workspace, "-n", log(), log("train_b.log", start=3.0), "-o", "both.png") / "both.png"
    assert path.read_bytes().startswith(PNG)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == {"output": "both.png", "best_val_loss": {"train_a.log": 2.0, "train_b.log": 1.0}}
    alone = drawn(workspace, "-n", "train_a.log", "-o", "alone.png") / "alone.png"
    assert alone.read_bytes() != path.read_bytes()


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
def test_every_axis_has_its_values_and_name(log, workspace, axis):
    figure, axes = plot_loss.plt.subplots()
    with workspace.here():
        plot_loss.draw(axes, plot_loss.read_logs([log()]), axis)
    raw, smooth, val = axes.get_lines()
    assert raw.get_xdata()[-1] == {"step": 39, "tokens": 3900, "time": 39}[axis]
    assert list(val.get_ydata()) == [4.0, 2.0] and len(smooth.get_ydata()) == 39
    assert axes.get_xlabel() == plot_loss.AXES[axis]
    plot_loss.plt.close(figure)


def test_the_running_mean_starts_at_the_first_value_and_lags_behind():
    assert plot_loss.running_mean([5.0, 5.0], 0.9) == pytest.approx([5.0, 5.0])
    assert plot_loss.running_mean([4.0, 2.0], 0.5) == pytest.approx([4.0, (0.25 * 4 + 0.5 * 2) / 0.75])


def test_lines_of_another_kind_or_without_the_axis_are_passed_over(workspace, log):
    name = log(rest="something else\nStep: 50 | Loss: 1.0\nStep: 60 | Lo")
    assert (drawn(workspace, "-n", name, "-x", "tokens") / "train_a.png").exists()


def test_a_log_with_a_nan_is_drawn(workspace, log):
    name = log(rest=train_line(5, 41, float("nan"), 1e-3, 1, 1, 1, 4100, 41) + "\n")
    assert (drawn(workspace, "-n", name) / "train_a.png").exists()


@pytest.mark.parametrize("words, message", [
    (["-n", "gone.log"], "gone.log: cannot be read"),
    (["-n", "empty.log"], "empty.log: holds no training lines"),
    (["-n", "dataset"], "dataset: cannot be read"),
    (["-n", "train_a.log", "-o", "gone/a.png"], "gone/a.png: cannot be written"),
    (["-n", "train_a.log", "-o", "a.xyz"], "a.xyz: cannot be written"),
    (["-n", "train_a.log", "-x", "epochs"], "invalid choice: 'epochs'")])
def test_a_mistake_is_one_line(workspace, log, words, message):
    log()
    (workspace.path / "empty.log").write_text("")
    assert message in workspace.refused(plot_loss.main, *words)


def test_a_real_trainings_log_is_drawn(workspace):
    result = workspace.train()
    assert (drawn(workspace, "-n", result["log"]) / result["log"].replace(".log", ".png")).exists()
