"""The planner: which model it chooses, what it writes, and whether training then does what it says."""

import json
import math
from unittest import mock

import pytest
import torch
from conftest import TINY

import plan
from config import ModelConfig
from metrics import parse_log
from script import InputError
from studies.bench import peak_bytes
from studies.train_speed import our_step
from tokenizer import Tokenizer


@pytest.fixture
def planned(workspace, monkeypatch, capsys):
    """planned(WORDS…): plan.py in the workspace, with short measurements; returns its last line's dict."""
    monkeypatch.setattr(plan, "LADDER", ((1, 8), (1, 16), (1, 32)))
    monkeypatch.setattr(plan, "STARTING_SECONDS", 1.0)

    def run(*words):
        plan.main(plan.command_line(list(map(str, words)), root=str(workspace.path)))
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    return run


def test_the_plan_for_a_time_is_written_and_kept_by_training(workspace, planned, monkeypatch):
    monkeypatch.setattr(plan, "PASSES", 10**9)  # the time ends this run, not its short text
    workspace.configure("config_pretrain.json", random_seed=7, from_checkpoint="old.pt")
    before = json.loads((workspace.path / "config_pretrain.json").read_text())
    result = planned("--minutes", 0.5, "--device", "cpu", "--write")
    model = json.loads((workspace.path / "model_config.json").read_text())
    train = json.loads((workspace.path / "config_pretrain.json").read_text())
    assert result["written"] and model.items() >= result["model"].items()
    assert train.items() >= result["train"].items()
    assert train["random_seed"] == 7 and train["dataset_path"] == before["dataset_path"]
    assert train["max_steps"] == train["lr_decay_iters"] == 0 and train["device"] == "cpu"
    # Training starts from these files, and its learning rate follows the clock to 0.
    workspace.configure("config_pretrain.json", max_minutes=4 / 60)
    workspace.run("train.py")
    steps, validations = parse_log(next(workspace.path.glob("train_*.log")))
    rates = [step["lr"] for step in steps]
    assert max(rates) <= train["learning_rate"] and rates[-1] < 0.1 * max(rates)
    assert validations[-1]["step"] == steps[-1]["step"]
    saved = workspace.load("pretrain_last.pt")
    assert saved["model_config"]["n_embd"] == result["model"]["n_embd"]


def test_what_is_planned_can_be_exported():
    """Other programs run RoPE, query/key norm and squared ReLU, and know no table of preceding tokens."""
    assert plan.SHAPE["n_prev"] == 0 and plan.SHAPE["use_rope"] and plan.SHAPE["qk_norm"]
    assert plan.SHAPE["activation"] == "relu2" and plan.SHAPE["final_norm"] == "rmsnorm"
    assert not plan.SHAPE["bias"] and plan.SHAPE["is_causal"]


def test_without_write_nothing_changes(workspace, planned):
    before = {path.name: path.read_bytes() for path in workspace.path.glob("*.json")}
    assert not planned("--tokens", 20000)["written"]
    assert before == {path.name: path.read_bytes() for path in workspace.path.glob("*.json")}


def test_a_plan_for_tokens_has_as_many_steps_as_they_are(planned):
    result = planned("--tokens", 50_000)
    train = result["train"]
    in_a_step = train["batch_size"] * train["gradient_accumulation_steps"] * 32
    assert train["max_steps"] == round(50_000 / in_a_step) and train["max_minutes"] == 0
    assert result["expected_loss"] == min(result["losses"].values())


def test_less_memory_means_a_smaller_step_and_then_a_smaller_model(planned):
    assert planned("--memory_gb", 100)["model"]["n_embd"] == 32  # the largest there is
    n_bytes = plan.memory_bytes(ModelConfig(n_layer=1, n_embd=16, n_head=1, vocab_size=70, block_size=32,
                                            **plan.SHAPE), 32, is_half=True)
    small = planned("--memory_gb", 1.05 * n_bytes / 1e9)
    assert small["model"]["n_embd"] <= 16
    assert small["train"]["gradient_accumulation_steps"] > 1 and small["memory_gb"] <= 1.05 * n_bytes / 1e9
    with pytest.raises(InputError, match="too little for the smallest model"):
        planned("--memory_gb", 1e-6)


