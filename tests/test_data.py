import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
from corpus import forms as data_json
from corpus import text as data_text
from corpus.forms import parse_row
from corpus.inputs import TEXT, Source
from corpus.split import Counts, NpyWriter
from script import InputError
from tokenizer import SPECIAL_TOKENS, Tokenizer

DOCUMENTS = [f"<|bos|>Document {n}: {'abcdefgh' * (n % 7 + 1)}。第{n}篇。<|eos|>\n" for n in range(200)]
PAIRS = [{"question": f"question {n}", "answer": f"answer {n}."} for n in range(60)]
PAIR_LINES = "\n".join(map(json.dumps, PAIRS))


def write_text(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_rows(path, rows):
    return write_text(path, "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def conversation(*texts):
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


class Prepared:
    """What data.py wrote: the tokenizer, text and rows as strings, the numbers that it printed."""

    def __init__(self, folder, stdout):
        self.folder = folder
        self.tokenizer = Tokenizer.load(str(folder / "tokenizer.json"))
        self.result = json.loads(stdout.splitlines()[-1])

    def array(self, name):
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def text(self, name):
        return self.tokenizer.decode(self.array(name))

    def rows(self, name):
        """The rows of an instruction file, each (ids, mask), with the <|Padding|> at its end."""
        rows = np.array(self.array(name))
        ends = np.flatnonzero(rows[:, 0] == 0) + 1
        assert ends[-1] == len(rows)
        return [(row[:, 0], row[:, 1]) for row in np.split(rows, ends[:-1])]

    def row_texts(self):
        return [self.tokenizer.decode(ids) for name in ("sft_train", "sft_val") for ids, _ in self.rows(name)]


@pytest.fixture
def prepare(tmp_path, capsys):
    """Run data.py in this process; returns what it wrote."""
    def run(*words, block_size=16, out="out"):
        data.main([*map(str, words), "--block_size", str(block_size), "--out", str(tmp_path / out)])
        return Prepared(tmp_path / out, capsys.readouterr().out)
    return run


def run_script(*words):
    return subprocess.run([sys.executable, data.__file__, *map(str, words)], capture_output=True, text=True)


# ---- Text ----

def test_validation_and_training_share_no_document_and_lose_none(prepare, tmp_path):
    prepared = prepare("--pretrain", write_text(tmp_path / "a.txt", "".join(DOCUMENTS)))
    training, validation = (
        [text + "<|eos|>" for text in prepared.text(f"pretrain_{side}").split("<|eos|>\n")[:-1]]
        for side in ("train", "val"))
    assert sorted(training + validation) == sorted(document.strip() for document in DOCUMENTS)
    assert not set(training) & set(validation)
    assert 1 <= len(validation) <= 30
    assert prepared.result["pretrain"][0]["validation"]["documents"] == len(validation)


def test_equal_documents_fall_to_the_same_side(prepare, tmp_path):
    text = "".join(DOCUMENTS) + "".join(reversed(DOCUMENTS)).strip()
    prepared = prepare("--pretrain", write_text(tmp_path / "a.txt", text))
    training, validation = ({document.strip() for document in prepared.text(name).split("<|bos|>")[1:]}
                            for name in ("pretrain_train", "pretrain_val"))
    assert validation and not training & validation
    assert len(training) + len(validation) == len(DOCUMENTS)


def test_spans_of_unmarked_text_cover_every_token_once(prepare, tmp_path):
    text = "".join(chr(0x4E00 + n) for n in range(5000))  # no character twice, so each position is known
    prepared = prepare("--pretrain", write_text(tmp_path / "a.txt", text))
    training, validation = prepared.text("pretrain_train"), prepared.text("pretrain_val")
    assert "".join(sorted(training + validation)) == text
    assert 0.04 < len(validation) / len(text) < 0.06
    assert prepared.result["pretrain"][0]["split"].startswith("spans")


def test_spans_do_not_depend_on_the_size_of_chunks(prepare, tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "".join(chr(0x4E00 + n) for n in range(5000)))
    whole = prepare("--pretrain", path, out="whole")
    monkeypatch.setattr(data_text, "CHUNK_BYTES", 100)
    monkeypatch.setattr(data_text, "LONGEST_DOCUMENT", 150)
    parts = prepare("--pretrain", path, out="parts")
    for side in ("train", "val"):
        assert parts.text(f"pretrain_{side}") == whole.text(f"pretrain_{side}")


def test_the_split_is_the_same_for_the_same_seed_and_another_for_another(prepare, tmp_path):
    documents = write_text(tmp_path / "a.txt", "".join(DOCUMENTS))
    unmarked = write_text(tmp_path / "b.txt", "".join(chr(0x4E00 + n) for n in range(5000)))
    rows = write_rows(tmp_path / "a.jsonl", PAIRS)

    def validation(seed, out):
        prepared = prepare("--pretrain", documents, unmarked, "--sft", rows, "--seed", seed, out=out)
        return [prepared.array(name).tolist() for name in ("pretrain_0_val", "pretrain_1_val", "sft_val")]

    first, again, other = validation(1, "a"), validation(1, "b"), validation(2, "c")
    assert first == again
    assert all(one != another for one, another in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_twenty_documents_always_leave_one_for_validation(prepare, tmp_path, seed):
    prepared = prepare("--pretrain", write_text(tmp_path / "a.txt", "".join(DOCUMENTS[:20])), "--seed", seed)
    assert prepared.result["pretrain"][0]["split"] == "whole documents"
    assert len(prepared.array("pretrain_val")) > 16


def test_one_long_document_among_short_ones_is_split_into_spans(prepare, tmp_path):
    text = "<|bos|>x<|eos|>" * 30 + "<|bos|>" + "abcdefgh" * 500 + "<|eos|>"
    prepared = prepare("--pretrain", write_text(tmp_path / "a.txt", text), block_size=128)
    assert prepared.result["pretrain"][0]["split"].startswith("spans")
    assert len(prepared.array("pretrain_val")) > 128


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 5, 16, 64, 1000])
def test_special_token_at_a_chunk_edge_is_one_token(prepare, tmp_path, monkeypatch, chunk_bytes):
    text = "".join(DOCUMENTS[:30]) + "<|Padding|><|InstructMark|>中<|Resp<|x"
    path = write_text(tmp_path / "a.txt", text)
    whole = prepare("--pretrain", path, out="whole")
    monkeypatch.setattr(data_text, "CHUNK_BYTES", chunk_bytes)
    parts = prepare("--pretrain", path, out="parts")
    for side in ("train", "val"):
        assert parts.array(f"pretrain_{side}").tolist() == whole.array(f"pretrain_{side}").tolist()
    ids = np.concatenate([parts.array(f"pretrain_{side}") for side in ("train", "val")])
    assert np.bincount(ids)[:6].tolist() == [1, 0, 30, 30, 1, 0]


@pytest.mark.parametrize("how", ["marked", "line", "blank"])
@given(pieces=st.lists(st.sampled_from(["a", "中", "\n", "\n\n", " ", "\r", "<", "<|bos|>", "<|eos|>"])),
       chunk_bytes=st.integers(1, 40))
@example(pieces=["a", "\n\n", " ", "\n", "a"], chunk_bytes=3)
@example(pieces=["<|eos|>", *"aaaaaaa"], chunk_bytes=7)
@settings(max_examples=60, deadline=None)
def test_documents_do_not_depend_on_the_size_of_chunks(tmp_path_factory, how, pieces, chunk_bytes):
    text = "".join(pieces)
    path = write_text(tmp_path_factory.getbasetemp() / "fuzzed.txt", text)

    def read():
        return [document for documents in data_text.cut_text(Source(path, path, TEXT), how, Counts())
                for document in documents]

    whole = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_text, "CHUNK_BYTES", chunk_bytes)
        assert read() == whole
    if how == "marked" and text.strip():
        assert "".join(whole).strip() == text.replace("\r\n", "\n").replace("\r", "\n").strip()


