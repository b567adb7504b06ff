"""The benchmarks measure real work and end with one JSON line."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

import train
from config import InputError, ModelConfig
from studies import bench


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


def test_trimmed_batches_have_the_loss_of_padded_ones_and_are_faster(workspace, capsys):
    bench.main(bench.command_line([
        "sft", *QUICK, "--seconds", "0.3", "--batch_size", "4", "--block_size", "256", "--n_layer", "1",
        "--n_head", "2", "--n_embd", "32", "--rows", str(workspace.path / "dataset" / "sft_train.npy")]))
    result = last_json(capsys)
    assert result["losses"]["trimmed"] == pytest.approx(result["losses"]["padded"], abs=1e-5)
    assert 5 < result["mean_width"] < 60 and result["ratio"] > 1


def test_a_speedrun_is_a_process_that_trains_and_validates(tmp_path, monkeypatch, capsys):
    """With small settings, since the real ones take a minute."""
    (tmp_path / "input.txt").write_text("To be, or not to be, that is the question: " * 200)
    settings = dict(batch_size=4, max_steps=20, warmup_iters=2, learning_rate=1e-2)
    monkeypatch.setattr(train, "CHECKPOINTS", None)  # the run sets it
    monkeypatch.setitem(bench.RECIPES, "ours", (TINY, {"optimizer": "muon", **settings}))
    args = bench.command_line(["speedrun", *QUICK, "--text", str(tmp_path / "input.txt"), "--recipe", "ours"])
    bench.main(args)
    result = last_json(capsys)
    assert result["steps"] == 20 and result["tokens"] == 20 * 4 * TINY["block_size"]
    assert result["val_loss"] < 2.5
    with pytest.raises(InputError, match="speedrun needs --text"):
        bench.command_line(["speedrun"])
    args.text = "nowhere.txt"
    with pytest.raises(InputError, match="--text nowhere.txt: cannot be read"):
        bench.main(args)


def test_growth_measures_each_quantity_and_draws_it(tmp_path, monkeypatch, capsys):
    plot = tmp_path / "growth.png"
    monkeypatch.setattr(bench, "WIDTHS", (64, 128))
    monkeypatch.setattr(bench, "LENGTHS", (16, 32))
    bench.main(bench.command_line(["growth", *QUICK, "--n_layer", "1", "--plot", str(plot)]))
    result = last_json(capsys)
    assert set(result["gflops_by_width"]) == {"64", "128"}
    assert set(result["tokens_per_second_by_length"]) == set(result["gflops_by_block"]) == {"16", "32"}
    assert min(result["tokens_per_second_by_length"]["32"].values()) > 0
    assert plot.stat().st_size > 10_000


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