def test_a_second_plan_does_not_depend_on_the_first(planned):
    first = planned("--tokens", 30_000, "--write")
    again = planned("--tokens", 30_000)
    for key in ("model", "losses"):
        assert first[key] == again[key]
    assert first["train"]["learning_rate"] == again["train"]["learning_rate"]


@pytest.mark.parametrize("is_half", [False, True])
def test_the_estimate_of_memory_is_near_what_training_takes(is_half):
    dtype = torch.bfloat16 if is_half else torch.float32
    for values in (dict(n_layer=2, n_embd=96, n_head=1, vocab_size=71),
                   dict(n_layer=4, n_embd=128, n_head=2, vocab_size=2096)):
        config = ModelConfig(block_size=128, **values, **plan.SHAPE)
        args = type("Args", (), {"model": config, "batch_size": 8})
        step, model = our_step(args, torch.device("cpu"), dtype, "muon")
        step()
        weights_and_moments = 12 * model.n_params()
        measured = peak_bytes(step, torch.device("cpu")) + weights_and_moments
        assert plan.memory_bytes(config, 8 * 128, is_half) == pytest.approx(measured, rel=0.35)


def test_the_learning_rate_falls_with_the_width_and_keeps_its_product():
    assert plan.learning_rate_at(256) == 3e-3
    assert plan.learning_rate_at(64) == pytest.approx(1.2e-2)
    assert plan.learning_rate_at(512, 1e-3, 128) == pytest.approx(2.5e-4)


def test_a_step_grows_with_the_tokens_within_limits():
    sizes = [plan.step_tokens(tokens, 256) for tokens in (1e5, 1e6, 4e6, 2e7, 1e9, 1e12)]
    assert sizes == [1024, 1024, 1024, 8192, 262144, 524288]
    assert plan.step_tokens(1e5, 2048) == 2048  # at least one window


def test_the_law_of_this_text_comes_before_a_shipped_one_and_that_by_its_vocabulary(tmp_path):
    assert plan.choose_law(str(tmp_path), 65, 1000, plan.SHAPE)[0] == plan.LAWS["Tiny Shakespeare"]
    assert plan.choose_law(str(tmp_path), 4000, 1000, plan.SHAPE)[0] == plan.LAWS["amateur radio"]
    own = {"E": 1.0, "A": 2.0, "B": 3.0, "alpha": 0.5, "beta": 0.5}
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps({"law": own, "training_tokens": 1000, "model": plan.SHAPE}))
    law, which = plan.choose_law(str(tmp_path), 65, 1000, plan.SHAPE)
    assert law == own and "fitted to this text" in which
    assert plan.choose_law(str(tmp_path), 65, 999, plan.SHAPE)[0] != own  # another text
    path.write_text(json.dumps({"law": own, "training_tokens": 1000, "model": {**plan.SHAPE, "n_prev": 3}}))
    assert plan.choose_law(str(tmp_path), 65, 1000, plan.SHAPE)[0] != own  # another kind of model


def test_more_time_gives_a_larger_model_and_a_lower_loss(workspace, monkeypatch):
    """With a speed that is given instead of measured."""
    monkeypatch.setattr(plan.Planner, "measure", lambda self, model, config: (
        1e11 / plan.on_meta(model).flops_per_token(), 1e6))
    plans = []
    for minutes in (1, 30, 300):
        args = plan.command_line(["--minutes", str(minutes)], root=str(workspace.path))
        planner = plan.Planner(args)
        planner.text.n_tokens = 10_000_000
        found = planner.candidates()
        plans.append(min(found, key=lambda candidate: candidate.loss))
        assert found[-1].loss > plans[-1].loss  # it went on until the loss rose
    widths = [best.model.n_embd for best in plans]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    losses = [best.loss for best in plans]
    assert losses[0] > losses[1] > losses[2]


