"""The problem lab: right answers, an honest split, targets on answers alone, scores, bad input."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO

import problem
from config import IGNORE_INDEX
from problem import TASKS, ProblemLoader, read_input, sample_inputs, score
from problems.logic import evaluate
from script import InputError
from tokenizer import Tokenizer

TINY = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--device", "cpu"]


def defaults(name, **values):
    return {**{key: default for key, (default, _) in TASKS[name].settings.items()}, **values}


def loader(name, seed=0, split="training", batch_size=20, **values):
    task = TASKS[name]
    tokenizer = Tokenizer.build([task.vocabulary, "="])
    is_causal = task.model.get("is_causal", True)
    return ProblemLoader(task, defaults(name, **values), tokenizer, is_causal, batch_size, seed, split)


def inputs(loader, batches):
    """The inputs of a loader's batches, as strings."""
    texts = []
    for x, _ in batches:
        texts += [re.sub(r"<\|\w+\|>", "", loader.tokenizer.decode(row)).split("=")[0] for row in x]
    return texts


@pytest.mark.parametrize("name, text, answer", [
    ("q", "114515", "0"), ("q", "8086", "6"), ("q", "0", "1"), ("q", "88888888", "16"),
    ("sort", "114515", "111455"), ("palindrome", "123456", "654321"),
    ("bool", "(+(*01)(*11))", "1"), ("bool", "(*(+01)0)", "0"), ("bool", "1", "1")])
def test_answers_are_those_of_the_examples(name, text, answer):
    assert TASKS[name].answer(text) == answer


def python_value(text):
    """The value of an expression by Python itself, which reads it rewritten as calls of max and min."""
    return eval(TASKS["bool"].show(text).replace("(+ ", "max(").replace("(* ", "min(").replace(" ", ", "))


def test_an_expression_has_the_value_that_python_finds():
    for text in TASKS["bool"].generate(np.random.default_rng(1), 300, defaults("bool")):
        assert evaluate(text)[0] == python_value(text), text


def test_every_closing_bracket_is_labelled_with_the_value_of_what_it_closes():
    text = "(+(*01)(*(+00)1))"
    assert evaluate(text)[2] == [(6, 0), (13, 0), (15, 0), (16, 0)]
    for text in TASKS["bool"].generate(np.random.default_rng(2), 100, defaults("bool")):
        closed = evaluate(text)[2]
        assert [at for at, _ in closed] == [at for at, character in enumerate(text) if character == ")"]
        for at, value in closed:
            parts = (text[i:at + 1] for i in range(at, -1, -1))
            assert python_value(next(part for part in parts if part.count("(") == part.count(")"))) == value


def test_expressions_keep_to_depth_and_length_and_reach_both():
    texts = TASKS["bool"].generate(np.random.default_rng(3), 5000, defaults("bool"))
    assert {evaluate(text)[1] for text in texts} == {1, 2, 3, 4}
    assert max(map(len, texts)) == 61
    texts = TASKS["bool"].generate(np.random.default_rng(3), 1000, defaults("bool", depth=5, length=40))
    assert max(map(len, texts)) <= 38 and max(evaluate(text)[1] for text in texts) == 5


@pytest.mark.parametrize("generator", ["generate", "practice"])
def test_numbers_lie_between_the_limits_and_have_every_number_of_digits(generator):
    numbers = getattr(TASKS["q"], generator)
    texts = numbers(np.random.default_rng(0), 3000, {"min_number": 7, "max_number": 1203})
    assert all(7 <= int(text) <= 1203 and text == str(int(text)) for text in texts)
    assert {len(text) for text in texts} == {1, 2, 3, 4}


def test_only_training_draws_the_practice_inputs_and_they_have_the_high_counts():
    task, counts = TASKS["q"], {}
    for split in ("training", "validation", "test"):
        texts = sample_inputs(task, defaults("q"), np.random.default_rng(0), 10_000, split)
        counts[split] = sum(int(task.answer(text)) >= 11 for text in texts)
    assert counts["training"] > 300 > 30 > counts["validation"] + counts["test"]


