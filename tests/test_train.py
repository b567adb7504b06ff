"""The training loop: every setting has its effect, the save policy, exact resume, signals."""

import itertools
import json
import math
import os
import platform
import signal
import time
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import Workspace, bfloat16_that_is, exact, forks
from torch._inductor.exc import InductorError

import device
import metrics
import strategy
import train
from checkpoint import build_model
from config import IGNORE_INDEX, TrainConfig
from dataloader import DataLoader
from metrics import parse_log
from optimizer import build_optimizer, learning_rate
from run import Run
from verify_resume import differences, verify_resume


def lines(workspace, result):
    """Training lines and validation lines of a run's log."""
    return parse_log(workspace.path / result["log"])


def weights(workspace, *words):
    """The weights after a short run, as one vector."""
    result = workspace.train(*words)
    state = workspace.load(f"{result['task']}_last.pt")["model"]
    return torch.cat([state[name].flatten() for name in sorted(state)])


def told_at(step, signum=signal.SIGINT):
    """A learning_rate function that sends this process a signal when the loop reaches `step`."""
    def at(now, config, seconds):
        if now == step:
            os.kill(os.getpid(), signum)
        return learning_rate(now, config, seconds)
    return mock.patch.object(train, "learning_rate", at)


class GivenBatches:
    """Stands for a loader where a test must choose the very rows: a list of (x, y) arrays (B, T)."""

    epoch = 0.0

    def __init__(self, batches):
        self.batches = itertools.cycle(batches)

    def next_batch(self):
        return next(self.batches)

    def fixed_batches(self, n):
        return [self.next_batch()]

    def state_dict(self):
        return {"rows": 0}


def trained_on(workspace, model, batches, **settings):
    """Train `model` on given batches with the real loop; returns it."""
    config = TrainConfig(**{**dict(device="cpu", dtype="float32", decay_lr=False, learning_rate=1e-3,
                                   max_steps=1), **settings})
    process = train.SingleProcess()
    process.setup(config)
    tokenizer = train.Tokenizer.load(workspace.path / "dataset" / "tokenizer.json")
    train.fit(model, tokenizer, GivenBatches(batches), GivenBatches(batches), config, process,
              Run(None, quiet=True))
    return model