def test_a_text_that_is_too_short_for_the_time_is_not_learnt_by_heart(workspace, monkeypatch, capsys):
    monkeypatch.setattr(plan.Planner, "measure", lambda self, model, config: (1e7, 1e6))
    for minutes in (1, 100):
        args = plan.command_line(["--minutes", str(minutes)], root=str(workspace.path))
        plan.main(args)
        lines = capsys.readouterr().out.splitlines()
        result = json.loads(lines[-1])
        train = result["train"]
        steps = train["max_steps"]
        assert result["epochs"] <= 1.01 * plan.PASSES
        assert 0.9 * minutes < train["max_minutes"] < minutes
        is_short = result["minutes"] < 0.98 * minutes
        assert any("too short to use all of the time" in line for line in lines) == is_short
        if is_short:  # the steps end the run, also on a machine that is faster than was measured
            in_a_step = train["batch_size"] * train["gradient_accumulation_steps"] * 32
            assert steps == result["steps"] == pytest.approx(result["tokens"] / in_a_step, abs=1)
        else:
            assert steps == 0
    assert result["minutes"] < 50


def test_a_plan_is_measured_with_the_settings_that_it_writes(workspace, planned, monkeypatch):
    """Dropout, say, makes a step on a CPU 1.6 times as long."""
    workspace.configure("config_pretrain.json", dropout=0.3)
    measured = {}

    def measure(self, model, config):
        measured[model.n_embd] = config
        return 1e11 / plan.on_meta(model).flops_per_token(), 1e6

    monkeypatch.setattr(plan.Planner, "measure", measure)
    result = planned("--minutes", 1)
    config = measured[result["model"]["n_embd"]]
    for name in ("dropout", "optimizer", "batch_size", "gradient_accumulation_steps"):
        assert result["train"][name] == getattr(config, name), name
    vocab_size = Tokenizer.load(workspace.path / "dataset" / "tokenizer.json").vocab_size
    n = plan.on_meta(ModelConfig(**{**TINY, **result["model"], "vocab_size": vocab_size})).n_matmul_params()
    in_a_step = config.batch_size * config.gradient_accumulation_steps * TINY["block_size"]
    decay = plan.weight_decay_for(n, result["tokens"], result["tokens"] / result["epochs"],
                                  config.learning_rate, in_a_step)
    assert result["train"]["weight_decay"] == pytest.approx(decay, rel=0.05)


def test_a_model_that_could_learn_the_text_by_heart_is_not_chosen(workspace, monkeypatch):
    monkeypatch.setattr(plan.Planner, "measure", lambda self, model, config: (1e9, 1e6))
    planner = plan.Planner(plan.command_line(["--minutes", "60"], root=str(workspace.path)))
    planner.text.n_tokens = 100_000
    sizes = [plan.on_meta(candidate.model).n_matmul_params() for candidate in planner.candidates()]
    assert 200_000 < max(sizes) <= plan.MEMORISING * 100_000


def test_weight_decay_grows_where_a_model_could_memorise_the_text():
    def decay(n, tokens, unique=1e6, rate=4e-3, in_a_step=4096):
        return plan.weight_decay_for(n, tokens, unique, rate, in_a_step)

    assert decay(1e5, 1e6) == 0.1  # the text is read once
    assert decay(1e4, 10e6) == 0.1  # too small
    assert 0.1 < decay(1e6, 4e6) < decay(1e6, 8e6) < decay(2e6, 8e6)
    assert decay(1e7, 1e8) == decay(1e7, 2e8)  # forgetting faster would be learning less
    assert decay(1e5, 1e6, unique=1e4) == 4.0  # nor on a short text
    # What a pass over the text forgets stays the same with another learning rate or step.
    assert decay(2e6, 8e6, rate=2e-3) == pytest.approx(2 * decay(2e6, 8e6))
    assert decay(2e6, 8e6, in_a_step=8192) == pytest.approx(2 * decay(2e6, 8e6))


