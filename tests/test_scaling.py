"""scaling.py: a grid of real runs, the law fitted to them, and what happens when it is cut or misused."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

import plan
from scaling_law import effective, weight_decay_for
from script import InputError
from studies import scaling
from studies.grid import read_runs

LAW = {"E": 1.2, "A": 60.0, "B": 300.0, "alpha": 0.45, "beta": 0.4}
N, D = (np.array(axis, float).ravel() for axis in np.meshgrid([1e4, 5e4, 2e5, 8e5], [1e5, 3e5, 1e6, 3e6]))
SMALL = ["--shapes", "1x8", "1x16", "2x32", "--tokens", 2048, 4096, 8192, "--batch_size", 4,
         "--learning_rate", 1e-2, "--n_prev", 0]


def grid_in(workspace, *words):
    """scaling.py WORDS… in this process; returns its JSON line's dict."""
    with workspace.here("scaling.py", *map(str, words)):
        args = scaling.command_line()
        runs, signalled = scaling.train_grid(args, f"{args.out}.jsonl")
        assert not signalled
        result = scaling.study(runs, f"{args.out}.jsonl", f"{args.out}.png")
        scaling.write_law(f"{args.out}.json", result["law"], runs, args.model)
        return result


@pytest.fixture
def scripts_here(workspace, monkeypatch):
    monkeypatch.setattr(scaling, "ROOT", str(workspace.path))
    return workspace


def test_the_fit_recovers_the_law_that_made_the_losses():
    found = scaling.fit_law(N, D, scaling.predict(LAW, N, D))
    assert {name: found[name] for name in LAW} == pytest.approx(LAW, rel=0.02)
    assert found["N_exponent"] == pytest.approx(0.4 / 0.85, rel=0.01)


def test_the_intervals_hold_the_law_that_made_noisy_losses():
    noise = np.random.default_rng(1).normal(0, 0.005, len(N))
    found = scaling.intervals(N, D, scaling.predict(LAW, N, D) + noise)
    for name in ("E", "alpha", "beta"):
        low, high = found[name]
        assert low < LAW[name] < high and high - low < LAW[name]


def test_a_law_without_an_irreducible_loss_has_none():
    law = {**LAW, "E": 0.0}
    falling_below_it = scaling.predict(law, N, D) - 0.02
    assert scaling.fit_law(N, D, falling_below_it)["E"] == 0


def test_losses_that_do_not_fall_have_no_law():
    assert scaling.fit_law(N, D, np.log(N) + np.log(D)) is None


def test_no_other_model_of_the_same_compute_is_better_than_the_optimum():
    n, d = scaling.optimum(LAW, 1e13)
    assert 6 * n * d == pytest.approx(1e13)
    best = scaling.predict(LAW, n, d)
    for factor in (0.8, 0.95, 1.05, 1.25):
        assert scaling.predict(LAW, n * factor, d / factor) > best


def test_the_best_model_for_a_time_is_the_one_that_the_measured_speeds_allow():
    """Where each size costs 6 N D at one speed, that is the optimum of the compute."""
    runs = [{"n": n, "tokens": d, "seconds": 6 * n * d / 1e10, "settings": {"training_tokens": 1e12}}
            for n, d in zip(N, D, strict=True)]
    best = scaling.best_in(LAW, runs, 1000)
    assert (best["n"], best["tokens"]) == pytest.approx(scaling.optimum(LAW, 1e13), rel=0.02)
    slow_when_small = [{**done, "seconds": done["seconds"] * (8e5 / done["n"])} for done in runs]
    assert scaling.best_in(LAW, slow_when_small, 1000)["n"] > 7.9e5
    little_text = [{**done, "settings": {"training_tokens": 1e6}} for done in runs]
    assert scaling.best_in(LAW, little_text, 1000)["n"] > 1.2 * best["n"]  # a longer look at it pays less


