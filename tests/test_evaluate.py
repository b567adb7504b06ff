"""evaluate.py: loss, bits per character, exact match, multiple choice."""

import json
import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import PAIRS, TEXT, Workspace

import evaluate
from checkpoint import build_model, load
from corpus import text as data_text
from corpus.fingerprint import write_fingerprint
from documents import documents_of
from scoring import contamination, likelihood, multiple_choice
from tokenizer import SPECIAL_TOKENS, Tokenizer, encode_prompt

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
    marks = sum(int((ids[1:] == mark).sum()) for mark in (tokenizer.bos_id, tokenizer.eos_id))
    assert marks > 10 and got["characters"] == len(ids) - 1 - marks
    assert got["bits_per_character"] == pytest.approx(total / math.log(2) / got["characters"], rel=1e-4)


def test_prepared_files_of_both_kinds_are_scored(trained, capsys):
    text = scores(trained, capsys, "--data", "dataset/pretrain_val.npy")["data"]
    assert text["tokens"] == 599
    rows = scores(trained, capsys, "--data", "dataset/sft_val.npy")["data"]
    assert rows["tokens"] == 12 * 3  # a letter, a full stop, <|eos|>
    assert rows["loss"] < text["loss"]


def test_the_progress_bar_ends_at_the_total_that_it_began_with(trained, capsys):
    for words in (["--text", "text.txt"], ["--data", "dataset/pretrain_val.npy"],
                  ["--data", "dataset/sft_val.npy"]):
        capsys.readouterr()
        with trained.here("evaluate.py", "-m", SFT, *words):
            evaluate.main()
        done, total = re.findall(r"loss: 100%.* (\d+)/(\d+) ", capsys.readouterr().err)[-1]
        assert int(done) == int(total) > 0


def test_exact_match_counts_right_answers(trained, capsys):
    got = scores(trained, capsys, "--qa", "qa.jsonl")["qa"]
    assert (got["exact_match"], got["right"], got["questions"]) == (6 / 7, 6, 7)
    assert [got[name] for name in ("fewer_turns", "cut_questions", "no_room", "unknown_in_answer")] == \
        [0, 0, 0, 1]  # the vocabulary lacks two letters of "wrong"


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
    (["--qa", "gone.jsonl"], None, "gone.jsonl: no such file"),
    (["--qa", "bad"], b"", "bad: holds no rows"),
    (["--qa", "bad"], b'{"question": "a", "answer": "b"}\n{"question": "a"}\n',
     'bad, line 2: the key "answer" is missing'),
    (["--qa", "bad"], b'{"question": 1, "answer": "b"}\n', "bad, line 1: the question is not a string"),
    (["--qa", "bad"], b"[1]\n", "bad, "),
    (["--qa", "bad"], b"\xff\n", "not UTF-8"),
    (["--qa", "bad"], b'{"question": "a", "answer": "b"}\n{"question": ' + b"[" * 100_000,
     "bad, line 2: nested too deeply"),
    (["--qa", "bad"], '{"question": "电台", "answer": "是"}\n'.encode("gbk") * 9, "not UTF-8"),
    (["--data", "gone.npy"], None, "gone.npy: no such file"),
    (["--data", "bad"], b"no array", "bad: not a prepared .npy file"),
    (["--ceval", "checkpoint"], None, "checkpoint: holds no .csv files"),
    (["--ceval", "gone.csv"], None, "gone.csv: cannot be read"),
    (["--text", "text.txt", "--shots", "1"], None, "--shots and --dev belong to --ceval"),
    (["--text", "text.txt", "--contamination", "text.txt"], None, "--contamination looks for"),
    (["--qa", "qa.jsonl", "--contamination", "gone.txt"], None, "gone.txt: no such file"),
], ids=range(19))
def test_a_mistake_is_one_line(trained, words, content, message):
    if content is not None:
        (trained.path / "bad").write_bytes(content)
    assert message in trained.refused(evaluate.main, "-m", SFT, *words)


