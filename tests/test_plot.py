"""plot_loss.py: pictures of one or several logs, and of statistics per layer."""

import json
import math

import numpy as np
import pytest

import plot_loss
from metrics import first_line, log_task, train_line, val_line

PNG = b"\x89PNG\r\n\x1a\n"


def line(step, loss):
    return train_line(step / 10, step, loss, 1e-3, 0.1, 10, 10, 100 * step, step, 1.0)


@pytest.fixture
def log(workspace):
    def make(name="train_a.log", n=40, start=4.0, task=None, rest=""):
        lines = [first_line(task)] if task else []
        lines += [val_line(0, start, start, 0, 0.0)]
        lines += [line(i, start - i / 20) for i in range(1, n)]
        lines += [val_line(n, start - n / 20, start - n / 20, 100 * n, n)]
        path = workspace.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n" + rest, encoding="utf-8")
        return name
    return make


def drawn(workspace, *words):
    """Run plot_loss.py WORDS… there; the folder."""
    with workspace.here("plot_loss.py", *words):
        plot_loss.main()
    return workspace.path


def result(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def labels(workspace, names):
    """What the legend of a picture of these logs shows."""
    figure, axes = plot_loss.plt.subplots()
    with workspace.here():
        plot_loss.draw(axes, plot_loss.read_logs(names), "step")
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    plot_loss.plt.close(figure)
    return shown


def test_without_a_display_a_png_appears_beside_the_log(workspace, log):
    path = drawn(workspace, "-n", log("logs/train_a.log")) / "logs" / "train_a.png"
    assert path.read_bytes().startswith(PNG)


def test_several_logs_go_into_one_picture(workspace, log, capsys):
    path = drawn(workspace, "-n", log(), log("train_b.log", start=3.0), "-o", "both.png") / "both.png"
    assert path.read_bytes().startswith(PNG)
    assert result(capsys) == {"output": "both.png", "best_val_loss": {"train_a.log": 2.0, "train_b.log": 1.0}}
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


def test_the_running_mean_does_not_lag_behind_a_steep_start():
    steps = np.arange(200)
    noise = np.random.default_rng(0).normal(0, 0.02, 200)
    curve = 1 + 5 * np.exp(-steps / 15)
    smooth = plot_loss.running_mean(curve + noise)
    above = smooth[:60] > curve[:60] + noise[:60]
    assert 15 < above.sum() < 45  # as often above the raw points as below them
    assert abs(smooth - curve).max() < 0.1
    assert np.std(smooth[100:] - curve[100:]) < 0.01  # and it is smooth


def test_a_nan_is_left_out_of_the_mean_and_of_the_best(workspace, log, capsys):
    values = [3.0, 2.0, math.nan, 2.0, 1.0] * 10
    smooth = plot_loss.running_mean(values)
    assert np.isfinite(smooth).all() and np.nanmin(values) <= smooth.min() and smooth.max() <= 3.0
    log(rest=val_line(41, math.nan, 2.0, 4100, 41) + "\n" + line(41, math.nan) + "\n")
    assert (drawn(workspace, "-n", "train_a.log") / "train_a.png").read_bytes().startswith(PNG)
    assert result(capsys)["best_val_loss"] == {"train_a.log": 2.0}


def test_the_legend_names_the_task_and_for_older_logs_the_file(workspace, log):
    names = [log("train_1.log", task="pretrain"), log("train_2.log", task="sft"), log("train_3.log")]
    assert log_task(workspace.path / "train_1.log") == "pretrain"
    assert log_task(workspace.path / "train_3.log") is None
    shown = labels(workspace, names)
    assert shown[::2] == ["pretrain training", "sft training", "train_3.log training"]


def test_logs_of_one_name_or_task_are_told_apart(workspace, log, capsys):
    names = [log("a/train.log", start=4.0), log("b/train.log", start=3.0)]
    drawn(workspace, "-n", *names, "-o", "two.png")
    assert sorted(result(capsys)["best_val_loss"].values()) == [1.0, 2.0]
    same_task = [log("train_1.log", task="sft"), log("train_2.log", task="sft")]
    assert len(set(labels(workspace, same_task))) == 4


def test_a_label_that_begins_with_an_underscore_is_shown(workspace, log):
    assert any("_second.log" in label for label in labels(workspace, [log(), log("_second.log")]))


def test_a_chinese_label_has_a_font_or_a_note(workspace, log, monkeypatch, capfd):
    family = list(plot_loss.matplotlib.rcParams["font.family"])
    installed = {font.name for font in plot_loss.font_manager.fontManager.ttflist}
    monkeypatch.setitem(plot_loss.matplotlib.rcParams, "font.family", family)
    drawn(workspace, "-n", log(), log("预训练.log"), "-o", "two.png")
    used = plot_loss.matplotlib.rcParams["font.family"][-1]
    if set(plot_loss.CJK_FONTS) & installed:
        assert used in plot_loss.CJK_FONTS and used in installed
    else:
        assert "no font with Chinese characters" in capfd.readouterr().err


def test_lines_of_another_kind_or_without_the_axis_are_skipped(workspace, log):
    name = log(rest="something else\nStep: 50 | Loss: 1.0\nStep: 60 | Lo")
    with workspace.here():
        ((_, train, _),) = plot_loss.read_logs([name])
    assert [each["step"] for each in train][-2:] == [39, 50]
    assert (drawn(workspace, "-n", name, "-x", "tokens") / "train_a.png").read_bytes().startswith(PNG)


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(workspace, log, monkeypatch):
    log()
    old = (drawn(workspace, "-n", "train_a.log", "-o", "a.png") / "a.png").read_bytes()

    def full_disk(file, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot_loss.plt.Figure, "savefig", lambda self, file, **kwargs: full_disk(file))
    assert "a.png: cannot be written (No space left" in workspace.refused(
        plot_loss.main, "-n", "train_a.log", "-o", "a.png")
    assert (workspace.path / "a.png").read_bytes() == old and not list(workspace.path.glob("*.tmp"))


@pytest.mark.parametrize("words, message", [
    (["-n", "gone.log"], "gone.log: no such file"),
    (["-n", "empty.log"], "empty.log: holds no training lines"),
    (["-n", "dataset"], "dataset: no such file"),
    (["-n", "train_a.log", "-o", "gone/a.png"], "gone/a.png: cannot be written"),
    (["-n", "train_a.log", "-o", "a.xyz"], "a.xyz: cannot be written"),
    (["-n", "train_a.log", "-x", "epochs"], "invalid choice: 'epochs'"),
    (["--stats", "train_a.log"], "train_a.log, line 1: not a record of --log_stats"),
    (["--stats", "empty.log"], "empty.log: holds no records")])
def test_a_mistake_is_one_line(workspace, log, words, message):
    log()
    (workspace.path / "empty.log").write_text("")
    assert message in workspace.refused(plot_loss.main, *words)


def test_a_real_trainings_log_and_statistics_are_drawn(workspace, capsys):
    result_of_training = workspace.train("--log_stats", 2)
    name = result_of_training["log"]
    assert (drawn(workspace, "-n", name) / name.replace(".log", ".png")).read_bytes().startswith(PNG)
    assert result(capsys)["best_val_loss"] == {
        "pretrain": pytest.approx(result_of_training["best_val_loss"], abs=1e-5)}
    stats = name.replace(".log", "_stats.jsonl")
    records = [json.loads(each) for each in (workspace.path / stats).read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 2, 4] and len(records[0]["layers"]) == 2
    layer = records[1]["layers"][0]
    assert all(value > 0 for name in ("weights", "gradients", "updates") for value in layer[name].values())
    assert 0 < layer["entropy"] < math.log(32) and 0 <= layer["dead"] < 1 and layer["rms"] > 0
    assert (drawn(workspace, "--stats", stats) / stats.replace(".jsonl", ".png")).read_bytes().startswith(PNG)
