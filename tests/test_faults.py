"""What output, terminal, disk or a NaN may do to a script: the kinds of fault of docs/reliability.md."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Workspace, forks, wait_for

import metrics
import run
import script
import train
from checkpoint import load
from metrics import parse_log
from run import Run
from script import InputError, atomic_write

ENDLESS = ["--max_steps", "0", "--lr_decay_iters", "10", "--eval_interval", "100000"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A workspace with a trained and a fine-tuned model, for the tests that only read them."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    workspace.train()
    workspace.train("-t", "sft")
    (workspace.path / "qa.jsonl").write_text('{"question": "字母B在谁后面？", "answer": "A é\\ud83d。"}\n',
                                             encoding="utf-8")
    return workspace


def started(workspace, **streams):
    """An endless training in a process of its own, after its first step. streams: those of Popen."""
    process = subprocess.Popen([sys.executable, "train.py", *ENDLESS], cwd=workspace.path, **streams)
    wait_for(lambda: any("Loss: " in log.read_text() for log in workspace.path.glob("train_*.log")), process)
    return process


def assert_saved_at_its_last_step(workspace):
    (log,) = workspace.path.glob("train_*.log")
    assert workspace.load("pretrain_last.pt")["step"] == parse_log(log)[0][-1]["step"] > 0


# ---- A. Output that fails does not end training unsaved ----

@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids="+".join)
def test_a_pipe_whose_reader_has_gone_does_not_keep_ctrl_c_from_saving(workspace, closed):
    """`train.py 2>&1 | tee log`, or a pager: the reader goes first, then the signal comes."""
    pipes = {name: subprocess.PIPE if name in closed else subprocess.DEVNULL for name in ("stdout", "stderr")}
    process = started(workspace, **pipes)
    for name in closed:
        getattr(process, name).close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert_saved_at_its_last_step(workspace)


def test_a_reader_that_leaves_in_the_middle_does_not_stop_the_loop(workspace):
    process = subprocess.Popen([sys.executable, "train.py", "--max_steps", "60", "--eval_interval", "2"],
                               cwd=workspace.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait(60) == 0
    assert workspace.load("pretrain_last.pt")["step"] == 60


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_full_disk_under_the_output_does_not_stop_the_loop(workspace, name):
    forks().start(workspace.path, ["train.py", "--eval_interval", 2], **{name: "/dev/full"}).wait()
    assert workspace.load("pretrain_last.pt")["step"] == 6


class FullDisk:
    """A file on a disk that has become full."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def close(self):
        raise OSError(28, "No space left on device")


def test_a_full_disk_under_the_log_does_not_stop_the_loop(workspace, monkeypatch, capsys):
    write = metrics.Log.write

    def fill(self, line):
        if "Step: 3 " in line and self.file:
            self.file.close()
            self.file = FullDisk()
        write(self, line)

    monkeypatch.setattr(metrics.Log, "write", fill)
    result = workspace.train()
    assert result["step"] == 6 and workspace.load("pretrain_last.pt")["step"] == 6
    said = [line for line in capsys.readouterr().err.splitlines() if "training goes on without a log" in line]
    assert len(said) == 1 and "No space left" in said[0]
    assert [line["step"] for line in parse_log(workspace.path / result["log"])[0]] == [1, 2]