@pytest.mark.parametrize("content, message", [
    (b"id,question,A,B,C,answer\n0,q,a,b,c,A\n", "x.csv, line 1: needs the columns question, A, B, C, D"),
    (b"question,A,B,C,D,answer\nq,a,b,c,d,A\nq,a\n", "x.csv, line 3: needs the columns"),
    (b"question,A,B,C,D,answer\n\xff,a,b,c,d,A\n", "x.csv: not a CSV file in UTF-8"),
    (b"question,A,B,C,D,answer\n", "x.csv: holds no questions"),
    (b"question,A,B,C,D,answer\nq,a,b,c,d,\n", "x.csv, line 2: the answer is empty"),
    (b"question,A,B,C,D,answer\nq,a,b,c,d,A\nq,a,b,c,d,E\n", "x.csv, line 3: the answer is 'E'"),
    (b"question,A,B,C,D,answer\nq,a,b,c,d,1\n", "x.csv, line 2: the answer is '1'"),
    (b"question,A,B,C,D,answer\nq,a,b,c,d,AB\n", "x.csv, line 2: the answer is 'AB'")], ids=range(8))
def test_a_bad_csv_file_is_named_with_its_line(trained, tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    assert message in trained.refused(evaluate.main, "-m", SFT, "--ceval", tmp_path)


def test_ids_beyond_the_vocabulary_are_named(trained, tmp_path):
    np.save(tmp_path / "text.npy", np.full(100, 5000, np.uint16))
    np.save(tmp_path / "rows.npy", np.array([[5000, 1], [3, 1], [0, 0]], np.uint16))
    for name in ("text.npy", "rows.npy"):
        message = trained.refused(evaluate.main, "-m", SFT, "--data", tmp_path / name)
        assert f"{name}: holds token id 5000, beyond the model's vocabulary" in message


# ---- Loss ----

def score_with_words(tmp_path, monkeypatch, text, chunk):
    """The ids of `text`, read `chunk` bytes at a time with a vocabulary that holds words."""
    words = ["BD4SUR", "CQ CQ", "CQ", "Q D", "\n\n"]
    tokenizer = Tokenizer([*SPECIAL_TOKENS, *words, *sorted(set("BD4SURCQ K\nE"))], SPECIAL_TOKENS)
    (tmp_path / "words.txt").write_text(text)
    monkeypatch.setattr(data_text, "CHUNK_BYTES", chunk)
    pieces = list(evaluate.encode_pieces(tokenizer, str(tmp_path / "words.txt")))
    return tokenizer, np.concatenate(pieces), len(pieces)


@pytest.mark.parametrize("chunk", [1, 2, 7, 50, 10_000])
def test_a_text_read_in_pieces_has_the_ids_of_the_whole(tmp_path, monkeypatch, chunk):
    text = "<|bos|>CQ CQ CQ DE BD4SUR K\n\nBD4SU<|eos|>" * 7 + "CQ C"
    tokenizer, ids, n_pieces = score_with_words(tmp_path, monkeypatch, text, chunk)
    assert ids.tolist() == tokenizer.encode(text, allow_special=True).tolist()
    assert n_pieces > 1 or chunk == 10_000


def test_characters_of_words_marks_and_unknown_ones_are_counted():
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "a", "word"], SPECIAL_TOKENS)
    ids = tokenizer.encode("<|bos|>aword?<|eos|>", allow_special=True)
    assert evaluate.characters_of_ids(tokenizer)[ids].tolist() == [0, 1, 4, 1, 0]


