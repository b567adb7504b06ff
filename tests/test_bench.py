"""The benchmarks measure real work and end with one JSON line."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

import bench
from config import ModelConfig


@pytest.mark.parametrize("what, names", [
    ("generate", {"no cache, 1 sequence", "KV cache, 1 sequence", "KV cache, 32 sequences", "prefill"}),
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


def test_a_training_step_of_the_benchmark_changes_the_weights():
    args = SimpleNamespace(model=ModelConfig(**TINY, vocab_size=20), batch_size=2)
    step, model = bench.training_step(args, torch.device("cpu"), torch.float32)
    before = model.lm_head.weight.clone()
    assert step() == 2 * TINY["block_size"]
    assert not torch.equal(before, model.lm_head.weight)


def test_kernels_that_the_device_lacks_are_marked(capsys):
    bench.main(bench.command_line(["sdpa", "--repeats", "1", "--seconds", "0.01", "--device", "cpu",
                                   "--batch_size", "1", "--block_size", "16"]))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("mem_efficient") and "not here" in line for line in lines)
    assert {"flash", "math"} <= set(json.loads(lines[-1])["milliseconds"])
