"""evaluate.py: loss, bits per character, exact match, multiple choice."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import PAIRS, TEXT, Workspace

import evaluate
from checkpoint import build_model, load

SFT = "checkpoint/sft_last.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace whose model knows the sample pairs by heart."""
    workspace = Workspace(tmp_path_factory.mktemp("scores"))
    workspace.train("-t", "sft", "--from_checkpoint", "", "--max_steps", 150, "--learning_rate", 1e-2,
                    "--eval_interval", 1000, "--batch_size", 16, "--gradient_accumulation_steps", 1)
    (workspace.path / "text.txt").write_text(TEXT[:900])
    (workspace.path / "qa.jsonl").write_text("".join(
        json.dumps({"question": q, "answer": a}) + "\n" for q, a in [*PAIRS[:6], ("after B", "wrong")]))
    return workspace


@pytest.fixture(scope="module")
def model_and_tokenizer(trained):
    return build_model(load(trained.path / SFT))


def scores(trained, capsys, *words):
    capsys.readouterr()
    with trained.here("evaluate.py", "-m", SFT, *words):
        evaluate.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_text_loss_counts_every_token_but_the_first_once(trained, capsys, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    got = scores(trained, capsys, "--text", "text.txt")["text"]
    ids = torch.from_numpy(tokenizer.encode(TEXT[:900], allow_special=True).astype(np.int64))
    total = 0.0
    for i in range(0, len(ids) - 1, 32):
        x, y = ids[:-1][i : i + 32], ids[1:][i : i + 32]
        total -= model(x[None])[0][0].log_softmax(-1)[torch.arange(len(y)), y].sum().item()
    assert got["tokens"] == len(ids) - 1
    assert got["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    assert got["bits_per_character"] == pytest.approx(got["loss"] / math.log(2))


def test_prepared_files_of_both_kinds_are_scored(trained, capsys):
    text = scores(trained, capsys, "--data", "dataset/pretrain_val.npy")["data"]
    assert text["tokens"] == 599
    rows = scores(trained, capsys, "--data", "dataset/sft_val.npy")["data"]
    assert rows["tokens"] == 12 * 3  # a letter, a full stop, <|eos|>
    assert rows["loss"] < text["loss"]


def test_exact_match_counts_right_answers(trained, capsys):
    got = scores(trained, capsys, "--qa", "qa.jsonl")["qa"]
    assert got == {"exact_match": 6 / 7, "right": 6, "questions": 7}


def test_int8_weights_answer_as_well_with_a_loss_that_differs_a_little(trained, capsys):
    whole = scores(trained, capsys, "--qa", "qa.jsonl", "--data", "dataset/sft_val.npy")
    small = scores(trained, capsys, "--qa", "qa.jsonl", "--data", "dataset/sft_val.npy", "--int8")
    assert small["qa"] == whole["qa"]
    assert 0 < abs(small["data"]["loss"] - whole["data"]["loss"]) < 0.1


def test_multiple_choice_takes_the_likeliest_option(trained, capsys):
    folder = trained.path / "ceval"
    folder.mkdir()
    rows = [f"{i},{PAIRS[i][0]},X.,{PAIRS[i][1]},Q.,?.,{'B' if i else 'A'}\n" for i in range(4)]
    (folder / "letters.csv").write_text("id,question,A,B,C,D,answer\n" + "".join(rows))
    got = scores(trained, capsys, "--ceval", "ceval")["ceval"]
    assert (got["right"], got["questions"], got["accuracy"]) == (3, 4, 0.75)
    assert got["subjects"] == {"letters": 0.75}


@pytest.mark.parametrize("words, content, message", [
    ([], None, "nothing to score"),
    (["--text", "gone.txt"], None, "gone.txt: cannot be read"),
    (["--text", "bad"], b"abc\xff", "bad: not UTF-8 at byte 3"),
    (["--text", "bad"], b"", "bad: too short to score"),
    (["--qa", "gone.jsonl"], None, "gone.jsonl: cannot be read"),
    (["--qa", "bad"], b"", "bad: holds no pairs"),
    (["--qa", "bad"], b'{"question": "a", "answer": "b"}\n{"question": "a"}\n', "bad, line 2: must be"),
    (["--qa", "bad"], b'{"question": 1, "answer": "b"}\n', "bad, line 1: must be"),
    (["--qa", "bad"], b"[1]\n", "bad, line 1: must be"),
    (["--qa", "bad"], b"\xff\n", "must be"),
    (["--data", "gone.npy"], None, "gone.npy: no such file"),
    (["--data", "bad"], b"no array", "bad: not a prepared .npy file"),
    (["--ceval", "checkpoint"], None, "checkpoint: holds no .csv files"),
], ids=range(13))
def test_a_mistake_is_one_line(trained, words, content, message):
    if content is not None:
        (trained.path / "bad").write_bytes(content)
    assert message in trained.refused(evaluate.main, "-m", SFT, *words)


@pytest.mark.parametrize("content, message", [
    (b"id,question,A,B,C,answer\n0,q,a,b,c,A\n", "x.csv, line 2: needs the columns question, A, B, C, D"),
    (b"question,A,B,C,D,answer\nq,a,b,c,d,A\nq,a\n", "x.csv, line 3: needs the columns"),
    (b"question,A,B,C,D,answer\n\xff,a,b,c,d,A\n", "x.csv: not a CSV file in UTF-8"),
    (b"question,A,B,C,D,answer\n", "x.csv: holds no questions")], ids=range(4))
def test_a_bad_csv_file_is_named_with_its_line(trained, tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    assert message in trained.refused(evaluate.main, "-m", SFT, "--ceval", tmp_path)


def test_ids_beyond_the_vocabulary_are_named(trained, tmp_path):
    np.save(tmp_path / "text.npy", np.full(100, 5000, np.uint16))
    np.save(tmp_path / "rows.npy", np.array([[5000, 1], [3, 1], [0, 0]], np.uint16))
    for name in ("text.npy", "rows.npy"):
        message = trained.refused(evaluate.main, "-m", SFT, "--data", tmp_path / name)
        assert f"{name}: holds token id 5000, beyond the model's vocabulary" in message