def test_a_study_trains_each_run_once_and_ends_with_a_law(scripts_here, capsys):
    result = grid_in(scripts_here, *SMALL)
    lines = (scripts_here.path / "scaling.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert result["runs"] == len(runs) == 9 and len({(r["n"], r["tokens"]) for r in runs}) == 9
    assert {r["tokens"] for r in runs} == {2048, 4096, 8192} and {r["steps"] for r in runs} == {16, 32, 64}
    by = {(r["shape"], r["tokens"]): r["loss"] for r in runs}
    assert by["2x32", 8192] < by["2x32", 2048] < np.log(70) and by["2x32", 8192] < by["1x8", 8192]
    losses = [r["loss"] for r in runs]
    assert result["residual"] < np.std(losses) / 2  # the law explains most of the differences
    assert 0 <= result["law"]["E"] < min(losses)
    law = json.loads((scripts_here.path / "scaling.json").read_text())
    assert law["law"] == result["law"] and law["model"]["n_prev"] == 0
    assert law["training_tokens"] == runs[0]["settings"]["training_tokens"]
    assert set(result["budgets"]) == set(scaling.BUDGETS)
    assert (scripts_here.path / "scaling.png").stat().st_size > 10_000
    assert not list(scripts_here.path.glob("train_*.log"))
    assert not list((scripts_here.path / "checkpoint").iterdir())

    # Again: nothing is trained. With a fourth shape: its runs alone, and a law put to the test.
    assert grid_in(scripts_here, *SMALL)["runs"] == 9
    assert (scripts_here.path / "scaling.jsonl").read_text().splitlines() == lines
    more = [*SMALL[:4], "2x40", *SMALL[4:8], 12288, *SMALL[8:]]
    result = grid_in(scripts_here, *more)
    # Far better than to predict the mean of the smaller runs.
    assert result["prediction_error"] < abs(np.mean(losses) - by["2x32", 8192])
    assert len((scripts_here.path / "scaling.jsonl").read_text().splitlines()) == 16

    # Other settings: another study, which the first one's runs take no part in.
    capsys.readouterr()
    other = grid_in(scripts_here, *SMALL, "--learning_rate", 5e-3)
    assert other["runs"] == 9 and "16 runs with other settings" in capsys.readouterr().out


def test_a_study_that_is_interrupted_keeps_its_runs_and_goes_on(workspace):
    words = ["-m", "studies.scaling", *SMALL, "--tokens", 2048, 4096, 200_000]
    path = workspace.path / "scaling.jsonl"
    child = subprocess.Popen([sys.executable, *map(str, words)], cwd=workspace.path, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not (path.exists() and path.read_text().count("\n") >= 6):
        pass
    child.send_signal(signal.SIGINT)
    stderr = child.communicate(timeout=60)[1]
    assert child.returncode == 130 and "Traceback" not in stderr
    before = path.read_text()
    assert before.count("\n") >= 6
    ended = workspace.run("-m", "studies.scaling", *SMALL)
    assert path.read_text().startswith(before)
    assert json.loads(ended.stdout.splitlines()[-1])["runs"] == path.read_text().count("\n")


@pytest.mark.parametrize("words, message", [
    (["--shapes", "2x"], "--shapes 2x: must be layers x width, such as 2x96"),
    (["--shapes", "1x9"], "--shapes 1x9: use_rope needs an even head size"),
    (["--tokens", "100"], "--tokens, 1 steps of 128: warmup_iters 10 must be below"),
    (["--tokens", "0"], "--tokens, 1 steps of 128: warmup_iters 10 must be below"),
    (["--n_embd", "64"], "unrecognized arguments: --n_embd"),
    (["--shapes", "1x8", "1x16", "--tokens", "2048"], "a law needs three --shapes and three --tokens"),
    (["--out", "nowhere/study"], "nowhere/study.jsonl: cannot be written"),
])
def test_bad_input_is_one_line(scripts_here, words, message):
    assert message in scripts_here.refused(scaling.main, *words)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "scaling.jsonl"
    run = dict.fromkeys(scaling.RUN_KEYS, 0)
    for damaged in ('{"shape": "1x8"}', '{"shape": "1x8', "[1]"):
        path.write_text(f"{json.dumps(run)}\n{damaged}\n")
        with pytest.raises(InputError, match="line 2: not a run of this study; delete that line"):
            read_runs(path, scaling.RUN_KEYS)


def test_long_runs_have_larger_steps_and_repeated_text_more_weight_decay(scripts_here):
    with scripts_here.here("scaling.py", "--shapes", "1x8", "2x64", "--tokens", "8192", "4000000"):
        args = scaling.command_line()
    text = scaling.PreparedText(args.train, str(scripts_here.path), args.model.block_size)
    grid = {(name, tokens): config for name, _, config, tokens in scaling.make_grid(args, text)}
    in_a_step = {key: config.batch_size * args.model.block_size for key, config in grid.items()}
    for name, model, config, tokens in scaling.make_grid(args, text):
        assert tokens == pytest.approx(config.max_steps * in_a_step[name, tokens])
        assert config.weight_decay == pytest.approx(weight_decay_for(
            plan.on_meta(model).n_matmul_params(), tokens, text.n_tokens, config.learning_rate,
            in_a_step[name, tokens]))
    short, long = sorted({tokens for _, tokens in grid})
    assert long == pytest.approx(4e6, rel=0.01)
    assert in_a_step["1x8", short] == args.train.batch_size * args.model.block_size
    assert 1000 < in_a_step["1x8", long] <= 2048 and grid["1x8", long].max_steps < 4000
    assert 0.1 <= grid["1x8", short].weight_decay < grid["2x64", long].weight_decay


def test_a_repeated_token_is_worth_less_than_a_new_one():
    worth = [effective(1e5, passes * 1e6, 1e6)[1] for passes in (0.5, 1, 2, 1000)]
    assert worth[:2] == [5e5, 1e6]
    assert 1.9e6 < worth[2] < 2e6
    assert worth[3] == pytest.approx(9e6)


def test_parameters_beyond_what_the_text_can_fill_are_worth_less():
    worth = [effective(n, 1e6, 1e6)[0] for n in (1e5, 1e6, 2e6, 1e9)]
    assert worth[:2] == [1e5, 1e6]
    assert 1.9e6 < worth[2] < 2e6
    assert worth[3] == pytest.approx(6.3e6)
