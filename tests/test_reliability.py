"""Kills, full disks, bad numbers and bad places: short forms of tests/soak.py, and what it does not cover."""

import json
import os
import random
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import soak
import torch
from conftest import Workspace, forks

import checkpoint as ckpt
import inference
import plot_loss
import strategy
import train
from metrics import parse_log

# ---- Kills and full disks ----


def test_a_run_killed_at_random_moments_loses_nothing(workspace):
    found = soak.kill_and_continue(workspace, 4, random.Random(1))
    assert found["kills"] == 4 and found["steps"] > 0


@pytest.fixture
def saved(workspace):
    workspace.train()
    return workspace.path / "checkpoint" / "pretrain_last.pt"


def test_a_full_disk_leaves_the_old_checkpoint_whole(saved, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    size = saved.stat().st_size
    messages, kind = soak.save_without_room(folder, ckpt.load(saved), [4096, size // 3, size // 2,
                                                                       size * 9 // 10])
    reason = {"tmpfs": "No space left on device", "limit": "File too large"}[kind]
    assert all("old.pt: could not be saved" in message and reason in message for message in messages)
    assert all("\n" not in message and "earlier checkpoints are whole" in message for message in messages)


def test_a_file_limit_stops_training_with_one_line(workspace):
    """The whole way: a run whose save fails ends with status 2, and leaves what was there."""
    workspace.train()
    before = {path.name: path.read_bytes() for path in workspace.path.glob("checkpoint/*")}
    with soak.largest_file(60_000):
        message = workspace.refused_training("--max_steps", 4)
    assert "could not be saved (File too large)" in message
    assert {path.name: path.read_bytes() for path in workspace.path.glob("checkpoint/*")} == before


def test_a_folder_that_cannot_be_written_is_named_before_a_step_is_spent(workspace):
    folder = workspace.path / "checkpoint"
    folder.rmdir()
    folder.write_text("a file stands in the way")
    message = workspace.refused_training()
    assert f"{folder}: checkpoints cannot be saved there" in message
    assert not list(workspace.path.glob("train_*.log"))


def test_a_read_only_disk_is_named(workspace):
    folder = workspace.path / "checkpoint"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        assert "checkpoints cannot be saved there (Read-only file system)" in workspace.refused_training()
    finally:
        subprocess.run(["umount", folder], check=True)


# ---- Numbers that are not finite ----

def broken_at(step, break_loss):
    """batch_loss, whose result for the batches of one step goes through break_loss."""
    real, calls = train.batch_loss, []

    def loss(model, *args):
        value = real(model, *args)
        if model.training:
            calls.append(1)
            if (len(calls) - 1) // 2 == step:  # two micro-batches a step
                return break_loss(value)
        return value
    return mock.patch.object(train, "batch_loss", loss)


def weights(workspace, name="pretrain_last.pt"):
    return workspace.load(name)["model"]


def test_a_poisoned_weight_stops_before_a_step_and_writes_the_batch_down(workspace):
    workspace.train()
    content = workspace.load("pretrain_last.pt")
    content["model"]["transformer.h.1.mlp.c_fc.weight"][3, 4] = float("nan")
    torch.save(content, workspace.path / "poisoned.pt")
    before = sorted(path.name for path in workspace.path.glob("checkpoint/*.pt"))
    message = workspace.refused_training("--from_checkpoint", "poisoned.pt", "--max_steps", 9)
    assert "step 6: loss nan, gradient norm nan; no step taken, batch written to" in message
    assert "skip_nonfinite" in message
    assert sorted(path.name for path in workspace.path.glob("checkpoint/*.pt")) == before
    batch = np.load(workspace.path / "checkpoint" / "nonfinite_step_6_rank_0.npz")
    assert batch["x_0"].shape == batch["y_1"].shape == (4, 32)
    assert np.array_equal(batch["x_0"][:, 1:], batch["y_0"][:, :-1])


def test_a_learning_rate_that_explodes_keeps_the_last_good_checkpoint(workspace):
    message = workspace.refused_training("--learning_rate", 1e30, "--decay_lr", "false", "--optimizer",
                                "adamw", "--save_interval", 1, "--max_steps", 50)
    assert "no step taken" in message
    ckpt.load(max(workspace.path.glob("checkpoint/*.pt"), key=os.path.getmtime))


@pytest.mark.parametrize("break_loss", [lambda loss: loss * float("nan"), lambda loss: loss + float("inf"),
                                        lambda loss: loss * float("inf")], ids=["nan", "inf loss", "inf"])
def test_skip_nonfinite_passes_over_a_step_without_taking_it(workspace, break_loss):
    """Also where the loss alone is not finite and every gradient is."""
    workspace.train("--max_steps", 2, "--lr_decay_iters", 10)
    before = weights(workspace)
    with broken_at(0, break_loss):
        result = workspace.train("--from_checkpoint", "checkpoint/pretrain_last.pt", "--max_steps", 3,
                                 "--lr_decay_iters", 10, "--skip_nonfinite", 1)
    after = weights(workspace)
    assert result["step"] == 3
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_loss_that_is_not_finite_lowers_the_scale_of_float16(workspace):
    with mock.patch.object(strategy, "pick_dtype", return_value=torch.float16), \
            broken_at(2, lambda loss: loss * float("nan")):
        result = workspace.train("--skip_nonfinite", 1)
    assert result["step"] == 6
    assert workspace.load("pretrain_last.pt")["scaler"]["scale"] == 2.0**15  # half of what it starts from


def test_a_step_that_was_passed_over_does_not_spoil_the_log(workspace):
    with broken_at(2, lambda loss: loss * float("nan")):
        result = workspace.train("--skip_nonfinite", 1, "--log_interval", 3)
    lines, val = parse_log(workspace.path / result["log"])
    assert all(np.isfinite(line["loss"]) for line in lines) and len(lines) == 2
    assert np.isfinite(result["val_loss"])


def test_more_than_skip_nonfinite_steps_stop(workspace):
    with broken_at(1, lambda loss: loss * float("nan")), mock.patch.object(train, "learning_rate",
                                                                          lambda *_: 1e-3):
        assert workspace.train("--skip_nonfinite", 1)["step"] == 6
    assert "no step taken" in workspace.refused_training("--learning_rate", 1e30, "--decay_lr", "false",
                                                "--optimizer", "adamw", "--max_steps", 50,
                                                "--skip_nonfinite", 3)


def test_skipped_steps_are_still_counted_after_a_resume(workspace):
    with broken_at(1, lambda loss: loss * float("nan")):
        workspace.train("--skip_nonfinite", 1, "--lr_decay_iters", 10)
    with broken_at(1, lambda loss: loss * float("nan")):
        line = workspace.refused_training("--skip_nonfinite", 1, "--from_checkpoint", "latest", "--max_steps",
                                          9, "--lr_decay_iters", 10)
        assert "step 7: loss nan" in line


POISON = """
import train, train_ddp
real, poisoned = train.batch_loss, train.os.environ["RANK"] == "1"
train.batch_loss = lambda model, *rest: real(model, *rest) * (
    train.math.nan if poisoned and model.training else 1.0)
train_ddp.run_rank(train_ddp.main)
"""


def test_a_bad_number_on_one_rank_stops_all_of_them_before_the_step(workspace):
    (workspace.path / "poison.py").write_text(POISON)
    end_with_the_first(workspace.start_ranks(2, "poison.py"))
    assert workspace.output().count("error: step 0: loss nan") == 1
    assert sorted(path.name for path in workspace.path.glob("checkpoint/*")) == \
        ["nonfinite_step_0_rank_0.npz", "nonfinite_step_0_rank_1.npz"]


def end_with_the_first(ranks):
    """Wait for the first process, which must end with status 2; end the others then, as a launcher does."""
    assert ranks[0].wait() == 2
    for rank in ranks[1:]:
        rank.send_signal(signal.SIGTERM)
        rank.wait()


POISONED_GRADIENT = """
import json, os, sys
import train, train_deepspeed

class PoisonedGradient(train.torch.autograd.Function):  # what is computed stays finite
    forward = staticmethod(lambda ctx, loss: loss.clone())
    backward = staticmethod(lambda ctx, grad: grad * train.math.nan)

class Watched(train_deepspeed.Zero):
    def wrap(self, *args):
        engine = super().wrap(*args)
        adamw = getattr(engine.optimizer, "optimizer", engine.optimizer)
        adamw.register_step_pre_hook(lambda *_: print("a step was taken", flush=True))
        return engine

def main():
    real, poisoned = train.batch_loss, os.environ["RANK"] == "1"
    train.batch_loss = lambda model, *rest: (PoisonedGradient.apply(real(model, *rest)) if poisoned and
                                             model.training else real(model, *rest))
    zero = {"zero_optimization": json.loads(sys.argv.pop(1))}
    return train.train_and_close(train_deepspeed.command_line(), Watched(zero, "x"))

train_deepspeed.run_rank(main)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 1}, {"stage": 2},
                                  {"stage": 3, "stage3_param_persistence_threshold": 0}], ids="0123")
def test_a_bad_gradient_on_one_rank_stops_deepspeed_before_the_step(workspace, zero, dtype):
    (workspace.path / "poison.py").write_text(POISONED_GRADIENT)
    end_with_the_first(workspace.start_ranks(2, "poison.py", json.dumps(zero), "--dtype", dtype,
                                             server=forks("deepspeed")))
    assert workspace.output().count("gradient norm nan; no step taken") == 1
    assert "a step was taken" not in workspace.output()
    assert sorted(path.name for path in workspace.path.glob("checkpoint/*")) == \
        ["nonfinite_step_0_rank_0.npz", "nonfinite_step_0_rank_1.npz"]


# ---- Bad input that no other test covers ----

def test_names_with_spaces_and_semicolons_and_chinese_work(tmp_path, capsys):
    folder = tmp_path / "my data; echo $HOME 'x' 数据"
    folder.mkdir()
    workspace = Workspace(folder)
    for part in ("train", "val"):
        os.rename(folder / "dataset" / f"pretrain_{part}.npy", folder / "dataset" / f"a b; {part}%s.npy")
    result = workspace.train("--dataset_path", '[["dataset/a b; train%s.npy", "dataset/a b; val%s.npy"]]')
    os.rename(folder / result["log"], folder / "a log; 1.log")
    os.rename(folder / "checkpoint" / "pretrain_last.pt", folder / "checkpoint" / "a b;c.pt")
    with workspace.here("inference.py", "-m", "checkpoint/a b;c.pt", "-p", "The", "-l", 10):
        inference.main()
    with workspace.here("plot_loss.py", "-n", "a log; 1.log"):
        plot_loss.main()
    assert (folder / "a log; 1.png").exists()
    assert workspace.train("--from_checkpoint", "latest", "--max_steps", 7, "--dataset_path",
                           '[["dataset/a b; train%s.npy", "dataset/a b; val%s.npy"]]')["step"] == 7


# VmHWM, not getrusage: the latter also counts what the process that forked, pytest with torch, held.
MEASURE = "import data; data.main(); " \
          "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def prepared_in(workspace, kind, start, end, megabytes):
    """data.py for a file that is a line of so many megabytes between `start` and `end`.

    Returns its CompletedProcess and its peak memory in megabytes."""
    piece = "无线电 abc " * 1024
    path = workspace.path / f"{megabytes}.{kind}"
    with open(path, "w", encoding="utf-8") as f:
        f.write(start)
        for _ in range(megabytes * 2**20 // len(piece.encode())):
            f.write(piece)
        f.write(end)
    result = workspace.run("-c", MEASURE, f"--{kind}", path, "--out", workspace.path / "dataset")
    return result, int(result.stdout.splitlines()[-1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_to_prepare_a_text_does_not_grow_with_its_only_line(workspace):
    _, small = prepared_in(workspace, "pretrain", "", "", 4)
    _, large = prepared_in(workspace, "pretrain", "", "", 36)
    assert large - small < 16
    ids = np.load(workspace.path / "dataset" / "pretrain_train.npy", mmap_mode="r")
    assert len(ids) > 0.9 * 36 * 2**20 / 14 * 8  # 8 characters are 14 bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_row_too_long_is_named_and_never_read_into_memory(workspace):
    good = "\n".join(json.dumps({"question": f"q{i}", "answer": "a"}) for i in range(20))
    row = '{"question": "q", "answer": "', '"}\n' + good
    _, small = prepared_in(workspace, "sft", *row, 34)
    # Which buffers are alive together is up to chance on a busy machine; a row in memory is there every time.
    result, large = min((prepared_in(workspace, "sft", *row, 82) for _ in range(3)), key=lambda run: run[1])
    assert "82.sft, line 1: longer than 16 MB; skipped" in result.stderr
    assert large - small < 16
    numbers = json.loads(result.stdout.splitlines()[-2])["sft"]
    assert numbers["training"]["rows"] + numbers["validation"]["rows"] == 20
    assert "longer than 16 MB" in workspace.run("data.py", "--sft", "34.sft", "--strict", "--out",
                                                workspace.path / "dataset", status=2).stderr


@pytest.mark.parametrize("words, message", [
    (["--batch_size", 5000], "pretrain_train.npy: 199 rows are fewer than batch_size 5000; lower batch_size"),
    (["--dataset_path", "[]"], "dataset_path is not set"),
    (["--dataset_path", '[["dataset/gone.npy", "dataset/pretrain_val.npy"]]'], "gone.npy: no such file"),
    (["--dataset_path", '[["gone/a.npy", "gone/b.npy"]]'], "gone/a.npy: no such file; run python data.py"),
    (["--dataset_path", '[["dataset/sft_train.npy", "dataset/sft_val.npy"]]'], "(-t)"),
    (["-t", "sft"], "pretrain_best.pt: no such file"),
    (["--from_checkpoint", "dataset/tokenizer.json"], "tokenizer.json: not a checkpoint"),
    (["--from_checkpoint", "latest"], 'from_checkpoint "latest": no valid pretrain checkpoint'),
    (["--block_size", 100000], "fewer than block_size + 1 = 100001"),
    (["--n_embd", 20, "--n_head", 4], "even head size"),
], ids=range(10))
def test_a_mistake_is_one_line_and_leaves_nothing_behind(workspace, words, message):
    before = sorted(path.name for path in workspace.path.rglob("*"))
    assert message in workspace.refused_training(*words)
    assert sorted(path.name for path in workspace.path.rglob("*")) == before


@pytest.mark.parametrize("content, message", [
    ("", "line 1: not valid JSON"), ("[]", "must hold a JSON object"), ("{}", 'the key "'),
    ('{"vocab_size": 3, "special_tokens": [], "itos": ["a"]}', "vocab_size is 3, but itos has 1"),
    ('{"vocab_size": 1, "special_tokens": [], "itos": ["a"]}', "has no special token")], ids=range(5))
def test_a_bad_tokenizer_file_is_named(workspace, content, message):
    path = workspace.path / "dataset" / "tokenizer.json"
    path.write_text(content)
    error = workspace.refused_training()
    assert f"{path}" in error and message in error


def test_data_without_a_tokenizer_beside_it_is_named(workspace):
    (workspace.path / "dataset" / "tokenizer.json").unlink()
    assert "dataset/tokenizer.json: no such file" in workspace.refused_training()


def test_a_vocabulary_smaller_than_the_datas_ids_is_named(workspace):
    path = workspace.path / "dataset" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["itos"] = content["itos"][:20]
    path.write_text(json.dumps({**content, "vocab_size": 20}))
    assert "beyond the model's vocabulary of 20" in workspace.refused_training()


def test_a_checkpoint_without_an_optimizer_is_not_taken_for_one_that_continues(workspace):
    """Such as DeepSpeed's, put together: they hold the weights alone."""
    workspace.train()
    content = workspace.load("pretrain_last.pt")
    torch.save({**content, "optimizer": None, "scaler": None}, workspace.path / "weights.pt")
    message = workspace.refused_training("--from_checkpoint", "weights.pt", "--max_steps", 8)
    assert "weights.pt: was written by DeepSpeed" in message