# ---- Every row of the table of training settings ----

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One workspace for the tests that only read it or write runs of their own."""
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def baseline(shared):
    return weights(shared)


@pytest.mark.parametrize("words", [
    ["--dropout", 0.3], ["--learning_rate", 1e-2], ["--weight_decay", 5], ["--beta1", 0.5], ["--beta2", 0.5],
    ["--decay_lr", "false"], ["--warmup_iters", 4], ["--lr_decay_iters", 50],
    ["--min_lr", 2e-3], ["--batch_size", 3], ["--random_seed", 7], ["--grad_clip", 1e-3],
    ["--gradient_accumulation_steps", 3], ["--optimizer", "adamw"], ["--lr_schedule", "cosine"],
    ["--document_mask"], ["--max_steps", 5]], ids=lambda words: words[0])
def test_a_training_setting_has_an_effect(shared, baseline, words):
    assert not torch.equal(weights(shared, *words), baseline)


def test_the_same_settings_give_the_same_weights(shared, baseline):
    assert torch.equal(weights(shared), baseline)


@pytest.mark.parametrize("words", [
    ["--eval_interval", 2], ["--log_interval", 3], ["--eval_iters", 4], ["--save_interval", 2],
    ["--backend", "gloo"], ["--device", "auto"], ["--max_minutes", 60], ["--skip_nonfinite", 5]],
    ids=lambda words: words[0])
def test_what_only_watches_training_does_not_change_it(shared, baseline, words):
    assert torch.equal(weights(shared, *words), baseline)


# Faults of pages when 40 MB are filled, before and after the device is set up. Huge pages would hide them.
FAULTS = """
import ctypes, resource, torch, device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
print(min(faults() for _ in range(5)))
device.setup_device(device.pick_device("cpu"))
print(min(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_memory_that_tensors_free_is_reused_once_the_device_is_set_up(shared):
    """40 MB are 10,000 pages: each costs a fault and is cleared, where the system had it back."""
    before, after = map(int, shared.run("-c", FAULTS).stdout.split())
    assert before > 9_000 and after < 1_000


def test_the_log_shows_the_schedule_and_the_first_rate_is_above_zero(shared):
    result = shared.train("--learning_rate", 1e-2, "--min_lr", 1e-3, "--warmup_iters", 2, "--max_steps", 8,
                          "--lr_decay_iters", 6, "--lr_schedule", "linear")
    rates = [line["lr"] for line in lines(shared, result)[0]]
    assert rates == pytest.approx([3.333e-3, 6.667e-3, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3, 1e-3, 1e-3], rel=1e-3)


def test_validation_every_eval_interval_and_at_the_end(shared):
    result = shared.train("--eval_interval", 4, "--max_steps", 10)
    assert [line["step"] for line in lines(shared, result)[1]] == [0, 4, 8, 10]


def test_a_log_line_every_log_interval_holds_the_mean_since_the_last(shared):
    each = lines(shared, shared.train("--log_interval", 1))[0]
    third = lines(shared, shared.train("--log_interval", 3))[0]
    assert [line["step"] for line in each] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in third] == [3, 6]
    for line, part in zip(third, (each[:3], each[3:]), strict=True):
        assert line["loss"] == pytest.approx(np.mean([p["loss"] for p in part]), abs=1e-5)
        assert line["tokens"] == part[-1]["tokens"]


class Clock:
    """A clock on which a step of training takes one second and a validation a hundred."""

    strftime = staticmethod(time.strftime)

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def learning_rate(self, step, config, seconds):
        self.now += 1
        return learning_rate(step, config, seconds)

    def validation_loss(self, *_):
        self.now += 100
        return 1.0


def test_the_logged_rate_counts_training_alone(shared, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(train, "learning_rate", clock.learning_rate)
    monkeypatch.setattr(train, "validation_loss", clock.validation_loss)
    logged = lines(shared, shared.train("--log_interval", 4, "--eval_interval", 3, "--max_steps", 8))[0]
    assert [line["step"] for line in logged] == [4, 8]
    assert [line["ms/step"] for line in logged] == [1000, 1000]


def test_eval_iters_is_the_number_of_validation_batches(shared):
    with mock.patch.object(DataLoader, "fixed_batches", autospec=True,
                           side_effect=DataLoader.fixed_batches) as f:
        shared.train("--eval_iters", 3, "--eval_interval", 100)
    assert {call.args[1] for call in f.call_args_list} == {3}


def test_validation_loss_is_the_mean_over_tokens_not_over_batches(shared):
    """SFT batches hold unlike numbers of counted tokens; the batch size must not matter."""
    losses = [lines(shared, shared.train("-t", "sft", "--from_checkpoint", "", "--batch_size", n,
                                         "--eval_iters", 12 // n))[1][0]["val_loss"] for n in (1, 3, 12)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_dataset_path_is_a_curriculum_in_order(workspace):
    data = workspace.path / "dataset"
    ids = np.load(data / "pretrain_train.npy")
    np.save(data / "a.npy", ids[:1000])
    np.save(data / "b.npy", ids[1000:3000])
    with mock.patch.object(train, "DataLoader", wraps=DataLoader) as made:
        workspace.train("--dataset_path", '[["dataset/a.npy", "dataset/pretrain_val.npy"], '
                                          '["dataset/b.npy", "dataset/pretrain_val.npy"]]')
    paths = made.call_args_list[0].args[0]
    assert [os.path.basename(path) for path in paths] == ["a.npy", "b.npy"]


def test_device_cuda_without_cuda_is_one_line(shared):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    line = shared.refused_training("--device", "cuda")
    assert 'device "cuda": this machine or this torch has no CUDA' in line


def test_an_unknown_device_is_one_line(shared):
    assert 'device "gpu" is unknown; use auto' in shared.refused_training("--device", "gpu")
    assert 'device "meta" is not supported; use auto' in shared.refused_training("--device", "meta")


@pytest.mark.parametrize("kernel", ["math", "mem_efficient", "flash"])
def test_sdp_kernel_is_set(shared, kernel):
    try:
        shared.train("--sdp_kernel", kernel, "--max_steps", 3)
        assert torch.backends.cuda.flash_sdp_enabled() == (kernel == "flash")
    finally:
        device.set_sdp_kernel("flash")


@pytest.mark.parametrize("dtype, expected", [("bfloat16", "no fast bfloat16 on this cpu, so float32"),
                                             ("float16", "float16 training needs CUDA, so float32")])
def test_a_dtype_that_the_device_lacks_falls_back_with_one_line(shared, capsys, dtype, expected):
    with bfloat16_that_is(fast=False):
        shared.train("--dtype", dtype)
    assert [line for line in capsys.readouterr().out.splitlines() if "dtype" in line] == \
        [f"dtype: {expected} is used" + (" on this cpu" if dtype == "float16" else "")]


def process_for(**values):
    process = train.SingleProcess()
    process.setup(TrainConfig(device="cpu", **values))
    return process


def test_mixed_precision_on_the_cpu_where_bfloat16_pays(shared):
    with bfloat16_that_is(fast=True):
        process = process_for(dtype="bfloat16")
        assert process.dtype is torch.bfloat16
        with process.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
        result = shared.train("--dtype", "bfloat16")
    assert math.isfinite(result["val_loss"])
    assert shared.load("pretrain_last.pt")["model"]["lm_head.weight"].dtype is torch.float32


def test_the_gradscaler_is_on_for_float16_only():
    for fast, dtype in ((True, "bfloat16"), (False, "bfloat16"), (False, "float32"), (False, "float16")):
        with bfloat16_that_is(fast):
            assert not process_for(dtype=dtype).scaler.is_enabled()
    with mock.patch.object(strategy, "pick_dtype", return_value=torch.float16):
        assert process_for(dtype="float16").scaler.is_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_clipping_acts_with_and_without_mixed_precision(tiny_model, dtype, clip):
    """The norm that reaches the optimizer, whatever the type; the scale of float16 is undone before."""
    with mock.patch.object(strategy, "pick_dtype", return_value=dtype):
        process = process_for(grad_clip=clip)
    model = tiny_model()
    model = process.wrap(model, build_optimizer(model, process.config))
    idx = torch.arange(20).view(2, 10)
    with process.autocast():
        loss = model(idx[:, :-1], idx[:, 1:])[1]
    process.backward(loss)
    seen = []
    process.optimizer.optimizers[0].register_step_pre_hook(lambda *_: seen.append(
        torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()))
    loss, norm = process.read(loss, process.clip_gradients())
    assert process.optimizer_step(1e-3, norm) == norm > 0.1
    assert seen == [pytest.approx(clip or norm, rel=1e-2)]


def test_accumulating_four_batches_of_one_equals_one_batch_of_four(workspace, tiny_model):
    """Rows that count unlike numbers of tokens: the mean must be over tokens, not over micro-batches."""
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 50, (2, 8, 16))
    for row, counted in enumerate((1, 16, 4, 9, 2, 16, 1, 5)):
        y[row, counted:] = IGNORE_INDEX
    fours = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4)]
    ones = [(x[i : i + 1], y[i : i + 1]) for i in range(8)]
    a = trained_on(workspace, tiny_model(), fours, gradient_accumulation_steps=1, max_steps=2)
    b = trained_on(workspace, tiny_model(), ones, gradient_accumulation_steps=4, max_steps=2)
    start = tiny_model()
    for (name, p), q, s in zip(a.named_parameters(), b.parameters(), start.parameters(), strict=True):
        assert not torch.equal(p, s), name
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4, msg=name)


def test_gradient_accumulation_reads_as_many_rows_as_it_says(shared):
    tokens = [shared.train("--gradient_accumulation_steps", n)["tokens"] for n in (1, 4)]
    assert tokens == [6 * 4 * 32, 6 * 4 * 4 * 32]


def test_a_batch_without_a_masked_in_token_trains_on(workspace, tiny_model):
    x = np.ones((2, 8), np.int64)
    model = trained_on(workspace, tiny_model(), [(x, np.full_like(x, IGNORE_INDEX))], max_steps=2,
                       gradient_accumulation_steps=1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_loss_mask_decides_what_is_learned(workspace, tiny_model):
    """After SFT on one row the answer is known by heart, and the question still is not."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(50)[:17][None]
    y = ids[:, 1:].copy()
    y[:, :8] = IGNORE_INDEX
    model = trained_on(workspace, tiny_model(), [(ids[:, :-1], y)], max_steps=60, learning_rate=1e-2,
                       gradient_accumulation_steps=1)
    logits = model.eval()(torch.from_numpy(ids[:, :-1]))[0]
    right = (logits.argmax(-1).numpy() == ids[:, 1:])[0]
    assert right[8:].all() and not right[:8].any()


def test_training_takes_the_tokenizers_vocabulary_and_the_training_configs_dropout(workspace):
    workspace.configure("model_config.json", dropout=0.1, vocab_size=99999)
    workspace.train("--dropout", 0.25)
    saved = workspace.load("pretrain_last.pt")
    assert saved["model_config"]["vocab_size"] == saved["tokenizer_config"]["vocab_size"] < 100
    assert saved["model_config"]["dropout"] == 0.25


def test_a_model_learns_the_text(workspace):
    result = workspace.train("--max_steps", 60, "--eval_interval", 20, "--learning_rate", 1e-2)
    assert result["best_val_loss"] < 2.5 < math.log(58)


# ---- What is saved when ----

def test_best_is_saved_when_validation_fell_and_every_interval_regardless_and_last_at_the_end(workspace):
    losses = iter([5.0, 4.0, 4.5, 3.9, 4.4, 4.4])  # at steps 0, 2, 4, 6, 8, 10
    saved = []
    write = train.ckpt.save
    with mock.patch.object(train, "validation_loss", side_effect=lambda *_: next(losses)), \
            mock.patch.object(train.ckpt, "save", side_effect=lambda path, value: saved.append(
                (value["step"], os.path.basename(path).split("_", 2)[2], value["best_val_loss"]))
                or write(path, value)):
        workspace.train("--max_steps", 10, "--eval_interval", 2, "--save_interval", 4)
    assert saved == [(2, "best.pt", 4.0), (4, "step_4.pt", 4.0), (6, "best.pt", 3.9), (8, "step_8.pt", 3.9),
                     (10, "last.pt", 3.9)]
    assert workspace.load("pretrain_best.pt")["step"] == 6
    assert workspace.load("pretrain_last.pt")["step"] == 10


def test_a_run_without_max_steps_goes_on_until_it_is_told(workspace):
    with told_at(25):
        result = workspace.train("--max_steps", 0, "--lr_decay_iters", 10)
    assert (result["step"], result["signal"]) == (26, signal.SIGINT)
    assert workspace.load("pretrain_last.pt")["step"] == 26


def test_max_minutes_stops_and_saves(workspace):
    result = workspace.train("--max_steps", 0, "--lr_decay_iters", 10, "--max_minutes", 0.005)
    assert result["step"] > 0 and result["signal"] == 0 and result["seconds"] < 10
    assert workspace.load("pretrain_last.pt")["step"] == result["step"]


def test_a_first_step_that_compiles_for_long_does_not_end_a_run(workspace):
    real = train.accumulate_gradients
    calls = []

    def slow_at_first(*args):
        calls.append(1)
        time.sleep(1.2 if len(calls) == 1 else 0)
        return real(*args)

    with mock.patch.object(train, "accumulate_gradients", slow_at_first):
        result = workspace.train("--max_steps", 0, "--lr_decay_iters", 10, "--max_minutes", 2 / 60)
    assert result["step"] > 1 and 1.5 < result["seconds"] < 4


def test_only_checkpoints_that_were_saved_are_named(workspace, capsys):
    with told_at(0):
        workspace.train()
    said = capsys.readouterr().out
    assert "checkpoint/pretrain_last.pt" in said and "pretrain_best.pt" not in said
    workspace.train()
    said = capsys.readouterr().out
    assert "checkpoint/pretrain_best.pt, checkpoint/pretrain_last.pt" in said and "run before" not in said
    (best,) = workspace.path.glob("checkpoint/pretrain_0*_best.pt")
    workspace.train()
    assert f"the best of the run before is checkpoint/{best.name}" in capsys.readouterr().out


def test_a_run_by_the_clock_shows_the_time_left(workspace):
    totals = []

    class Bar(mock.MagicMock):
        def update(self):
            totals.append(self.total)

    with mock.patch.object(Run, "progress", lambda *_: Bar(__enter__=lambda bar: bar)):
        result = workspace.train("--max_steps", 0, "--lr_decay_iters", 0, "--max_minutes", 1 / 60)
    assert result["step"] <= totals[-1] < 1.5 * result["step"] + 5 and totals[2] > 3


def test_a_compiler_that_ctrl_c_ends_too_is_one_line(workspace):
    def compile_and_fail(*_):
        signal.raise_signal(signal.SIGINT)
        raise InductorError(OSError("g++ was ended\nand much more"), None)

    with mock.patch.object(train, "accumulate_gradients", compile_and_fail):
        line = workspace.refused_training()
    assert line == ("error: interrupted while compiling, before this step was saved: "
                    "OSError: g++ was ended")


# ---- Continuing ----

def what_was_logged(workspace, *results):
    """Steps, losses and rates, as the logs of one or several runs that continue each other tell them."""
    found = [lines(workspace, result) for result in results]
    keys = ("epoch", "step", "loss", "lr", "tokens")
    return ([[line[key] for key in keys] for train_lines, _ in found for line in train_lines],
            {line["step"]: (line["val_loss"], line["best_val_loss"]) for _, v in found for line in v})


@pytest.mark.parametrize("words", [
    ["-t", "pretrain", "--optimizer", "adamw", "--dropout", 0.2, "--gradient_accumulation_steps", 1],
    ["-t", "pretrain", "--optimizer", "muon", "--dropout", 0.2, "--log_interval", 3],
    ["-t", "pretrain", "--optimizer", "muon", "--batch_size", 39, "--document_mask"],  # two steps an epoch
    ["-t", "sft", "--optimizer", "adamw", "--dropout", 0.2, "--gradient_accumulation_steps", 3],
    ["-t", "sft", "--optimizer", "muon", "--batch_size", 16, "--log_interval", 2],  # 2.5 steps an epoch
], ids=lambda words: " ".join(map(str, words)))
def test_interrupted_and_continued_equals_never_interrupted_bit_for_bit(workspace, words):
    words = [*words, "--max_steps", 7, "--eval_interval", 3, "--from_checkpoint", ""]
    task = words[1]
    whole = workspace.train(*words)
    expected, logged = workspace.load(f"{task}_last.pt"), what_was_logged(workspace, whole)
    for step in range(7):
        with told_at(step):
            first = workspace.train(*words)
        assert first["step"] == step + 1 and first["signal"] == signal.SIGINT
        second = workspace.train(*words, "--from_checkpoint", f"checkpoint/{task}_last.pt")
        got = workspace.load(f"{task}_last.pt")
        assert not differences(exact(got), exact(expected), f"after step {step}")
        assert what_was_logged(workspace, first, second) == logged, step


def test_mixed_precision_continues_exactly_too(workspace):
    with bfloat16_that_is(fast=True):
        words = ["--dropout", 0.2, "--dtype", "bfloat16"]
        workspace.train(*words)
        expected = workspace.load("pretrain_last.pt")
        with told_at(2):
            workspace.train(*words)
        workspace.train(*words, "--from_checkpoint", "checkpoint/pretrain_last.pt")
        assert not differences(exact(workspace.load("pretrain_last.pt")), exact(expected), "resumed")


def test_a_periodic_checkpoint_continues_exactly_too(workspace):
    workspace.train("--save_interval", 4, "--dropout", 0.2)
    expected = workspace.load("pretrain_last.pt")
    (path,) = workspace.path.glob("checkpoint/*_step_4.pt")
    workspace.train("--from_checkpoint", path, "--dropout", 0.2)
    assert not differences(exact(workspace.load("pretrain_last.pt")), exact(expected), "resumed")


def test_time_that_is_up_continues_exactly_too(workspace):
    """max_minutes, unlike max_steps, cuts a run anywhere: it must leave no trace in the best loss either."""
    words = ["--max_steps", 8, "--eval_interval", 4, "--learning_rate", 0.5, "--min_lr", 0.5]  # gets worse
    whole = workspace.train(*words)
    expected = workspace.load("pretrain_last.pt")

    def time_is_up(step, config, seconds):
        config.max_minutes = 1e-9 if step == 2 else 0.0
        return learning_rate(step, config, seconds)

    with mock.patch.object(train, "learning_rate", time_is_up):
        assert workspace.train(*words)["step"] == 3
    second = workspace.train(*words, "--from_checkpoint", "checkpoint/pretrain_last.pt")
    assert second["best_val_loss"] == whole["best_val_loss"]
    assert not differences(exact(workspace.load("pretrain_last.pt")), exact(expected), "resumed")


def test_a_run_by_the_clock_has_its_time_once_also_when_it_is_cut(workspace, capsys):
    words = ["--max_steps", 0, "--lr_decay_iters", 0, "--max_minutes", 2 / 60, "--warmup_iters", 0]
    with told_at(5):
        first = workspace.train(*words)
    cut = workspace.load("pretrain_last.pt")
    cut["dataloader"]["seconds"] = 1.5  # as if it had been cut later
    torch.save(cut, workspace.path / "cut.pt")
    second = workspace.train(*words, "--from_checkpoint", "cut.pt")
    assert second["step"] > first["step"] and second["seconds"] < 1.2
    assert workspace.load("pretrain_last.pt")["dataloader"]["seconds"] == pytest.approx(2, abs=0.3)
    cut["dataloader"]["seconds"] = 2.0
    torch.save(cut, workspace.path / "cut.pt")
    assert workspace.train(*words, "--from_checkpoint", "cut.pt")["step"] == first["step"]
    assert "the checkpoint has reached max_minutes 0.03" in capsys.readouterr().out


def test_sft_from_pretraining_starts_at_step_zero_with_a_fresh_optimizer_and_its_own_dropout(workspace):
    workspace.train("--dropout", 0.1, "--max_steps", 9)
    before = workspace.load("pretrain_best.pt")
    with told_at(0):
        result = workspace.train("-t", "sft", "--dropout", 0.3)
    after = workspace.load("sft_last.pt")
    assert result["step"] == after["step"] == 1 and after["task"] == "sft"
    assert after["model_config"]["dropout"] == after["train_config"]["dropout"] == 0.3
    assert build_model(after)[0].transformer["drop"].p == 0.3
    assert {float(state["step"]) for state in after["optimizer"][0]["state"].values()} == {1.0}
    moved = (after["model"]["lm_head.weight"] - before["model"]["lm_head.weight"]).abs().max()
    assert 0 < moved < 0.01  # one step away from the pretrained weights


def test_sft_from_sft_resumes_with_the_dropout_of_its_config(workspace):
    workspace.train()
    with told_at(2):
        workspace.train("-t", "sft")
    with mock.patch.object(train, "build_optimizer", side_effect=build_optimizer) as built:
        result = workspace.train("-t", "sft", "--from_checkpoint", "checkpoint/sft_last.pt",
                                 "--dropout", 0.4)
    assert [line["step"] for line in lines(workspace, result)[0]] == [4, 5, 6]
    assert built.call_args.args[0].transformer["drop"].p == 0.4


def test_another_optimizer_than_the_checkpoints_is_named(workspace):
    workspace.train("--optimizer", "adamw")
    message = workspace.refused_training("--from_checkpoint", "checkpoint/pretrain_last.pt", "--optimizer",
                                "muon")
    assert "optimizer muon: checkpoint/pretrain_last.pt was trained with adamw" in message
    message = workspace.refused_training("--from_checkpoint", "checkpoint/pretrain_last.pt",
                                "--optimizer", "adamw", "--embedding_lr", 2)
    assert "embedding_lr 2.0: checkpoint/pretrain_last.pt was trained with 3.0" in message


def test_verify_resume_shows_that_a_cut_run_is_the_same(workspace, capsys):
    try:
        with workspace.here():
            assert verify_resume(workspace.arguments("--dropout", "0.2"), train.train) == 0
            verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert verdict == {"steps": 6, "cut_after": 3, "identical": True, "different": []}
            with mock.patch.object(strategy, "set_rng_state"):  # a resume that forgets the random state
                assert verify_resume(workspace.arguments("--dropout", "0.2"), train.train) == 1
            verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert not verdict["identical"] and any("model" in name for name in verdict["different"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not list(workspace.path.glob("train_*.log")) and not list(workspace.path.glob("checkpoint/*"))


def test_a_shape_flag_that_contradicts_the_checkpoint_is_named(workspace):
    workspace.train()
    message = workspace.refused_training("--from_checkpoint", "checkpoint/pretrain_last.pt",
                                "--n_layer", 3)
    assert "--n_layer 3: checkpoint/pretrain_last.pt has 2" in message


def test_data_of_another_vocabulary_is_named(workspace):
    workspace.train()
    other = train.Tokenizer.build(["abc"])
    other.save(workspace.path / "dataset" / "tokenizer.json")
    message = workspace.refused_training("--from_checkpoint", "checkpoint/pretrain_last.pt")
    assert "prepared with another vocabulary" in message and "--tokenizer" in message


# ---- Processes and signals ----

ENDLESS = ["--max_steps", "0", "--lr_decay_iters", "10"]


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_ends_with_its_status(workspace, signum, status):
    process = workspace.start("train.py", *ENDLESS, stderr="stderr.txt")
    process.send_signal(signum)
    assert process.wait(30) == status
    stderr = (workspace.path / "stderr.txt").read_text()
    assert "Traceback" not in stderr and "finishing this step" in stderr
    saved = workspace.load("pretrain_last.pt")
    (log,) = workspace.path.glob("train_*.log")
    assert saved["step"] == parse_log(log)[0][-1]["step"] > 0


def test_a_second_signal_ends_the_process_at_once(workspace):
    """The first is being obeyed when the second comes: here the save that it asks for never ends."""
    (workspace.path / "slow.py").write_text(
        "import time, train; train.ckpt.save = lambda *_: time.sleep(600); train.run_script(train.main)")
    process = workspace.start("slow.py", *ENDLESS, "--eval_interval", "100000")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.running()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_two_runs_in_one_folder_keep_apart(workspace):
    """Started in the same moment: each has its own log and its own checkpoints."""
    runs = [forks().start(workspace.path, ["train.py", "--random_seed", seed]) for seed in (1, 2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(list(workspace.path.glob("train_*.log"))) == 2
    dated = sorted(workspace.path.glob("checkpoint/pretrain_2*_last.pt"))
    seeds = {workspace.load(path.name)["train_config"]["random_seed"] for path in dated}
    assert len(dated) == 2 and seeds == {1, 2}
    assert workspace.load("pretrain_last.pt")["step"] == 6
    assert not list(workspace.path.glob("checkpoint/*.tmp"))