@pytest.mark.parametrize("words, message", [
    ([], "give --minutes"), (["--minutes", "0"], "--minutes 0.0: must be above 0"),
    (["--minutes", "0.1"], "must be at least 0.5"), (["--minutes", "nan"], "must be above 0"),
    (["--tokens", "-5"], "--tokens -5: must be above 0"),
    (["--tokens", "9" * 500], "99…: must be below 2**63"),
    (["--minutes", "1", "--dataset_path", '[["a.npy", "b.npy"]]'], "a.npy: no such file; run python data.py")
])
def test_mistakes_are_one_line(workspace, words, message):
    with pytest.raises(InputError) as error:
        plan.command_line(words, root=str(workspace.path))
    assert message in str(error.value)


def test_no_plan_predicts_a_loss_above_that_of_guessing(planned, workspace):
    result = planned("--tokens", 100)
    guessing = math.log(Tokenizer.load(workspace.path / "dataset" / "tokenizer.json").vocab_size)
    assert max(result["losses"].values()) <= guessing
    assert result["expected_loss"] == pytest.approx(guessing) and result["steps"] >= 1


def lines_of(workspace, capsys, *words, ladder=((1, 8), (1, 16), (1, 32)), measuring=1e9):
    """What plan.py prints, a list of lines, with a speed that is given instead of measured."""
    with mock.patch.multiple(plan, LADDER=ladder, MEASURING_SECONDS=measuring), \
            mock.patch.object(plan.Planner, "measure", lambda self, model, config: (1e7, 1e6)):
        plan.main(plan.command_line(list(map(str, words)), root=str(workspace.path)))
    return capsys.readouterr().out.splitlines()


def test_the_plan_of_another_text_s_law_says_so_and_that_of_this_text_s_does_not(workspace, capsys):
    says = [line for line in lines_of(workspace, capsys, "--tokens", 1000) if "text of another kind" in line]
    assert len(says) == 1
    loader = plan.PreparedText(plan.command_line(["--tokens", "1"], root=str(workspace.path)).train,
                               str(workspace.path), 32)
    (workspace.path / "scaling.json").write_text(json.dumps({
        "law": plan.LAWS["amateur radio"] | {"E": 0.5}, "training_tokens": loader.n_tokens,
        "model": plan.SHAPE}))
    assert not any("another text" in line for line in lines_of(workspace, capsys, "--tokens", 1000))


def test_the_star_is_explained_only_where_a_row_has_one(workspace, capsys):
    def stars(lines):
        return [sum("*" in line[:40] for line in lines if line[:5].strip()[:1].isdigit()),
                sum(line.startswith("* not timed") for line in lines)]

    assert stars(lines_of(workspace, capsys, "--tokens", 10**6)) == [0, 0]
    assert stars(lines_of(workspace, capsys, "--tokens", 10**6, measuring=-1)) == [2, 1]  # no time is left


def test_one_of_a_thing_is_not_written_in_the_plural(workspace, capsys):
    text = "\n".join(lines_of(workspace, capsys, "--tokens", 1, ladder=((1, 32),)))
    assert "1 layer, 32 wide, 1 head:" in text and "about 1 step, " in text


def test_with_memory_alone_one_line_says_what_limits_the_model(workspace, capsys):
    def limit(*words, **how):
        return [line for line in lines_of(workspace, capsys, *words, **how) if line.startswith("limit:")]

    assert limit("--tokens", 1000) == []
    assert "largest shape that plan.py tries" in limit("--memory_gb", 100)[0]
    assert "more than 6 parameters for each of its" in limit("--memory_gb", 100, ladder=((1, 8), (9, 512)))[0]
    config = ModelConfig(n_layer=1, n_embd=16, n_head=1, vocab_size=70, block_size=32, **plan.SHAPE)
    little = 1.05 * plan.memory_bytes(config, 32, is_half=True) / 1e9
    assert limit("--memory_gb", little) == ["limit:  the memory"]


def test_after_write_a_git_checkout_says_how_to_get_the_settings_back(workspace, capsys):
    def told(*words):
        return [line for line in lines_of(workspace, capsys, "--tokens", 1000, *words) if "git" in line]

    assert not told("--write")
    (workspace.path / ".git").mkdir()
    assert not told()
    assert told("--write")[0].endswith("git checkout model_config.json config_pretrain.json "
                                        "config_sft.json")


