"""studies.dynamics: real short runs, what they conclude, and what happens when a study is started again."""

import json

import numpy as np
import pytest
import torch

from config import ModelConfig
from model import GPT
from script import InputError
from studies import dynamics
from studies.dynamics import Point, Study, critical_batch, remove_positions


@pytest.fixture
def study(workspace, monkeypatch, capsys):
    """study(points, WORDS…): a study of these points in the workspace; returns its last line's dict."""
    def run(points, **values):
        monkeypatch.setitem(dynamics.STUDIES, "depth", lambda: Study("Which?", "layers", points, **values))
        monkeypatch.setattr(dynamics, "SEEDS", (1, 2))
        with workspace.here("dynamics.py"):
            dynamics.main(dynamics.command_line(["depth", "--tokens", "40960"], root=str(workspace.path)))
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    # The text of the workspace is short: windows of 32 tokens, as its configs have.
    monkeypatch.setitem(dynamics.MODEL, "block_size", 32)
    monkeypatch.setitem(dynamics.MODEL, "n_embd", 16)
    monkeypatch.setitem(dynamics.MODEL, "n_layer", 1)
    return run


def test_a_study_trains_each_point_with_every_seed_once(workspace, study):
    points = [Point("rate", rate, train={"learning_rate": rate}, tokens=0.5) for rate in (1e-4, 2e-2)]
    result = study(points)
    path = workspace.path / "dynamics_depth.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((run["x"], run["seed"]) for run in runs) == [(1e-4, 1), (1e-4, 2), (2e-2, 1), (2e-2, 2)]
    assert result["runs"] == 4 and result["finding"]["rate"]["x"] == 2e-2  # the other one hardly moves
    assert result["rows"][0]["loss"] == [run["loss"] for run in runs if run["x"] == 1e-4]
    assert (workspace.path / "dynamics_depth.png").stat().st_size > 10_000
    assert not list(workspace.path.glob("train_*.log"))

    # Again: nothing is trained. With one more point: its runs alone.
    before = path.read_text()
    assert study(points)["runs"] == 4 and path.read_text() == before
    assert study([*points, Point("rate", 5e-3, train={"learning_rate": 5e-3}, tokens=0.5)])["runs"] == 6
    assert path.read_text().startswith(before) and path.read_text().count("\n") == 6


def test_the_averaged_weights_the_entropy_and_the_logits_are_measured(workspace, study):
    study([Point("a", 1, tokens=0.5)])
    run = json.loads((workspace.path / "dynamics_depth.jsonl").read_text().splitlines()[0])
    assert 0 < run["entropy"] < np.log(32)
    assert run["max_logit"] <= 1.01 * 8 ** 0.5  # with a query/key norm, by Cauchy-Schwarz
    assert run["loss_of_averaged_weights"] != run["loss"]
    assert run["curve"][0] > run["curve"][-1]


def test_a_range_test_raises_the_rate_through_four_decades(workspace, study):
    study([Point("a", 1, tokens=0.5), Point("range test", 3e-2, is_range_test=True)])
    runs = [json.loads(line) for line in (workspace.path / "dynamics_depth.jsonl").read_text().splitlines()]
    rates = [run["rate_of_lowest_loss"] for run in runs if run["series"] == "range test"]
    assert len(rates) == 2 and all(3e-4 < rate < 3 for rate in rates)


def test_without_positions_a_model_does_not_see_the_order_of_its_past():
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20, use_rope=False)
    torch.manual_seed(0)
    model = GPT(config).eval()
    idx = torch.tensor([[1, 2, 3, 4], [3, 1, 2, 4]])
    before = model(idx)[0][:, -1]
    assert not torch.allclose(before[0], before[1], atol=1e-5)
    remove_positions(model)
    after = model(idx)[0][:, -1]
    assert torch.allclose(after[0], after[1], atol=1e-5)
    assert not model.transformer["wpe"].weight.requires_grad


def test_the_critical_batch_of_made_up_runs_is_found():
    """Tokens to the goal are 100,000 (1 + B / 2,000); each curve falls by 1 when it gets there."""
    runs = []
    for batch in (500, 1000, 2000, 4000):
        points = round(100_000 * (1 + batch / 2000) / 1000)
        runs.append({"x": batch, "curve": [2.0] * (points - 1) + [1.0], "tokens_per_point": 1000})
    finding = {}
    critical_batch(runs, finding)
    assert finding["goal"] == 1.0
    assert finding["critical_batch"] == pytest.approx(2000, rel=0.02)
    assert finding["steps_to_goal"][4000] == pytest.approx(75)


def test_every_study_has_points_that_can_be_trained(workspace):
    args = dynamics.command_line(["lr"], root=str(workspace.path))
    for name in dynamics.NAMES:
        study = dynamics.STUDIES[name]()
        keys = [(point.series, point.x) for point in study.points]
        assert len(keys) == len(set(keys)) >= 3, name
        for point in study.points:
            _, config = dynamics.configs(point, 1, args)
            assert config.max_steps >= 60, name


def test_bad_input_is_one_line(workspace):
    with pytest.raises(InputError, match="--tokens 100: must be at least 40960"):
        dynamics.command_line(["lr", "--tokens", "100"], root=str(workspace.path))
    path = workspace.path / "dynamics_lr.jsonl"
    path.write_text('{"series": "a"}\n')
    refused = workspace.run("-m", "studies.dynamics", "lr", status=2)
    assert "line 1: not a run of this study" in refused.stderr
    refused = workspace.run("-m", "studies.dynamics", "speed", status=2)
    assert "invalid choice: 'speed'" in refused.stderr and refused.stderr.count("\n") == 1