@pytest.mark.parametrize("n", [2, 31, 32, 33, 32 * 16, 32 * 16 + 1, 32 * 16 + 2, 2000])
@pytest.mark.parametrize("size", [1, 100, 5000])
def test_windows_hold_every_id_but_the_first_once_as_a_target(n, size):
    ids = np.arange(n)
    batches = list(evaluate.window_batches(np.array_split(ids, -(-n // size)), 32, pad_id=0))
    assert len(batches) == evaluate.n_window_batches(n, 32)
    targets = np.concatenate([y[y != -1] for _, y in batches])
    inputs = np.concatenate([x[y != -1] for x, y in batches])
    assert targets.tolist() == list(range(1, n)) and inputs.tolist() == list(range(n - 1))


@pytest.mark.parametrize("kind", ["text", "data"])
def test_the_memory_of_scoring_does_not_grow_with_the_file(tmp_path, kind):
    """Python's own allocations while 4 and 16 M characters are cut into batches, without the model."""
    tokenizer = Tokenizer.build(["abcdefgh"])
    peaks = []
    for n in (1, 4):
        path = str(tmp_path / f"{n}")
        if kind == "text":
            with open(path, "w") as file:
                file.write("abcdefgh" * (n << 19))
        else:
            with open(path, "wb") as file:
                np.save(file, np.full(n << 22, 7, np.uint16))
        tracemalloc.start()
        pieces = evaluate.encode_pieces(tokenizer, path) if kind == "text" else \
            evaluate.read_ids(path, evaluate.open_array(path), tokenizer.vocab_size)
        for _ in evaluate.window_batches(pieces, 32, pad_id=0):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_documents_are_kept_apart_if_training_kept_them_apart(trained, capsys):
    checkpoint = load(trained.path / SFT)
    checkpoint["train_config"]["document_mask"] = True
    torch.save(checkpoint, trained.path / "checkpoint" / "masked.pt")
    with trained.here("evaluate.py", "-m", "checkpoint/masked.pt", "--text", "text.txt"):
        evaluate.main()
    masked = json.loads(capsys.readouterr().out.splitlines()[-1])["text"]
    model, tokenizer = build_model(checkpoint)
    loss = 0.0
    for x, y in evaluate.window_batches([tokenizer.encode(TEXT[:900], allow_special=True)], 32, 0):
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        with torch.no_grad():
            loss += float(model(x, y, documents=documents_of(x, tokenizer.bos_id, tokenizer.eos_id))[1]) * \
                int((y != -1).sum())
    assert masked["loss"] == pytest.approx(loss / masked["tokens"], rel=1e-5)
    assert abs(masked["loss"] - scores(trained, capsys, "--text", "text.txt")["text"]["loss"]) > 1e-3


def test_data_of_another_vocabulary_is_refused(trained, tmp_path):
    np.save(tmp_path / "other.npy", np.full(100, 7, np.uint16))
    write_fingerprint(str(tmp_path / "other.npy"), Tokenizer.build(["abc"]))
    message = trained.refused(evaluate.main, "-m", SFT, "--data", tmp_path / "other.npy")
    assert "other.npy: prepared with another vocabulary" in message


# ---- Questions and answers ----

def test_the_last_answer_of_a_conversation_is_scored_after_its_earlier_turns(trained, capsys, tmp_path):
    (q1, a1), (q2, a2) = PAIRS[:2]
    messages = [{"role": role, "content": text} for role, text in
                (("user", q1), ("assistant", a1), ("user", q2), ("assistant", a2))]
    rows = [{"messages": messages}, {"messages": messages[2:]}, {"instruction": q1, "output": a1}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = scores(trained, capsys, "--qa", tmp_path / "m.jsonl", "--show", 9)["qa"]
    assert got["questions"] == 3 and got["right"] >= 2
    assert evaluate.fit_prompt(tokenizer_of(trained), [(q1, a1)], q2, 100)[0].tolist() == \
        encode_prompt(tokenizer_of(trained), [(q1, a1)], q2).tolist()


def tokenizer_of(trained):
    return build_model(load(trained.path / SFT))[1]


def test_questions_without_room_are_cut_and_counted(trained, capsys, tmp_path):
    rows = [("after B" * 20, "A."), ("after B", "A." * 40), (*PAIRS[0],)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n"
                                              for q, a in rows))
    got = scores(trained, capsys, "--qa", tmp_path / "q.jsonl")["qa"]
    assert (got["questions"], got["cut_questions"], got["no_room"]) == (3, 1, 1)


# ---- Multiple choice ----

def write_csv(path, rows, header="id,question,A,B,C,D,answer"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return path


def bank_rows(n=24, key=str):
    """Questions whose right answers the trained model knows; the right option moves."""
    rows = []
    for i, (question, answer) in enumerate(PAIRS[:n]):
        options = ["Z.", "Z!", "Z?"]
        options.insert(i % 4, answer)
        rows.append([i, question, *options, key("ABCD"[i % 4])])
    return rows


@pytest.mark.parametrize("header", ["id,question,A,B,C,D,answer", ",Question,A,B,C,D,Answer"],
                         ids=["C-Eval", "CMMLU"])
@pytest.mark.parametrize("place", ["bank.csv", "val/bank_val.csv", "test/bank.csv"])
def test_a_model_that_knows_the_answers_scores_everything(trained, capsys, tmp_path, header, place):
    path = write_csv(tmp_path / place, bank_rows(), header)
    for given in {tmp_path, path}:
        got = scores(trained, capsys, "--ceval", given)["ceval"]
        assert (got["accuracy"], got["right"], got["questions"]) == (1.0, 24, 24)
        assert got["methods"]["summed"]["right"] == 24 and not got["within_chance"]
        assert got["interval"] == pytest.approx([0.862, 1.0], abs=1e-3)


@pytest.mark.parametrize("key", [str.lower, " {} ".format, "（{}）".format, "{}.".format,
                                 lambda letter: chr(ord(letter) + 0xFEE0)])
def test_keys_in_other_spellings_mean_the_same(trained, capsys, tmp_path, key):
    write_csv(tmp_path / "bank.csv", bank_rows(8, key))
    assert scores(trained, capsys, "--ceval", tmp_path)["ceval"]["accuracy"] == 1.0


def test_52_subjects_are_scored_one_by_one(trained, capsys, tmp_path):
    for i in range(52):
        write_csv(tmp_path / "val" / f"subject_{i}_val.csv", bank_rows(4))
        write_csv(tmp_path / "dev" / f"subject_{i}_dev.csv", [[*row, "why"] for row in bank_rows(5)],
                  "id,question,A,B,C,D,answer,explanation")
    got = scores(trained, capsys, "--ceval", tmp_path)["ceval"]
    assert len(got["subjects"]) == 52 and set(got["subjects"].values()) == {1.0} and got["questions"] == 208
    shown = scores(trained, capsys, "--ceval", tmp_path, "--shots", 1)["ceval"]
    assert shown["shots"] == 1 and shown["questions"] == 208


def test_examples_are_asked_for_by_their_folder(trained, tmp_path):
    write_csv(tmp_path / "bank.csv", bank_rows(4))
    message = trained.refused(evaluate.main, "-m", SFT, "--ceval", tmp_path, "--shots", 2)
    assert "--shots needs a folder dev" in message
    write_csv(tmp_path / "dev" / "bank_dev.csv", bank_rows(1))
    message = trained.refused(evaluate.main, "-m", SFT, "--ceval", tmp_path, "--shots", 2)
    assert "bank_dev.csv: holds 1 examples, fewer than --shots 2" in message
    message = trained.refused(evaluate.main, "-m", SFT, "--ceval", tmp_path, "--shots", 2, "--dev", tmp_path)
    assert "the examples would be the scored questions themselves" in message


def test_options_that_cannot_be_told_from_each_other_tie_and_are_counted(trained, capsys, tmp_path):
    rows = [[0, "after B", "中", "文", "电", "台", "A"], [1, "after B", "Z.", "Z.", "?.", "?.", "A"],
            [2, *PAIRS[0], "Z.", "Z!", "Z?", "A"]]
    write_csv(tmp_path / "bank.csv", rows)
    got = scores(trained, capsys, "--ceval", tmp_path)["ceval"]
    assert (got["right"], got["unknown_in_options"], got["unknown_in_question"]) == (1, 1, 0)
    assert got["ties"] == 2


def test_long_questions_lose_their_beginning_and_long_options_have_no_room(trained, capsys, tmp_path):
    question, answer = PAIRS[0]
    write_csv(tmp_path / "bank.csv", [[0, "the letter " * 9 + question, answer, "Z.", "Z!", "Z?", "A"],
                                      [1, question, answer, "Z" * 40, "Z!", "Z?", "A"]])
    got = scores(trained, capsys, "--ceval", tmp_path)["ceval"]
    assert (got["cut_questions"], got["no_room"], got["questions"]) == (1, 1, 2)


def test_likelihoods_side_by_side_equal_those_one_by_one(tiny_model):
    model = tiny_model()
    rng = np.random.default_rng(0)
    contexts = [rng.integers(6, 50, rng.integers(1, 20)) for _ in range(40)]
    answers = [rng.integers(6, 50, rng.integers(1, 9)) for _ in range(40)]
    got = likelihood.log_likelihoods(model, contexts, answers, pad_id=0)
    for context, answer, value in zip(contexts, answers, got, strict=True):
        ids = torch.from_numpy(np.concatenate([context, answer]))
        with torch.no_grad():
            logp = model(ids[None, :-1])[0][0].log_softmax(-1)
        expected = logp[torch.arange(len(ids) - 1), ids[1:]][len(context) - 1:].sum()
        assert value == pytest.approx(float(expected), rel=1e-4)


class KnowsLetters(torch.nn.Module):
    """Stands for a model that has learnt a key by heart: after a prompt, its letter is likeliest."""

    def __init__(self, keys, vocab_size):
        super().__init__()
        self.keys = keys  # bytes of a prompt's ids -> id of the letter
        self.vocab_size = vocab_size
        self.device = torch.device("cpu")

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, self.vocab_size)
        for row, line in enumerate(ids.tolist()):
            for end in range(1, len(line) + 1):
                if tuple(line[:end]) in self.keys:
                    logits[row, end - 1, self.keys[tuple(line[:end])]] = 5.0
        return logits, None


def test_the_letter_after_each_prompt_is_read_whatever_its_length():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 50, n) for n in (3, 9, 5, 5, 30)]
    keys = {tuple(prompt.tolist()): 6 + i % 4 for i, prompt in enumerate(prompts)}
    got = likelihood.letter_logits(KnowsLetters(keys, 50), prompts, [6, 7, 8, 9], pad_id=0)
    assert got.argmax(1).tolist() == [0, 1, 2, 3, 0]


def test_the_interval_is_wilsons():
    """23 of 80: Newcombe's formula by hand."""
    assert multiple_choice.wilson_interval(23, 80) == pytest.approx([0.1998, 0.3946], abs=1e-3)
    assert multiple_choice.wilson_interval(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert multiple_choice.wilson_interval(10, 10) == pytest.approx([0.7225, 1], abs=1e-4)


def test_a_tie_of_lengths_shares_a_point():
    question = multiple_choice.Question("s", "q", ("aa", "bb", "c", "d"), 0)
    assert multiple_choice.length_baseline([question], max) == 0.5
    assert multiple_choice.length_baseline([question], min) == 0


# ---- Contamination ----

HELD_OUT = [("俗称的10米业余波段的频率范围以及使用状态分别为：", "28-29.7MHz，专用"),
            ("用指针式万用电表测量一个常用元件，表针挥动后回到零点，推论是：", "该元件可能是电解电容器"),
            ("QTH？", "位置")]


@pytest.mark.parametrize("text, expected", [
    ("前文。俗称的10米业余波段的频率范围，以及使用状态分别为 28MHz。", {0: "exact"}),
    ("俗称的１０米业余波段的频率范围以及使用状态分别为", {0: "exact"}),
    ("俗称的10米业余波段的频率范围是什么？使用状态又如何", {0: "near"}),
    ("拿指针式万用电表测元件，表针挥动后回到零点：该元件可能是电解电容器", {1: "paraphrase"}),
    ("拿万用电表测元件，表针回到零点，该元件坏了", {}),
    ("QTH", {}), ("QTH的意思是位置", {2: "exact"}), ("", {}), ("今天天气很好", {})], ids=range(9))
def test_copies_near_copies_and_paraphrases_are_found(text, expected):
    assert contamination.QuestionIndex(HELD_OUT).find(text) == expected


def test_contamination_counts_the_scored_questions(trained, capsys, tmp_path):
    write_csv(tmp_path / "bank.csv", [[0, *HELD_OUT[0], "a", "b", "c", "A"],
                                      [1, "天气?", "a", "b", "c", "d", "B"]])
    (tmp_path / "train.txt").write_text("一行\n" + "长" * 3000 + "。" + HELD_OUT[0][0] + "\n")
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "天气", "answer": "b"}) + "\n")
    got = scores(trained, capsys, "--ceval", tmp_path, "--contamination", tmp_path / "train.txt",
                 tmp_path / "train.jsonl")["contamination"]
    assert (got["questions"], got["exact"], got["near"], got["contaminated"]) == (2, 2, 0, 1.0)