@pytest.mark.parametrize("words", [["--minutes", "1e9"], ["--minutes", "1e308"], ["--tokens", 2**63 - 1],
                                   ["--memory_gb", "1e308"], ["--tokens", 1]])
def test_extremes_are_planned_too(workspace, capsys, words):
    json.loads(lines_of(workspace, capsys, *words)[-1])


def test_a_plan_by_the_clock_is_one_that_the_text_ends_near_the_time(workspace, monkeypatch, capsys):
    """There a machine that slows down a little must still decay its learning rate to the end."""
    for tokens_per_second, by_steps in ((1e6, True), (1.05 * plan.PASSES * 1000 / 50, False)):
        monkeypatch.setattr(plan.Planner, "measure", lambda *_, speed=tokens_per_second: (speed, 1e6))
        args = plan.command_line(["--minutes", "1"], root=str(workspace.path))
        planner = plan.Planner(args)
        planner.text.n_tokens = 1000
        best = min(planner.candidates(), key=lambda candidate: candidate.loss)
        assert (plan.finish(best, planner)[1]["max_steps"] > 0) == by_steps


def test_all_files_of_a_plan_are_written_or_none(workspace, monkeypatch):
    names = ("model_config.json", "config_pretrain.json", "config_sft.json")
    before = [(workspace.path / name).read_bytes() for name in names]
    settings = {str(workspace.path / name): {"n_layer": 9} for name in names}
    settings[str(workspace.path / "gone" / "x.json")] = {}
    with pytest.raises(InputError, match="x.json: cannot be written"):
        plan.write(settings)
    assert before == [(workspace.path / name).read_bytes() for name in names]


def test_fine_tuning_follows_the_plan_with_half_of_its_rate(workspace, planned):
    result = planned("--tokens", 20_000, "--write")
    sft = json.loads((workspace.path / "config_sft.json").read_text())
    assert sft["learning_rate"] == result["train"]["learning_rate"] / 2


def test_a_time_that_starting_takes_is_refused(workspace, planned, monkeypatch):
    monkeypatch.setattr(plan, "STARTING_SECONDS", 29.0)
    with pytest.raises(InputError, match="--minutes 0.5: starting alone takes 29 s"):
        planned("--minutes", 0.5)


def test_passes_on_a_cpu_are_small_however_large_the_step(workspace):
    planner = plan.Planner(plan.command_line(["--tokens", "1"], root=str(workspace.path)))
    planner.text.n_rows = 10**6
    rows, passes = planner.split_step(planner.args.model, 2e9)
    assert rows * 32 == plan.CPU_TOKENS and rows * passes * 32 == 524288


def test_a_short_file_of_a_curriculum_makes_passes_smaller_and_not_the_step(workspace):
    planner = plan.Planner(plan.command_line(["--tokens", "1"], root=str(workspace.path)))
    planner.text.n_rows = 5
    for device in ("cpu", "cuda"):
        planner.device = torch.device(device)
        assert planner.split_step(planner.args.model, 8e6) == (4, 2048 // 32 // 4)
    # Less memory makes the step smaller on CUDA, where passes are joined again.
    planner.text.n_rows = 1000
    planner.memory = 1.01 * plan.memory_bytes(planner.args.model, 32 * 32, planner.is_half)
    assert planner.split_step(planner.args.model, 8e6) == (32, 1)


def test_a_time_that_no_calendar_has_is_no_time():
    assert plan.clock_after(1e300) is None and plan.clock_after(float("inf")) is None
    assert plan.clock_after(0).startswith("20")


def test_help_and_mistakes_need_no_torch(workspace):
    (workspace.path / "torch.py").write_text("raise SystemExit('torch was imported')")
    assert "--minutes" in workspace.run("plan.py", "--help").stdout
    assert "give --minutes" in workspace.run("plan.py", status=2).stderr
    both = workspace.run("plan.py", "--minutes", 1, "--tokens", 5, status=2).stderr
    assert "--tokens: not allowed with argument --minutes" in both and both.count("\n") == 1