@pytest.mark.parametrize("chunk_bytes", [100, 1 << 21])
@pytest.mark.parametrize("n_documents, split", [(19, "spans"), (20, "whole documents")])
@pytest.mark.parametrize("before", [0, 200000])
def test_twenty_documents_are_split_as_such_wherever_they_begin(prepare, tmp_path, monkeypatch, chunk_bytes,
                                                               n_documents, split, before):
    monkeypatch.setattr(data_text, "CHUNK_BYTES", chunk_bytes)
    first = "<|bos|>" + "x" * before + "y<|eos|>\n"
    path = write_text(tmp_path / "a.txt", first + "".join(DOCUMENTS[1:n_documents]))
    assert prepare("--pretrain", path).result["pretrain"][0]["split"].startswith(split)


def test_a_document_longer_than_a_chunk_keeps_every_character(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(data_text, "CHUNK_BYTES", 100)
    monkeypatch.setattr(data_text, "LONGEST_DOCUMENT", 150)
    text = "".join(chr(0x4E00 + n) for n in range(3000))
    path = write_text(tmp_path / "a.txt", text)
    parts = list(data_text.cut_text(Source(path, path, TEXT), "marked", Counts()))
    assert max(len(part) for [part] in parts) < 250  # so it is never in memory as a whole
    prepared = prepare("--pretrain", path)
    assert prepared.result["pretrain"][0]["documents"] == 1
    assert "".join(sorted(prepared.text("pretrain_train") + prepared.text("pretrain_val"))) == text


@pytest.mark.parametrize("how, between", [
    ("line", "\n"), ("line", "\r\n"), ("line", "\n \n"), ("blank", "\n\n"), ("blank", "\n \n\n")])
def test_lines_and_paragraphs_become_documents_between_bos_and_eos(prepare, tmp_path, how, between):
    documents = [f"document {n}" if how == "line" else f"document\nnumber {n}" for n in range(100)]
    path = write_text(tmp_path / "a.txt", "\n" + between.join(documents) + between)
    prepared = prepare("--pretrain", path, "--documents", how)
    text = prepared.text("pretrain_train") + prepared.text("pretrain_val")
    assert sorted(text.split("<|bos|>")[1:]) == sorted(f"{document}<|eos|>" for document in documents)
    assert ("\n" in prepared.tokenizer.stoi) == (how == "blank")


def test_byte_order_mark_and_line_ends_are_normalised_and_said_so(tmp_path, capsys):
    path = write_text(tmp_path / "a.txt", "\ufeff" + "one\r\ntwo\rthree\n" * 100)
    data.main(["--pretrain", path, "--block_size", "8", "--out", str(tmp_path / "out")])
    stdout = capsys.readouterr().out
    prepared = Prepared(tmp_path / "out", stdout)
    assert not {"\ufeff", "\r"} & set(prepared.tokenizer.itos)
    assert prepared.result["pretrain"][0]["characters"] == len("one\ntwo\nthree\n" * 100)
    assert "normalised 1 byte order mark, 200 CRLF or CR line ends" in stdout


@pytest.mark.parametrize("chunk_bytes", [4, 1000])
@pytest.mark.parametrize("content, at", [
    (b"\xef\xbb\xbfab\r\n\xff", 7), (b"abc\xe4\xb8", 3), (b"\xe4\xb8\xad\x80", 3)])
def test_invalid_utf8_names_the_byte(prepare, tmp_path, monkeypatch, content, at, chunk_bytes):
    monkeypatch.setattr(data_text, "CHUNK_BYTES", chunk_bytes)
    path = write_text(tmp_path / "a.txt", content)
    with pytest.raises(InputError, match=f"a.txt: not UTF-8 at byte {at};"):
        prepare("--pretrain", path)


@pytest.mark.parametrize("text, complaint", [
    ("", "a.txt: is empty"), ("\ufeff", "a.txt: is empty"), ("too short", "smaller --block_size"),
    ("\n\n \n", "smaller --block_size")])
def test_text_that_cannot_fill_a_block_is_refused(prepare, tmp_path, text, complaint):
    with pytest.raises(InputError, match=complaint):
        prepare("--pretrain", write_text(tmp_path / "a.txt", text))


def test_the_vocabulary_covers_texts_and_rows_and_nothing_else(prepare, tmp_path):
    rows = [{"question": question, "answer": "b\ud800"} for question in "acde"]
    prepared = prepare("--pretrain", write_text(tmp_path / "a.txt", "<|bos|>XY<|eos|>" * 100),
                       "--sft", write_rows(tmp_path / "a.jsonl", rows))
    assert prepared.tokenizer.itos == [*SPECIAL_TOKENS, *"XYabcde"]
    assert prepared.result["unknown_characters"] == 4  # the lone surrogates


def test_a_given_tokenizer_counts_what_it_lacks(tmp_path, capsys):
    Tokenizer.build(["abc"]).save(tmp_path / "t.json")
    path = write_text(tmp_path / "a.txt", "abc中中é" * 100)
    data.main(["--pretrain", path, "--tokenizer", str(tmp_path / "t.json"), "--block_size", "8",
               "--out", str(tmp_path / "out")])
    prepared = Prepared(tmp_path / "out", stdout := capsys.readouterr().out)
    assert prepared.tokenizer.itos == [*SPECIAL_TOKENS, *"abc"]
    assert prepared.result["unknown_characters"] == 300
    assert "commonest unknown: '中' 200, 'é' 100" in stdout
    ids = np.concatenate([prepared.array("pretrain_train"), prepared.array("pretrain_val")])
    assert (ids == prepared.tokenizer.unknown_id).sum() == 300


def test_a_large_vocabulary_is_stored_in_four_bytes(prepare, tmp_path):
    characters = [chr(code) for code in (*range(0x4E00, 0x9FFF), *range(0x20000, 0x20000 + 46000))]
    prepared = prepare("--pretrain", write_text(tmp_path / "a.txt", "".join(characters)))
    assert prepared.array("pretrain_train").dtype == np.uint32
    assert set(prepared.text("pretrain_train") + prepared.text("pretrain_val")) == set(characters)


def test_several_texts_make_numbered_files(prepare, tmp_path):
    paths = [write_text(tmp_path / f"{name}; x.txt", name * 2000) for name in "ab"]
    prepared = prepare("--pretrain", *paths)
    assert set(prepared.text("pretrain_0_train")) == {"a"}
    assert set(prepared.text("pretrain_1_val")) == {"b"}
    assert sorted(os.listdir(prepared.folder)) == sorted([
        *(f"pretrain_{i}_{side}.npy{end}" for i in range(2) for side in ("train", "val")
          for end in ("", ".json")),
        "tokenizer.json"])


# ---- Instruction data ----

def test_a_row_is_the_template_with_loss_on_the_answer_and_its_eos_only(prepare, tmp_path):
    prepared = prepare("--sft", write_rows(tmp_path / "a.jsonl", PAIRS), block_size=64)
    rows = prepared.rows("sft_train") + prepared.rows("sft_val")
    assert len(rows) == len(PAIRS)
    for ids, mask in rows:
        text, answer = prepared.tokenizer.decode(ids), prepared.tokenizer.decode(ids[mask == 1])
        number = answer.removeprefix("answer ").removesuffix(".<|eos|>")
        template = "<|InstructMark|>question {}<|ResponseMark|>answer {}.<|eos|><|Padding|>"
        assert text == template.format(number, number)


def test_every_turn_of_a_conversation_carries_loss(prepare, tmp_path):
    rows = [conversation(f"a{n}", "b", "c", "d") for n in range(9)]
    prepared = prepare("--sft", write_rows(tmp_path / "a.jsonl", rows))
    for ids, mask in prepared.rows("sft_train"):
        assert prepared.tokenizer.decode(ids[mask == 1]) == "b<|eos|>d<|eos|>"
    numbers = prepared.result["sft"]
    assert numbers["training"]["turns"] + numbers["validation"]["turns"] == 18


def test_special_token_text_in_a_question_stays_plain_characters(prepare, tmp_path):
    rows = [{"question": f"<|Padding|><|eos|>{n}", "answer": "<|Padding|>"} for n in range(4)]
    prepared = prepare("--sft", write_rows(tmp_path / "a.jsonl", rows), block_size=64)
    for ids, _ in prepared.rows("sft_train") + prepared.rows("sft_val"):
        assert (ids == 0).sum() == 1 and ids[-1] == 0
        assert (ids == prepared.tokenizer.eos_id).sum() == 1


def test_rows_with_the_same_question_fall_to_the_same_side(prepare, tmp_path):
    rows = [{"question": f"q{n % 30}" + " " * (n // 30), "answer": f"{n}"} for n in range(120)]
    prepared = prepare("--sft", write_rows(tmp_path / "a.jsonl", rows), "--val_fraction", "0.3")
    training, validation = (
        {prepared.tokenizer.decode(ids).split("<|Resp")[0].strip() for ids, _ in prepared.rows(name)}
        for name in ("sft_train", "sft_val"))
    assert not training & validation
    assert len(training) + len(validation) == 30


@pytest.mark.parametrize("seed", range(8))
def test_two_questions_are_enough_for_both_sides(prepare, tmp_path, seed):
    prepared = prepare("--sft", write_rows(tmp_path / "a.jsonl", PAIRS[:2]), "--seed", seed, block_size=64)
    assert len(prepared.rows("sft_train")) == len(prepared.rows("sft_val")) == 1


def test_one_question_is_refused(prepare, tmp_path):
    with pytest.raises(InputError, match="two different questions"):
        prepare("--sft", write_rows(tmp_path / "a.jsonl", PAIRS[:1] * 3), block_size=64)


LONG = [{"question": f"q{n}", "answer": "0123456789" * 3} for n in range(8)]


def test_long_rows_are_cropped_at_the_answer(prepare, tmp_path):
    prepared = prepare("--sft", write_rows(tmp_path / "a.jsonl", LONG), block_size=20)
    for ids, mask in prepared.rows("sft_train") + prepared.rows("sft_val"):
        assert len(ids) == 20 + 1 + 1  # block_size + 1 tokens and the <|Padding|>
        assert prepared.tokenizer.decode(ids[mask == 1]) == "01234567890123456"
    assert prepared.result["sft"]["cropped"] == 8


def test_long_rows_can_be_dropped(prepare, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", LONG + PAIRS[:5])
    prepared = prepare("--sft", path, "--long_rows", "drop", block_size=30)
    assert prepared.result["sft"]["dropped"] == 8 and prepared.result["sft"]["cropped"] == 0
    assert sorted(text[16:26] for text in prepared.row_texts()) == [f"question {n}" for n in range(5)]


def test_a_row_whose_question_fills_the_block_is_dropped(prepare, tmp_path):
    rows = [{"question": question, "answer": "y"} for question in ("x" * 13, "x" * 14, "x" * 15, "z")]
    prepared = prepare("--sft", write_rows(tmp_path / "a.jsonl", rows), block_size=16)
    assert prepared.result["sft"]["cropped"] == prepared.result["sft"]["dropped"] == 1
    with pytest.raises(InputError, match="no row fits"):
        prepare("--sft", write_rows(tmp_path / "b.jsonl", rows[2:3]), block_size=16)


def test_a_cropped_conversation_does_not_end_in_a_question(prepare, tmp_path):
    rows = [conversation(f"{n}", "b", "c" * 20, "d") for n in range(4)]
    prepared = prepare("--sft", write_rows(tmp_path / "a.jsonl", rows), block_size=16)
    assert prepared.row_texts()[0][17:] == "<|ResponseMark|>b<|eos|><|Padding|>"


BAD_ROWS = {
    "{": "not valid JSON",
    "[1]": "not a JSON object",
    "NaN": "not a JSON object",
    "[" * 100000: "nested too deeply",
    '{"question": "q"}': '"answer" is missing',
    '{"question": 5, "answer": "a"}': "the question is not a string",
    '{"question": NaN, "answer": "a"}': "the question is not a string",
    '{"question": 1' + "0" * 5000 + ', "answer": "a"}': "",  # older Pythons read the number
    '{"question": " ", "answer": "a"}': "the question is empty",
    '{"question": "q", "answer": "\\n"}': "the answer is empty",
    '{"messages": []}': "not a list of messages",
    '{"messages": {}}': "not a list of messages",
    '{"messages": ["s"]}': 'message 1 does not have the role "user"',
    '{"messages": [{"role": "system", "content": "s"}]}': "the last message is not the assistant's",
    '{"messages": [{"role": "tool", "content": "s"}]}': 'message 1 does not have the role "user"',
    '{"messages": [{"role": ["user"], "content": "s"}]}': 'message 1 does not have the role "user"',
    '{"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "a"}]}': "question is not a",
    '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": ""}, '
    '{"role": "assistant", "content": "a"}]}': "the question is empty",
    '{"system": 5, "instruction": "q", "output": "a"}': "the system message is not a string",
    '{"instruction": 7, "output": "a"}': "the question is not a string",
    '{"instruction": "", "input": " ", "output": "a"}': "the question is empty",
    '{"prompt": "q"}': 'the key "response" is missing',
    '{"id": 7}': 'not a row of a known form, which has the keys "messages", or "conversations", or '
                 '"question" and "answer", or "instruction" and "output", or "prompt" and "response", or '
                 '"prompt" and "completion"',
    '{"messages": [{"role": "user", "content": "s"}]}': "the last message is not the assistant's",
    '{"messages": [{"role": "user", "content": "s"}, {"role": "user", "content": "s"}]}': "message 2",
    '{"messages": [{"role": "user"}]}': "message 1 has no content",
}


@pytest.mark.parametrize("row", BAD_ROWS, ids=lambda row: row[:60])
def test_bad_rows_are_named_by_line_and_skipped(tmp_path, capsys, row):
    path = write_rows(tmp_path / "a.jsonl", ["", json.dumps(PAIRS[0]), row, "  ", *PAIRS[1:]])
    data.main(["--sft", path, "--out", str(tmp_path / "out"), "--block_size", "64"])
    printed = capsys.readouterr()
    assert f"{path}, line 3: " in printed.err and BAD_ROWS[row] in printed.err
    numbers = json.loads(printed.out.splitlines()[-1])["sft"]
    assert numbers["bad_rows"] == 1
    assert numbers["training"]["rows"] + numbers["validation"]["rows"] == len(PAIRS)
    with pytest.raises(InputError, match="line 3: "):
        data.main(["--sft", path, "--out", str(tmp_path / "out"), "--block_size", "64", "--strict"])


@pytest.mark.parametrize("seed", range(4))
def test_a_bad_row_is_named_once_although_few_rows_are_split_several_times(tmp_path, capsys, seed):
    path = write_rows(tmp_path / "a.jsonl", ["{", *PAIRS[:2]])
    data.main(["--sft", path, "--out", str(tmp_path / "out"), "--block_size", "64", "--seed", str(seed)])
    printed = capsys.readouterr()
    assert printed.err.count("line 1: ") == 1
    assert json.loads(printed.out.splitlines()[-1])["sft"]["bad_rows"] == 1


def test_ten_bad_rows_are_shown_and_the_others_counted(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [*PAIRS, *["{"] * 25])
    data.main(["--sft", path, "--out", str(tmp_path / "out"), "--block_size", "64"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and "15 more bad rows" in lines[-1]


def test_a_byte_order_mark_is_no_bad_row(prepare, tmp_path):
    path = write_text(tmp_path / "a.jsonl", "\ufeff" + PAIR_LINES.replace("\n", "\r\n"))
    assert prepare("--sft", path).result["sft"]["bad_rows"] == 0


def test_a_row_that_is_not_utf8_is_named_by_line(tmp_path, capsys):
    path = write_text(tmp_path / "a.jsonl", PAIR_LINES.encode() + b'\n{"question": "\xff"}')
    data.main(["--sft", path, "--out", str(tmp_path / "out"), "--block_size", "64"])
    assert "line 61: not UTF-8 at byte 14 of the line" in capsys.readouterr().err


@pytest.mark.parametrize("extra, bad", [(0, 0), (1, 1), (50, 1), (130, 1)])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_row_up_to_the_longest_is_read_and_a_longer_one_skipped(tmp_path, capsys, monkeypatch, extra,
                                                                     bad, end):
    row = json.dumps({"question": "q", "answer": "a" * (100 + extra)})
    monkeypatch.setattr(data_json, "LONGEST_ROW", len(row) - extra + 1)  # its line end counts
    path = write_text(tmp_path / "a.jsonl", PAIR_LINES.rstrip("\n") + "\n" + row + end)
    data.main(["--sft", path, "--out", str(tmp_path / "out"), "--block_size", "300"])
    printed = capsys.readouterr()
    assert ("line 61: longer than 0 MB; skipped" in printed.err) == bool(bad)
    numbers = json.loads(printed.out.splitlines()[-1])["sft"]
    assert numbers["bad_rows"] == bad
    assert numbers["training"]["rows"] + numbers["validation"]["rows"] == 60 + 1 - bad


@pytest.mark.parametrize("content, complaint", [
    ("", "is empty"), ("\n\n", "is empty"), ("{\n[]", "no row that can be used")])
def test_a_file_without_one_good_row_is_refused(prepare, tmp_path, content, complaint):
    with pytest.raises(InputError, match=f"a.jsonl: .*{complaint}"):
        prepare("--sft", write_text(tmp_path / "a.jsonl", content))


@given(st.lists(st.one_of(st.text(), st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.just("user"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["question", "answer", "messages", "role", "content"]), inner)).map(json.dumps))))
@settings(max_examples=100, deadline=None)
def test_no_row_whatever_crashes(rows):
    for row in rows:
        try:
            turns = parse_row(row.encode("utf-8", "surrogatepass"))
        except ValueError as error:
            assert str(error)
        else:
            assert turns and all(q.strip() and a.strip() for q, a in turns)


# ---- Files and command line ----

def test_nothing_is_left_behind_after_a_failure_and_the_old_files_stay(prepare, tmp_path):
    text = write_text(tmp_path / "a.txt", "".join(DOCUMENTS))
    good = write_rows(tmp_path / "good.jsonl", PAIRS)
    prepared = prepare("--pretrain", text, "--sft", good, block_size=64)
    before = {path.name: path.read_bytes() for path in prepared.folder.iterdir()}
    # The text is encoded first; then the instruction data turns out to have no second question.
    bad = write_rows(tmp_path / "bad.jsonl", PAIRS[:1])
    with pytest.raises(InputError, match="two different questions"):
        prepare("--pretrain", text, "--sft", bad, "--seed", 5, block_size=64)
    assert {path.name: path.read_bytes() for path in prepared.folder.iterdir()} == before


def test_a_full_disk_is_one_line_and_leaves_nothing(prepare, tmp_path, monkeypatch):
    def full(self, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NpyWriter, "append", full)
    with pytest.raises(InputError, match="No space left on device"):
        prepare("--pretrain", write_text(tmp_path / "a.txt", "".join(DOCUMENTS)))
    assert os.listdir(tmp_path / "out") == []


def test_prepared_files_of_a_replaced_tokenizer_are_named(tmp_path, capsys):
    text = write_text(tmp_path / "a.txt", "".join(DOCUMENTS))
    rows = write_rows(tmp_path / "a.jsonl", PAIRS)
    common = ["--out", str(tmp_path / "out"), "--block_size", "64"]
    data.main(["--pretrain", text, *common])
    data.main(["--sft", rows, *common, "--tokenizer", str(tmp_path / "out" / "tokenizer.json")])
    assert "note:" not in capsys.readouterr().out
    data.main(["--sft", rows, *common])
    assert "note: pretrain_train.npy, pretrain_val.npy" in capsys.readouterr().out


@pytest.mark.parametrize("words, complaint", [
    (["--pretrain", "missing.txt"], "missing.txt: no such file"),
    (["--sft", "missing/*.jsonl"], r"missing/\*.jsonl: no file matches"),
    (["--pretrain", __file__, "--encoding", "morse"], "--encoding is morse"),
    (["--pretrain", __file__, "--encoding", "rot13"], "--encoding is rot13"),
    ([__file__, "--sft", __file__], "either without a flag or with"),
    (["--pretrain", __file__, "--val_fraction", "0"], "--val_fraction"),
    (["--sft", __file__, "--seed", "-1"], "--seed"),
    (["--pretrain", __file__, "--block_size", "0"], "block_size"),
    (["--pretrain", __file__, "--tokenizer", __file__], "test_data.py"),
    (["--pretrain", __file__, "--out", __file__], "test_data.py")])
def test_wrong_arguments_are_named(words, complaint):
    with pytest.raises(InputError, match=complaint):
        data.main(words)


def test_an_empty_dataset_folder_makes_the_sample_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "DATASET", str(tmp_path))
    with pytest.raises(InputError, match="make_sample.py: No such file"):
        data.main([])
    write_text(tmp_path / "make_sample.py", "def write_sample(folder, seed=1337):\n"
               "    open(folder + '/sample_pretrain.txt', 'w').write('sample ' * 1000)\n"
               f"    open(folder + '/sample_sft.jsonl', 'w').write({PAIR_LINES!r})\n")
    data.main([])
    assert "using the sample" in capsys.readouterr().out
    assert {"tokenizer.json", "pretrain_train.npy", "sft_val.npy"} <= set(os.listdir(tmp_path))

    # The user's own file, alone, comes before the sample.
    write_text(tmp_path / "pretrain.txt", "mine " * 1000)
    data.main([])
    stdout = capsys.readouterr().out
    assert "using the sample" not in stdout
    assert json.loads(stdout.splitlines()[-1])["sft"] is None


def test_the_script_prints_a_table_and_json_last(tmp_path):
    path = write_text(tmp_path / "a b; c.txt", "".join(DOCUMENTS))
    done = run_script("--pretrain", path, "--out", tmp_path / "out put; x", "--block_size", 16)
    assert (done.returncode, done.stderr) == (0, "")
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["pretrain"][0]["documents"] == len(DOCUMENTS)
    assert "training" in done.stdout and f"{numbers['pretrain'][0]['training']['tokens']:,}" in done.stdout
    assert all(os.path.getsize(path) for path in numbers["files"])


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    done = run_script("--pretrain", write_text(tmp_path / "a.txt", b"ab\xff"), "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (f"error: {tmp_path}/a.txt: not UTF-8 at byte 2; its encoding is probably cp1252: "
                           "add --encoding cp1252\n")
    assert os.listdir(tmp_path) == ["a.txt"]
