"""Two real processes under torchrun: they train as one does, and end together, well or badly."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import Workspace, bfloat16_that_is, exact, wait_for

from metrics import parse_log

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

# Several trainings in one launch, which spares the start of Python and torch. Each needs a store of its own.
MANY = """
import glob, itertools, json, sys
import torch.distributed as dist
import strategy, train_ddp
number = itertools.count()

class DataParallel(train_ddp.DataParallel):
    def init_process_group(self, backend, timeout):
        dist.init_process_group(backend, store=dist.FileStore(f"store_{next(number)}"), rank=self.rank,
                                world_size=self.world_size, timeout=timeout)

def main():
    train_ddp.DataParallel = DataParallel
    strategy.has_fast_bfloat16 = lambda device: False  # which Muon would use: its rounding hides differences
    runs = json.loads(sys.argv[1])
    for words in runs:
        sys.argv[1:] = [path for word in words for path in (glob.glob(word) if "*" in word else [word])]
        assert train_ddp.main() == 0

train_ddp.run_rank(main)
"""
DROPOUT = ["--dropout", "0.2", "--lr_decay_iters", "6", "--eval_interval", "6"]


def weights_of(workspace, pattern):
    (path,) = (workspace.path / "checkpoint").glob(pattern)
    return torch.load(path, weights_only=True)


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A workspace in which two processes have trained, in this order: pretraining; with dropout; the same,
    continued after step 3; fine-tuning."""
    workspace = Workspace(tmp_path_factory.mktemp("two"))
    for name in ("config_pretrain.json", "config_sft.json"):
        workspace.configure(name, gradient_accumulation_steps=4)
    (workspace.path / "many.py").write_text(MANY)
    runs = [["--max_steps", "6"], [*DROPOUT, "--save_interval", "3"],
            [*DROPOUT, "--from_checkpoint", "checkpoint/*_step_3.pt"], ["-t", "sft", "--from_checkpoint", ""]]
    workspace.output = workspace.run(*TORCHRUN, "many.py", json.dumps(runs)).stdout
    workspace.logs = sorted(workspace.path.glob("train_*.log"))
    return workspace


def last_of(workspace, number):
    """The final checkpoint of the run that wrote the log of this number."""
    stamp = workspace.logs[number].stem.removeprefix("train_")
    return weights_of(workspace, f"*_{stamp}_last.pt")


@pytest.mark.parametrize(("number", "words"), [(0, ["--max_steps", "6"]),
                                               (3, ["-t", "sft", "--from_checkpoint", ""])])
def test_two_processes_train_as_one_with_twice_the_accumulation(two, tmp_path, number, words):
    one = Workspace(tmp_path)
    with bfloat16_that_is(fast=False):
        result = one.train(*words, "--gradient_accumulation_steps", "4")
    ours, theirs = parse_log(one.path / result["log"]), parse_log(two.logs[number])
    for one_process, two_processes in zip(ours, theirs, strict=True):  # training lines, validation lines
        for a, b in zip(one_process, two_processes, strict=True):
            for key in ("loss", "val_loss", "step", "tokens", "epoch", "lr"):
                assert a.get(key) == pytest.approx(b.get(key), abs=2e-5)
    theirs = last_of(two, number)
    same(one.load(f"{result['task']}_last.pt")["model"], theirs["model"], rtol=0, atol=2e-4)
    assert theirs["dataloader"]["rows"] == 6 * 4 * 4


def test_resuming_with_as_many_processes_is_bit_for_bit(two):
    straight = exact(last_of(two, 1))
    continued = exact(last_of(two, 2))
    assert len(continued["rng"]) == 2 and not torch.equal(*[rng["cpu"] for rng in continued["rng"]])
    for key in ("model", "rng", "dataloader", "step"):
        same(straight[key], continued[key])
    same([o["state"] for o in straight["optimizer"]], [o["state"] for o in continued["optimizer"]])


def test_only_the_first_process_writes_and_speaks(two):
    assert len(two.logs) == 4
    assert two.output.count("backend: nccl needs CUDA, so gloo is used on this cpu") == 4
    assert not list((two.path / "checkpoint").glob("*.tmp"))


def test_a_checkpoint_of_two_processes_continues_in_one(two):
    (path,) = (two.path / "checkpoint").glob("*_step_3.pt")
    result = two.train("--from_checkpoint", path, "--max_steps", "5", "--dropout", "0.2")
    assert result["step"] == 5
    assert two.load("pretrain_last.pt")["dataloader"]["rows"] == 5 * 4 * 4


def test_a_checkpoint_of_one_process_continues_in_two_and_sigterm_saves(workspace):
    workspace.train("--max_steps", "3")
    launch = subprocess.Popen(
        [sys.executable, *TORCHRUN, "train_ddp.py", "--from_checkpoint", "latest", "--max_steps", "100000",
         "--lr_decay_iters", "100000", "--eval_interval", "100000"],
        cwd=workspace.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    logs = lambda: sorted(workspace.path.glob("train_2*.log"))  # noqa: E731
    wait_for(lambda: logs() and len(parse_log(logs()[0])[0]) > 2, launch)
    launch.send_signal(signal.SIGTERM)
    output = launch.communicate(timeout=60)[0]
    assert launch.returncode != 0
    assert "continuing" in output and output.count("finishing this step") == 2
    saved, lines = workspace.load("pretrain_last.pt"), parse_log(logs()[0])[0]
    assert saved["step"] == lines[-1]["step"] > 5
    assert saved["dataloader"]["rows"] == saved["step"] * 2 * 4
    assert saved["dataloader"]["tokens"] == lines[-1]["tokens"]


def test_accumulation_that_does_not_divide_is_one_clear_line(workspace):
    first, second = workspace.start_ranks(2, "train_ddp.py", "--gradient_accumulation_steps", "3")
    assert first.wait() == 2
    second.send_signal(signal.SIGTERM)  # as the launcher does
    second.wait()
    said = [line for line in workspace.output().splitlines() if line.startswith("error:")]
    assert said == ["error: gradient_accumulation_steps 3 is for all processes together and must be a "
                    "multiple of their number, 2"]
    assert "terminate called" not in workspace.output() and not list(workspace.path.glob("train_2*.log"))


def test_without_torchrun_the_command_is_told(workspace):
    assert "torch.distributed.run" in workspace.run("train_ddp.py", status=2).stderr


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_the_run(workspace, signum):
    first, second = workspace.start_ranks(2, "train_ddp.py", "--max_steps", "100000", "--eval_interval",
                                          "100000", "--timeout_minutes", "0.05")
    logs = lambda: list(workspace.path.glob("train_2*.log"))  # noqa: E731
    wait_for(lambda: logs() and len(parse_log(logs()[0])[0]) > 2, first)
    second.send_signal(signum)
    assert first.wait(60) == 1
    assert "error: rank 0: another process has ended or does not answer" in workspace.output()
    second.send_signal(signal.SIGKILL)
    second.wait()