@pytest.mark.parametrize("name, status", [("SIGHUP", 129), ("SIGUSR1", 138)])
def test_a_closed_terminal_and_a_scheduler_save_as_ctrl_c_does(workspace, name, status):
    process = started(workspace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == status
    assert_saved_at_its_last_step(workspace)


def test_under_nohup_a_closed_terminal_does_not_stop_training(workspace):
    process = started(workspace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                      preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


# ---- B. Characters that the output cannot hold ----

@pytest.mark.parametrize("encoding, words", [
    ("ascii", ["train.py", "--help"]),
    ("ascii", ["train.py", "--max_steps", "3"]),
    ("cp1252", ["inference.py", "-m", "checkpoint/pretrain_best.pt", "-p", "字母B", "-l", "20", "-t", "0"]),
    ("cp1252", ["evaluate.py", "-m", "checkpoint/sft_best.pt", "--qa", "qa.jsonl"]),
    ("cp936", ["evaluate.py", "-m", "checkpoint/sft_best.pt", "--qa", "qa.jsonl"]),
    ("ascii", ["data.py", "--sft", "qa.jsonl", "--tokenizer", "dataset/tokenizer.json", "--out", "数据"]),
    ("ascii", ["checkpoint.py", "checkpoint/pretrain_best.pt", "词表.json"]),
], ids=lambda value: value if isinstance(value, str) else value[0])
def test_an_encoding_that_lacks_characters_gets_escapes(shared, encoding, words):
    result = subprocess.run([sys.executable, *words], cwd=shared.path, capture_output=True,
                            stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert b"Traceback" not in result.stderr
    assert result.returncode == 0 or b"error: " in result.stderr and result.returncode == 2
    (result.stdout + result.stderr).decode(encoding)


def test_a_file_name_that_is_not_utf8_can_be_printed(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_bytes(b"\xff\xfe\x00 no text")
    result = subprocess.run([sys.executable, "data.py", "--pretrain", path, "--out", tmp_path / "out"],
                            cwd=script.__file__.rsplit("/", 1)[0], capture_output=True)
    assert result.returncode == 2 and b"Traceback" not in result.stderr
    assert result.stderr.count(b"error: ") == 1


# ---- D. What the platform may lack ----

@pytest.mark.parametrize("words", [
    ["train.py", "--max_steps", "3"],
    ["inference.py", "-i", "-m", "checkpoint/sft_best.pt", "-p", "after B", "-l", "20"],
    ["inference.py", "-i", "-m", "checkpoint/sft_best.pt"],
    ["evaluate.py", "-m", "checkpoint/sft_best.pt", "--qa", "qa.jsonl"],
], ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_standard_stream_is_no_reason_to_fail(shared, words, closed):
    result = subprocess.run([sys.executable, *words], cwd=shared.path, capture_output=True,
                            preexec_fn=lambda: os.close(closed))
    assert result.returncode == 0 and b"Traceback" not in result.stderr


def test_a_removed_working_directory_is_one_line_or_works(shared, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && {sys.executable} {shared.path}/data.py " \
              f"--pretrain {shared.path}/model_config.json --out {tmp_path}/out"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr and result.returncode in (0, 2)


def test_a_checkpoint_is_found_from_another_working_directory(shared, tmp_path):
    """As the configs' paths, -m is also looked for in the repo root."""
    words = [shared.path / "inference.py", "-m", "checkpoint/pretrain_best.pt", "-p", "The", "-l", "10"]
    result = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


# ---- E. NaN ----

def test_a_nan_validation_keeps_the_best_checkpoint(workspace, monkeypatch):
    losses = iter([4.0, 3.0, float("nan"), 3.5, 3.4])  # at steps 0, 2, 4, 6 and 8
    monkeypatch.setattr(train, "validation_loss", lambda *_: next(losses))
    result = workspace.train("--max_steps", 8, "--eval_interval", 2)
    assert result["best_val_loss"] == 3.0
    assert workspace.load("pretrain_best.pt")["step"] == 2
    assert workspace.load("pretrain_last.pt")["best_val_loss"] == 3.0


def test_results_are_valid_json_whatever_is_in_them(capsys):
    script.print_json({"a": float("nan"), "b": [float("inf"), {"c": -float("inf"), 1: 2.5}]})
    assert capsys.readouterr().out == '{"a": null, "b": [null, {"c": null, "1": 2.5}]}\n'


# ---- G. "latest" goes by the date in the name, then by the step ----

def test_latest_survives_a_copy_that_loses_the_times_of_files(workspace):
    """The run was killed after step 15; its best validation was at step 10."""
    workspace.train("--max_steps", 20, "--save_interval", 5, "--eval_interval", 10)
    checkpoints = workspace.path / "checkpoint"
    for path in checkpoints.glob("*_last.pt"):
        path.unlink()
    (step_10,) = checkpoints.glob("*_step_10.pt")
    for path in checkpoints.glob("*_best.pt"):
        path.unlink()
        shutil.copy(step_10, path)
    for age, path in enumerate(sorted(checkpoints.iterdir())):
        os.utime(path, (1e9 + age, 1e9 + age))  # copied in the order of their names
    path, content = Run(str(workspace.path), "pretrain", quiet=True).latest()
    assert content["step"] == 15 and load(path)["step"] == 15


def test_latest_takes_the_newest_run_though_an_older_one_has_more_steps(workspace):
    for steps in (8, 3):
        workspace.train("--max_steps", steps)
    checkpoints = workspace.path / "checkpoint"
    dated = sorted(path for path in checkpoints.iterdir() if run.DATED_NAME.fullmatch(path.name))
    assert len({run.DATED_NAME.fullmatch(path.name)["stamp"] for path in dated}) == 2
    for path in checkpoints.iterdir():
        os.utime(path, (1e9, 1e9))
    assert Run(str(workspace.path), "pretrain", quiet=True).latest()[1]["step"] == 3


def test_the_names_that_a_run_builds_are_those_that_it_reads():
    own = Run("folder", "pretrain")
    own.stamp = "20260101_120000"
    for kind, step in (("best", None), ("last", None), ("step_300", "300")):
        name = run.DATED_NAME.fullmatch(os.path.basename(own.path(kind)))
        parts = {"task": "pretrain", "stamp": own.stamp, "kind": kind, "step": step}
        assert name.groupdict() == parts
    for fixed in ("pretrain_best.pt", "sft_last.pt"):
        assert not run.DATED_NAME.fullmatch(fixed)


def test_a_run_without_a_folder_writes_nothing(workspace, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    args = workspace.arguments()
    process = train.SingleProcess()
    setup = train.setup_training(args, process)
    monkeypatch.chdir(empty)
    before = set(workspace.path.rglob("*"))
    result = train.fit(setup.model, setup.tokenizer, setup.loader, setup.val_loader, args.train, process,
                       Run(None, quiet=True))
    assert result["step"] == 6 and result["log"] is None
    assert not list(empty.iterdir())
    assert set(workspace.path.rglob("*")) == before


# ---- H. Whole or not at all ----

@pytest.mark.parametrize("fails", ["in the middle", "no room", "no folder"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, fails):
    path = tmp_path / "a.txt"
    path.write_text("old")
    if fails == "in the middle":
        with pytest.raises(ZeroDivisionError), atomic_write(str(path), "w") as file:
            file.write("new")
            raise ZeroDivisionError
    elif fails == "no room":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            with pytest.raises(InputError, match="a.txt: cannot be written"), \
                    atomic_write(str(path), "w") as file:
                file.write("new" * 1000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
    else:
        with pytest.raises(InputError, match="gone/a.txt: cannot be written"), \
                atomic_write(str(tmp_path / "gone" / "a.txt"), "w"):
            pass
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_tokenizer_that_cannot_be_written_is_one_line(shared):
    said = shared.run("checkpoint.py", "checkpoint/pretrain_best.pt", "nofolder/t.json", status=2).stderr
    assert said.startswith("error: nofolder/t.json: cannot be written") and said.count("\n") == 1


# ---- I. Lines that say what to do ----

def test_a_checkpoint_that_has_reached_max_steps_is_said_to_have(shared, tmp_path, capsys):
    workspace = Workspace(tmp_path)
    workspace.train()
    capsys.readouterr()
    workspace.train("--from_checkpoint", "latest")
    assert "no step was taken: the checkpoint has reached max_steps 6" in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    ["train.py", "--batch_size", "0"], ["train.py", "--min_lr", "1"], ["train.py", "--n_head", "3"],
    ["train.py", "--train_config", "gone.json"], ["train.py", "--model_config", "gone.json"],
    ["train.py", "--optimizer", "sgd"], ["train.py", "--dataset_path", "[[a.npy,b.npy]]"],
    ["train.py", "--warmup_iters", "9", "--max_steps", "9"], ["train.py", "-t", "chat"],
    ["train.py", "--lr_decay_iters", "0", "--max_steps", "0"], ["train.py", "--decay_lr", "maybe"],
    ["problem.py", "sort", "--n_head", "3"], ["problem.py", "gone"],
    ["inference.py", "-m", "gone.pt"], ["inference.py", "-t", "-1", "-m", "checkpoint/sft_best.pt"],
    ["inference.py", "-l", "1", "-m", "checkpoint/sft_best.pt"],
    ["export.py", "-m", "gone.pt", "--to", "html", "x"],
    ["evaluate.py"], ["evaluate.py", "-m", "gone.pt", "--text", "gone.txt"],
    ["export.py", "-m", "gone.pt", "--to", "pdf", "x"], ["plan.py", "--minutes", "-1"], ["plan.py"],
    ["-m", "studies.scaling", "--shapes", "2x"], ["-m", "studies.dynamics", "gone"],
    ["-m", "studies.bench", "gone"],
], ids=" ".join)
def test_a_mistake_is_answered_in_one_line_before_torch_is_imported(shared, words):
    blocked = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    blocked += "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)" \
        if words[0] == "-m" else "runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", blocked, *words], cwd=shared.path, capture_output=True,
                            text=True)
    assert result.returncode == 2 and result.stderr.count("error: ") == 1, result.stderr
    assert result.stderr.strip().count("\n") == 0 and "Traceback" not in result.stderr
