"""The benchmarks measure real work and end with one JSON line."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from config import ModelConfig
from device import has_fast_bfloat16
from script import InputError
from studies import bench, distributed, speedrun, timing
from studies.train_speed import our_step, runs_by_default, ways_to_train


@pytest.mark.parametrize("what, names", [
    ("generate", {"no cache, 1 sequence", "prefill",
                  *(f"KV cache, {way}, {rows}" for way in ("PyTorch", "decode.c", "decode.c, int8")
                    for rows in ("1 sequence", "32 sequences"))}),
    ("data", {"encode", "decode", "data.py, file to file"}),
])
def test_a_benchmark_reports_a_rate_for_each_way(what, names, capsys):
    bench.main(bench.command_line([what, "--repeats", "1", "--seconds", "0.01", "--megabytes", "1",
                                   "--n_layer", "1", "--n_head", "2", "--n_embd", "16",
                                   "--block_size", "32"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = result.get("tokens_per_second") or result["megabytes_per_second"]
    assert set(rates) == names
    assert all(rate > 0 for rate in rates.values())


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


QUICK = ["--repeats", "1", "--seconds", "0.01", "--device", "cpu"]


def test_trimmed_batches_have_the_loss_of_padded_ones_and_fewer_tokens(workspace, capsys):
    bench.main(bench.command_line([
        "sft", *QUICK, "--batch_size", "4", "--block_size", "256", "--n_layer", "1",
        "--n_head", "2", "--n_embd", "32", "--rows", str(workspace.path / "dataset" / "sft_train.npy")]))
    result = last_json(capsys)
    assert result["losses"]["trimmed"] == pytest.approx(result["losses"]["padded"], abs=1e-5)
    assert 5 < result["mean_width"] < 60


def test_a_speedrun_is_a_process_that_trains_and_validates(tmp_path, monkeypatch, capsys):
    """With small settings, since the real ones take a minute."""
    (tmp_path / "input.txt").write_text("To be, or not to be, that is the question: " * 200)
    settings = dict(batch_size=4, max_steps=20, warmup_iters=2, learning_rate=1e-2)
    monkeypatch.setitem(speedrun.RECIPES, "ours", (TINY, {"optimizer": "muon", **settings}))
    args = bench.command_line(["speedrun", *QUICK, "--text", str(tmp_path / "input.txt"), "--recipe", "ours"])
    bench.main(args)
    result = last_json(capsys)
    assert result["steps"] == 20 and result["tokens"] == 20 * 4 * TINY["block_size"]
    assert result["val_loss"] < 2.5
    with pytest.raises(InputError, match="speedrun needs --text"):
        bench.command_line(["speedrun"])
    with pytest.raises(InputError, match="--text nowhere.txt: no such file"):
        bench.command_line(["speedrun", "--text", "nowhere.txt"])
    (tmp_path / "input.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8 at byte 3"):
        bench.main(args)


def test_a_training_step_of_the_benchmark_changes_the_weights():
    args = SimpleNamespace(model=ModelConfig(**TINY, vocab_size=20), batch_size=2)
    step, model = our_step(args, torch.device("cpu"), torch.float32)
    before = model.lm_head.weight.clone()
    assert step() == 2 * TINY["block_size"]
    assert not torch.equal(before, model.lm_head.weight)


# The interface of nanoGPT's model.py, with a bigram model in the place of its Transformer.
NANOGPT = '''
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: few")
        assert (config.n_layer, config.n_embd, config.block_size, config.bias) == (1, 16, 32, False)
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        assert device_type == "cpu"
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
'''


def test_only_the_chosen_ways_are_timed_and_nanogpt_beside_them(tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT)
    words = ["train", *QUICK, "--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "32",
             "--batch_size", "2", "--nanogpt", str(tmp_path)]
    best = "bfloat16" if has_fast_bfloat16(torch.device("cpu")) else "float32"
    bench.main(bench.command_line([*words, "--ways", f"{best} nanoGPT", "float32 Muon", f"{best} AdamW"]))
    result = last_json(capsys)
    assert set(result["tokens_per_second"]) == {"float32 Muon", f"{best} AdamW", f"{best} nanoGPT"}
    assert set(result["against_nanogpt"]) >= {f"{best} AdamW"}
    assert set(result["matmul_tflops"]) == {"float32", best}
    with pytest.raises(InputError, match="--ways 'fast': there are 'float32 AdamW', "):
        bench.main(bench.command_line([*words, "--ways", "fast"]))
    with pytest.raises(InputError, match="has no model.py; git clone"):
        bench.command_line(["train", "--nanogpt", str(tmp_path / "nowhere")])


def test_only_one_way_of_each_project_is_compiled_by_default_on_cuda():
    args = SimpleNamespace(nanogpt="dir")
    types = {"TF32": torch.float32, "bfloat16": torch.bfloat16}
    ways = ways_to_train(args, torch.device("cuda"), types)
    chosen = [way for way in ways if runs_by_default(way, "bfloat16", on_cuda=True)]
    assert chosen == ["TF32 AdamW", "bfloat16 AdamW", "bfloat16 AdamW compiled", "bfloat16 Muon",
                      "bfloat16 nanoGPT", "bfloat16 nanoGPT compiled"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bar_counts_warm_ups_and_measurements_on_a_terminal_only(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    args = SimpleNamespace(repeats=2, seconds=1e-3)
    ways = {"one": lambda: lambda: 1, "other": lambda: lambda: 1}
    rounds = timing.measure(ways, args, torch.device("cpu"))
    assert [list(rates) for rates in rounds] == [["one", "other"]] * 2
    shown = capsys.readouterr().err
    assert ("other" in shown and "5/6 [" in shown) == is_terminal and bool(shown) == is_terminal


def test_rates_are_compared_within_a_round():
    rounds = [{"a": 10.0, "b": 20.0}, {"a": 1.0, "b": 2.0}, {"a": 4.0, "b": 2.0}]
    assert timing.medians(rounds) == {"a": 4.0, "b": 2.0}
    assert timing.medians(rounds, "a") == {"a": 1.0, "b": 2.0}


def test_kernels_that_the_device_lacks_are_marked(capsys):
    bench.main(bench.command_line(["sdpa", *QUICK, "--batch_size", "1", "--block_size", "16"]))
    lines = capsys.readouterr().out.splitlines()
    for kernel in ("mem_efficient", "cudnn"):
        assert any(line.startswith(kernel) and "not here" in line for line in lines)
    assert {"flash", "math"} == set(json.loads(lines[-1])["milliseconds"])


def test_the_copy_in_which_processes_are_compared_trains(tmp_path):
    distributed.copy_with_data(str(tmp_path))
    words = [sys.executable, "train.py", "--device", "cpu", "--n_layer", "1", "--n_embd", "32", "--max_steps",
             "5", "--eval_iters", "1"]
    assert distributed.tokens_per_second(words, str(tmp_path), threads=1) > 0