@pytest.mark.parametrize("name", TASKS)
def test_training_validation_and_test_inputs_never_meet(name):
    sides = [set(inputs(rows, [rows.next_batch() for _ in range(60)]))
             for seed in (0, 1) for rows in [loader(name, seed, "training")]]
    rows = loader(name, 0, "validation")
    validation = set(inputs(rows, rows.fixed_batches(60)))
    rng = np.random.default_rng(0)
    test = set(sample_inputs(TASKS[name], defaults(name), rng, 3000, "test", distinct=True))
    assert len(test) == 3000
    for training in sides:
        assert not training & test and not training & validation
    assert not validation & test


@pytest.mark.parametrize("name", ["sort", "palindrome"])
def test_full_attention_has_the_answer_as_target_in_the_input_s_place(name):
    rows = loader(name)
    x, y = rows.next_batch()
    assert x.shape == y.shape == (20, 6) and x.dtype == y.dtype == np.int64
    for text, answer in zip(x, y, strict=True):
        assert rows.tokenizer.decode(answer) == TASKS[name].answer(rows.tokenizer.decode(text))


@pytest.mark.parametrize("name, values", [("q", {}), ("bool", {"label_subexpressions": False})])
def test_a_causal_row_has_targets_on_the_answer_and_its_end_alone(name, values):
    rows = loader(name, **values)
    for x, y in [rows.next_batch() for _ in range(5)]:
        for ids, targets in zip(x, y, strict=True):
            text, _, answer = re.sub(r"<\|\w+\|>", "", rows.tokenizer.decode(ids)).partition("=")
            assert answer == TASKS[name].answer(text)
            assert (targets[:len(text)] == IGNORE_INDEX).all()
            assert list(targets[len(text):len(text) + len(answer)]) == list(rows.tokenizer.encode(answer))
            assert targets[len(text) + len(answer)] == rows.tokenizer.eos_id
            assert (targets[len(text) + len(answer) + 1:] == IGNORE_INDEX).all()


def test_labelled_subexpressions_add_targets_at_brackets_and_nothing_else():
    plain, labelled = (loader("bool", label_subexpressions=labels) for labels in (False, True))
    (x, y), (x_labelled, y_labelled) = plain.next_batch(), labelled.next_batch()
    brackets = x == plain.tokenizer.stoi[")"]
    assert (x == x_labelled).all() and (y == y_labelled)[~brackets].all()
    assert (y[brackets] == IGNORE_INDEX).all() and (y_labelled[brackets] != IGNORE_INDEX).all()


def test_batches_depend_on_the_seed_alone_and_go_on_from_a_state():
    first, again, other = loader("bool", 5), loader("bool", 5), loader("bool", 6)
    batches = [first.next_batch() for _ in range(45)]
    for x, y in batches[:30]:
        x2, y2 = again.next_batch()
        assert (x == x2).all() and (y == y2).all()
    resumed = loader("bool", 5)
    resumed.load_state_dict(again.state_dict())
    for x, y in batches[30:]:
        x2, y2 = resumed.next_batch()
        assert (x == x2).all() and (y == y2).all()
    assert other.next_batch()[0].tolist() != batches[0][0].tolist()


def test_settings_without_any_test_input_are_refused():
    with pytest.raises(InputError, match="min_number 1, max_number 1 there are no test inputs"):
        sample_inputs(TASKS["q"], {"min_number": 1, "max_number": 1}, np.random.default_rng(0), 10, "test")
    with pytest.raises(InputError, match="max_number 3: must be"):
        TASKS["q"].generate(np.random.default_rng(0), 10, {"min_number": 4, "max_number": 3})
    with pytest.raises(InputError, match="length 0"):
        TASKS["sort"].generate(np.random.default_rng(0), 10, {"length": 0})


def test_the_score_is_the_share_of_exact_matches(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(problem, "TEST_INPUTS", 400)
    rows = loader("sort", length=3)
    model = tiny_model(vocab_size=rows.tokenizer.vocab_size, block_size=3, is_causal=False)
    texts = sample_inputs(TASKS["sort"], rows.settings, np.random.default_rng(0), 400, "test", distinct=True)
    ids = torch.from_numpy(np.stack([rows.tokenizer.encode(text) for text in texts]).astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):  # some right, some wrong
        x, y = map(torch.from_numpy, rows.next_batch())
        optimizer.zero_grad()
        model(x, y)[1].backward()
        optimizer.step()
    with torch.no_grad():
        got = [rows.tokenizer.decode(row) for row in model(ids)[0].argmax(-1)]
    right, n = score(TASKS["sort"], model, rows.tokenizer, rows.settings, show=2)
    assert n == len(texts) < 400
    assert right == sum(answer == "".join(sorted(text)) for text, answer in zip(texts, got, strict=True))
    printed = capsys.readouterr().out
    assert f"only {n} distinct inputs" in printed
    assert printed.count("right:") == min(2, right) and printed.count("wrong:") == min(2, n - right)


@pytest.mark.parametrize("name, typed, message", [
    ("sort", "11x515", "'x'"), ("sort", "1145", "4 digits, but the model was trained on 6"),
    ("sort", "1", "1 digit, but the model was trained on 6"),
    ("q", "-1", "'-'"), ("q", "007", "leading zeros"), ("q", "100000000", "from 0 to 99999999"),
    ("bool", "(+ 0 1", "not one whole expression"), ("bool", "(+ 0 1))", "character 6 does not close"),
    ("bool", "(0 1)", "character 4 does not close"), ("bool", "(+ 0 1 1)", "character 6 does not close"),
    ("bool", "1", "depth 0"), ("bool", "(+ 0 1) (+ 0 1)", "not one whole expression"),
    ("bool", "(+(+(+(+(+ 0 1) 1) 1) 1) 1)", "depth 5"), ("bool", "=", "empty"), ("q", "８", "'８'")])
def test_bad_input_gets_one_clear_line(name, typed, message):
    with pytest.raises(InputError) as error:
        read_input(TASKS[name], defaults(name), typed)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_spaces_and_the_equals_sign_make_no_difference():
    text = "(+ (* 0 1) (* 1 1))"
    for typed in (text, text + " =", text.replace(" ", ""), " " + text.replace(" ", "  ") + "="):
        assert read_input(TASKS["bool"], defaults("bool"), typed) == "(+(*01)(*11))"
    assert TASKS["bool"].show("(+(*01)(*11))") == text


def test_a_problem_is_trained_scored_reopened_and_asked(workspace):
    words = ["problem.py", "sort", "--length", 2, *TINY]
    trained = workspace.run(*words, "--max_steps", 60, "--warmup_iters", 5, "--eval_interval", 30)
    result = json.loads(trained.stdout.splitlines()[-1])
    assert result["task"] == "sort" and result["steps"] == 60 and result["seed"] == 1337
    assert result["accuracy"] == result["right"] / result["inputs"] and 0 < result["inputs"] < 30
    assert result["parameters"] > 3000 and result["seconds"] > 0 and "test:" in trained.stderr
    checkpoint = workspace.load("sort_best.pt")
    assert checkpoint["task"] == "sort" and checkpoint["dataloader"]["settings"] == {"length": 2}

    again = workspace.run("problem.py", "sort", "--eval_only", "-m", "checkpoint/sort_last.pt")
    again = json.loads(again.stdout.splitlines()[-1])
    assert {**again, "seconds": 0} == {**result, "seconds": 0}

    asked = workspace.run("problem.py", "sort", "-i", stdin="31\n3 1\n1x\n\n312\n31", status=2)
    answers = asked.stdout.splitlines()
    assert len(answers) == 3 and len(set(answers)) == 1 and len(answers[0]) == 2
    assert [line.split(":")[1] for line in asked.stderr.splitlines()] == [" 1x", " 312"]

    for words, message in ([["sort", "--eval_only", "--length", 9], "train with --block_size 9"],
                           [["q", "--eval_only", "-m", "checkpoint/sort_last.pt"], "of sort, not of q"],
                           [["q", "--eval_only"], "no such file"],
                           [["sort", "--depth", 3], "unrecognized arguments: --depth"],
                           [["sort", "--n_head", 3], "n_embd 64 is not divisible by n_head 3"],
                           [["srot"], "invalid choice: 'srot'"],
                           [["--eval_only", "sort"], "the task comes first"]):
        refused = workspace.run("problem.py", *words, status=2)
        assert message in refused.stderr and refused.stderr.count("\n") == 1


def test_training_interrupted_and_continued_is_training_in_one_go(workspace):
    schedule = ["--batch_size", 8, "--eval_interval", 20, "--warmup_iters", 2, "--lr_decay_iters", 40]
    fresh = ["problem.py", "bool", "--depth", 2, "--length", 30, *TINY, *schedule, "--max_steps"]
    workspace.run(*fresh, 40)
    whole = workspace.load("bool_last.pt")
    workspace.run(*fresh, 25)
    half = workspace.load("bool_last.pt")
    assert half["step"] == 25 and half["dataloader"]["rows"] == 200
    continued = workspace.run("problem.py", "bool", "--from_checkpoint", "checkpoint/bool_last.pt",
                              "--device", "cpu", *schedule, "--max_steps", 40)
    assert json.loads(continued.stdout.splitlines()[-1])["settings"]["depth"] == 2
    after = workspace.load("bool_last.pt")
    assert after["step"] == whole["step"] == 40
    for name, weight in whole["model"].items():
        assert torch.equal(weight, after["model"][name]), name


def test_help_names_the_task_s_own_flags_and_defaults_and_needs_no_torch(workspace):
    (workspace.path / "torch.py").write_text("raise SystemExit('torch was imported')")
    text = " ".join(workspace.run("problem.py", "bool", "--help").stdout.split())
    assert "--depth INT deepest nesting of an expression (default 4)" in text
    assert "use_rope [BOOL]" in text and f"(default {TASKS['bool'].model['n_layer']})" in text
    assert "--depth" not in workspace.run("problem.py", "sort", "--help").stdout
    assert "sort,palindrome" in workspace.run("problem.py", "--help").stdout


def test_the_documented_new_task_runs(workspace):
    page = (REPO / "docs" / "problems.md").read_text(encoding="utf-8")
    new_file, lines = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    importing, entry = [line for line in lines.splitlines() if line]
    (workspace.path / "problems" / "roman.py").write_text(new_file, encoding="utf-8")
    script = workspace.path / "problem.py"
    text = script.read_text(encoding="utf-8")
    text = text.replace("\nTASKS = {\n", f"{importing}\n\nTASKS = {{\n{entry}\n")
    script.write_text(text, encoding="utf-8")
    run = workspace.run("problem.py", "roman", *TINY, "--max_steps", 3, "--warmup_iters", 1)
    assert json.loads(run.stdout.splitlines()[-1])["task"] == "roman"


def test_mistakes_are_answered_before_torch_is_imported(workspace):
    (workspace.path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for words, message in ((["sort", "--length", 0], "length 0: must be at least 1"),
                           (["q", "--min_number", 9, "--max_number", 3], "must be from 0 up, in order"),
                           (["bool", "--depth", 0], "depth 0"),
                           (["q", "--max_number", 5], "no test inputs; allow more inputs with "
                                                      "--min_number, --max_number"),
                           (["sort", "--n_head", 3], "n_embd 64 is not divisible by n_head 3"),
                           (["sort", "--batch_size", 0], "batch_size is 0, but must be at least 1"),
                           (["q", "-i"], "train a model first: python problem.py q"),
                           (["q", "--eval_only", "-m", "nowhere.pt"], "nowhere.pt: no such file")):
        refused = workspace.run("problem.py", *words, status=2)
        assert message in refused.stderr and refused.stderr.count("\n") == 1


ONE_STEP = ["--max_steps", 1, "--warmup_iters", 0]


def test_input_that_is_no_text_is_refused_line_by_line(workspace):
    workspace.run("problem.py", "sort", "--length", 2, *TINY, *ONE_STEP)
    for encoding, typed in (("utf-8", b"\xef\xbb\xbf31\r\n\xff1\n\xe4\xbd\xa0\n13\n"),
                            ("ascii", b"31\n\xff1\n\xe4\xbd\xa0\n13\n"),
                            ("cp1252", b"31\n\xff1\n\x81\n13\n")):
        asked = subprocess.run([sys.executable, "problem.py", "sort", "-i"], cwd=workspace.path, input=typed,
                               capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert asked.returncode == 2 and b"Traceback" not in asked.stderr
        assert len(asked.stdout.splitlines()) == 2
        assert asked.stderr.count(b"the only characters are 0 1 2") == asked.stderr.count(b"\n") == 2


@pytest.mark.skipif(os.name == "nt", reason="uses a shell's <&-")
def test_a_closed_input_ends_like_an_empty_one(workspace):
    workspace.run("problem.py", "sort", "--length", 2, *TINY, *ONE_STEP)
    closed = subprocess.run(f'"{sys.executable}" problem.py sort -i <&-', shell=True, cwd=workspace.path,
                            capture_output=True, text=True)
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")
