"""data.py reads what people have: every form of tests/fixtures/data, and what is wrong with the others."""

import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

import data
from corpus import forms as data_json
from corpus.fingerprint import check_vocabulary
from corpus.inputs import likely_encoding
from corpus.rows import load_conversations
from script import InputError
from tokenizer import Tokenizer

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "data"
QUESTIONS = [json.loads(line) for line in (FIXTURES / "questions.jsonl").read_text().splitlines()]
PAIRS = [(row["question"], row["answer"]) for row in QUESTIONS]
TEXTS = [json.loads(line)["text"] for line in (FIXTURES / "minimind_pretrain.jsonl").read_text().splitlines()]
MARKED = "".join(f"<|bos|>{text}<|eos|>\n" for text in TEXTS)


class Prepared:
    """What data.py wrote into a folder, and what it printed."""

    def __init__(self, folder, printed):
        self.folder = folder
        self.stdout = printed.out
        self.stderr = printed.err
        self.result = json.loads(printed.out.splitlines()[-1])
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")

    def text(self, stem="pretrain"):
        """The training text followed by the validation text."""
        return "".join(self.tokenizer.decode(np.load(self.folder / f"{stem}_{side}.npy"))
                       for side in ("train", "val"))

    def documents(self):
        return sorted(text.split("<|eos|>")[0] for text in self.text().split("<|bos|>")[1:])

    def rows(self):
        ids = np.concatenate([np.load(self.folder / f"sft_{side}.npy") for side in ("train", "val")])[:, 0]
        return sorted(self.tokenizer.decode(ids).split("<|Padding|>")[:-1])


@pytest.fixture
def prepare(tmp_path, capsys):
    """Run data.py in this process; returns what it wrote."""
    def run(*words, out="out", block_size=64):
        data.main([*map(str, words), "--block_size", str(block_size), "--out", str(tmp_path / out)])
        return Prepared(tmp_path / out, capsys.readouterr())
    return run


def rows_of(conversations):
    """Conversations as they stand in prepared files."""
    return sorted("".join(f"<|InstructMark|>{q}<|ResponseMark|>{a}<|eos|>" for q, a in turns)
                  for turns in conversations)


# ---- Questions and answers ----

EXPECTED = {
    "questions.jsonl": [[pair] for pair in PAIRS],
    "questions_array.json": [[pair] for pair in PAIRS],
    "prompt_response.jsonl": [[pair] for pair in PAIRS],
    "minimind_sft.jsonl": [[pair] for pair in PAIRS],
    "sharegpt.jsonl": [[("Be brief.\n" + q, a)] for q, a in PAIRS],
    "messages_system.jsonl": [[("Be brief.\n" + q, a), ("Sure?", "Yes.")] for q, a in PAIRS],
    "alpaca.json": [[("Explain the code.\n" + q if i % 2 else q, a)] for i, (q, a) in enumerate(PAIRS)],
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", EXPECTED)
def test_questions_and_answers_of_every_form_are_read(prepare, tmp_path, name, packed):
    path = FIXTURES / name
    if packed:
        path = tmp_path / "rows"  # without an ending: the content tells
        path.write_bytes(gzip.compress((FIXTURES / name).read_bytes()))
    for flag in (["--sft"], []):
        prepared = prepare(*flag, path, block_size=128)
        assert prepared.rows() == rows_of(EXPECTED[name])
        assert f"{path}: JSON rows of questions and answers" in prepared.stdout
    assert prepared.result["sft"]["bad_rows"] == 0 and prepared.stderr == ""
    assert sorted(load_conversations(str(path))) == sorted(EXPECTED[name])


def test_several_files_and_forms_make_one_set_of_rows(prepare, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "one.jsonl").write_text(json.dumps(QUESTIONS[0]))
    (folder / "two.json").write_text(json.dumps([{"prompt": q, "completion": a} for q, a in PAIRS[1:3]]))
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\0\0" * 100)
    prepared = prepare("--sft", folder, FIXTURES / "prompt_response.jsonl")
    assert prepared.rows() == rows_of([[pair] for pair in PAIRS + PAIRS[:3]])
    assert prepared.result["sft"]["forms"] == {
        "question + answer": 1, "prompt + completion": 2, "prompt + response": len(PAIRS)}
    assert "skipped" in prepared.stdout and "picture.png: binary data" in prepared.stdout


@pytest.mark.parametrize("is_array", [False, True])
def test_lists_of_messages_are_rows(prepare, tmp_path, is_array):
    lists = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in PAIRS]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lists)) if not is_array else json.dumps(lists))
    assert prepare("--sft", path).rows() == rows_of([[pair] for pair in PAIRS])


@pytest.mark.parametrize("content, complaint", [
    ('{"id": 1}\n' * 30, r'no row that can be used \(line 1: not a row of .*\); a row is {"question"'),
    ('{"text": "abc"}\n' * 30, "give it to --pretrain"),
    ("What is it?\tA radio.\n" * 30, r'line 1: not valid JSON .* a row is {"question".*"messages"'),
    ("question,answer\nq,a\n" * 30, r'a CSV table .* convert it to JSONL first, with a row {"question"'),
    ('\ufeff"id"\t"Question"\t"answer"\r\n1\tq\ta\r\n' * 30, "a CSV table .* convert it to JSONL"),
    ("", r'is empty; give rows {"question"'),
    ("你好，世界\n".encode("gb18030") * 30, "a.jsonl: not UTF-8 at byte 0; .* add --encoding gb18030"),
    ('{"question": "你好", "answer": "世界"}\n'.encode("gb18030") * 9, "not UTF-8 at byte 14; .* gb18030"),
    ('[{"question": "q", "answer": "a"},\n {"question": "q"', "a.jsonl, line 2: not valid JSON"),
    ('[{"question": "q", "answer": "a"}\n,\n {"question": q}]', "a.jsonl, line 3: not valid JSON"),
    ('[\n{"question": "q", "answer": "a"}]\nmore', "a.jsonl, line 2: more text after the end"),
    (b"PAR1\x15\x04\x15\x00", "Parquet data; unpack or convert it"),
    (b"\x7fELF\0\0\0\0" * 100, "binary data, not text")])
def test_without_a_usable_row_one_line_says_what_is_wanted(prepare, tmp_path, capsys, content, complaint):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=complaint):
        prepare("--sft", path)
    assert capsys.readouterr().err == ""  # no list of bad rows


def test_a_bad_row_of_an_array_is_named_by_row_and_line(prepare, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*QUESTIONS[:2], {"question": "q"}, 7, *QUESTIONS[2:]], indent=1))
    prepared = prepare("--sft", path)
    assert prepared.stderr == (f'{path}, row 3, line 10: the key "answer" is missing; skipped\n'
                               f"{path}, row 4, line 13: not a JSON object; skipped\n")
    assert prepared.rows() == rows_of([[pair] for pair in PAIRS])
    with pytest.raises(InputError, match="row 3, line 10"):
        load_conversations(str(path))


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("name", ["alpaca.json", "questions_array.json"])
def test_an_array_is_read_the_same_whatever_the_size_of_pieces(monkeypatch, name, block):
    monkeypatch.setattr(data_json, "ARRAY_BLOCK", block)
    assert load_conversations(str(FIXTURES / name)) == EXPECTED[name]


def test_a_bad_first_line_in_brackets_does_not_make_an_array_of_jsonl(prepare, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[1]\n" + (FIXTURES / "questions.jsonl").read_text())
    prepared = prepare("--sft", path)
    assert prepared.rows() == rows_of([[pair] for pair in PAIRS])
    assert "line 1: not a JSON object; skipped" in prepared.stderr


# ---- Text ----

def test_json_rows_with_a_text_are_documents(prepare):
    prepared = prepare("--pretrain", FIXTURES / "minimind_pretrain.jsonl", block_size=16)
    assert prepared.documents() == sorted(TEXTS)
    assert prepared.result["pretrain"][0]["split"] == "whole documents"
    assert 'minimind_pretrain.jsonl: JSON rows with the field "text"' in prepared.stdout


def test_marks_around_a_text_in_json_are_not_doubled(prepare, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"<|bos|>{text}<|eos|>"} for text in TEXTS] + [{"text": 5}, {}]))
    prepared = prepare("--pretrain", path, block_size=16)
    assert prepared.documents() == sorted(TEXTS)
    assert prepared.stderr.count('has no text in a field "text"; skipped') == 2
    with pytest.raises(InputError, match="row 41, line 1"):
        prepare("--pretrain", path, "--strict")


@pytest.mark.parametrize("name, content", [
    ("a.txt", (FIXTURES / "questions.jsonl").read_bytes()),
    ("b.txt", (FIXTURES / "alpaca.json").read_bytes()),
    ("c.txt", b'{"id": 1, "content": "abc"}\n' * 100),
    ("d.txt", b'{\n "vocab_size": 3,\n "itos": ["a"]\n}\n'),
    ("e.txt", json.dumps([{"id": n, "content": "abc " * 99} for n in range(9999)]).encode()),
    ("f.txt", json.dumps({"id": 1, "content": "abc " * 999999}).encode())], ids=range(6))
def test_json_is_not_trained_on_as_text(prepare, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: (holds rows of questions and answers; give it to --sft"
                                         "|JSON, which is not trained on as text; give rows)"):
        prepare("--pretrain", path)


@pytest.mark.parametrize("text", [
    "[1] Smith, 1999. [2] Jones.\n[2] Jones, 2001.\n", "{braces} in a text\n", "[Verse 1]\nla la\n",
    '{"a": 1} is JSON, says the manual.\nOthers agree.\n', '["hello"], she said.\n', "{\n  int i;\n}\n"])
def test_text_that_begins_like_json_stays_text(prepare, tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text(text * 300)
    assert sorted(prepare("--pretrain", path, block_size=16).text()) == sorted(text * 300)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_packed_text_is_unpacked(prepare, tmp_path, pack):
    path = tmp_path / "text.packed"
    path.write_bytes(pack(MARKED.encode()))
    prepared = prepare("--pretrain", path, block_size=16)
    assert prepared.documents() == sorted(TEXTS) and "plain text, unpacked from" in prepared.stdout
    assert not [name for name in os.listdir(prepared.folder) if name.startswith(".")]


@pytest.mark.parametrize("words", [["--pretrain", "ZIP", "--sft", "ZIP"], ["ZIP"]], ids=["flags", "bare"])
def test_an_encrypted_zip_of_text_and_rows_is_taken_apart(prepare, words):
    archive = FIXTURES / "encrypted.zip"
    words = [archive if word == "ZIP" else word for word in words]
    prepared = prepare(*words, "--password", "nano")
    assert prepared.documents() == sorted(TEXTS)
    assert prepared.rows() == rows_of([[pair] for pair in PAIRS])
    with pytest.raises(InputError, match="encrypted.zip: the archive is encrypted; .* --password"):
        prepare(*words)
    with pytest.raises(InputError, match="encrypted.zip: pretrain.txt: .*password is wrong"):
        prepare(*words, "--password", "wrong")


def test_a_zip_with_folders_and_other_files_is_read(prepare, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in (("books/", ""), ("books/a.txt", MARKED), ("__MACOSX/books/._a.txt", "hidden"),
                              ("books/.DS_Store", "hidden"), ("books/cover.png", b"\x89PNG" + bytes(1000))):
            archive.writestr(name, content)
    prepared = prepare("--pretrain", tmp_path / "a.zip", block_size=16)
    assert prepared.documents() == sorted(TEXTS)
    assert f"note: skipped {tmp_path}/a.zip: books/cover.png: binary data, not text; " in prepared.stdout
    with pytest.raises(InputError, match="a.zip: no file in it can be used here; .*a.txt: plain text"):
        prepare("--sft", tmp_path / "a.zip")


@pytest.mark.parametrize("content, complaint", [
    (gzip.compress(MARKED.encode())[:200], "damaged"), (b"PK\x03\x04" + b"x" * 100, "damaged .zip"),
    (lzma.compress(MARKED.encode())[:200], "damaged"),
    (gzip.compress(MARKED.encode())[:-6] + b"abcdef", "damaged"),
    (b"\xfd7zXZ\0" + b"x" * 100, "damaged")])
def test_a_damaged_archive_is_one_line(prepare, tmp_path, content, complaint):
    path = tmp_path / "a.packed"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"a.packed: .*{complaint}"):
        prepare("--pretrain", path)


def test_each_file_of_a_folder_is_a_document_and_hidden_ones_are_none(prepare, tmp_path):
    books = tmp_path / "books"
    (books / "more").mkdir(parents=True)
    for n, text in enumerate(TEXTS):
        (books / ("more" if n % 2 else "") / f"{n}.txt").write_text(text + "\n")
    (books / ".hidden").write_text("hidden")
    (books / ".git").mkdir()
    (books / ".git" / "config").write_text("hidden")
    (books / "empty.txt").write_text("")
    prepared = prepare("--pretrain", books, block_size=16)
    assert prepared.documents() == sorted(text + "\n" for text in TEXTS)
    assert f"{books}: plain text in 41 files" in prepared.stdout
    prepared = prepare("--pretrain", books / "**" / "*.txt", block_size=16)
    assert prepared.documents() == sorted(text + "\n" for text in TEXTS)


def test_a_marked_file_of_a_folder_keeps_its_documents(prepare, tmp_path):
    (tmp_path / "a.txt").write_text(MARKED)
    (tmp_path / "b.txt").write_text("without marks")
    prepared = prepare("--pretrain", tmp_path / "*.txt", block_size=16)
    assert prepared.documents() == sorted([*TEXTS, "without marks"])


def test_standard_input_can_be_text_or_rows(tmp_path):
    for content, name in ((MARKED.encode(), "pretrain_train.npy"),
                          (gzip.compress(MARKED.encode()), "pretrain_val.npy"),
                          ((FIXTURES / "alpaca.json").read_bytes(), "sft_train.npy")):
        done = subprocess.run([sys.executable, data.__file__, "-", "--out", tmp_path, "--block_size", "64"],
                              input=content, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).exists() and b"standard input: " in done.stdout


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_as_a_file_is(tmp_path):
    """As with data.py --pretrain <(command)."""
    command = f"'{sys.executable}' '{data.__file__}' --pretrain <(cat a.txt) --out out --block_size 16"
    (tmp_path / "a.txt").write_text(MARKED)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["pretrain"][0]["documents"] == len(TEXTS)


def test_files_without_a_flag_go_where_their_content_belongs(prepare, tmp_path):
    (tmp_path / "a").write_text(MARKED)
    prepared = prepare(tmp_path / "a", FIXTURES / "sharegpt.jsonl", FIXTURES / "minimind_pretrain.jsonl")
    assert prepared.documents() == sorted(TEXTS + TEXTS)  # one data set, not a curriculum
    assert len(prepared.rows()) == len(PAIRS)


@pytest.mark.parametrize("header", ["question,answer", "prompt;completion", "instruction,input,output"])
def test_a_table_of_questions_is_no_text_unless_it_is_given_as_one(prepare, tmp_path, header):
    path = tmp_path / "a.csv"
    path.write_text(header + "\n" + "what is it?,a radio\n" * 30)
    with pytest.raises(InputError, match="a.csv: a CSV table of questions .* convert it to JSONL first"):
        prepare(path)
    assert "a.csv: plain text" in prepare("--pretrain", path, block_size=16).stdout


@pytest.mark.parametrize("line", ["Messages", "A question, and an answer", "question answer"])
def test_a_text_about_questions_is_no_table(prepare, tmp_path, line):
    path = tmp_path / "a.txt"
    path.write_text((line + "\n") * 50)
    assert "a.txt: plain text" in prepare(path, block_size=16).stdout


def test_what_is_written_elsewhere_says_how_to_train_on_it(prepare, tmp_path):
    (tmp_path / "a").write_text(MARKED)
    prepared = prepare("--pretrain", tmp_path / "a", "--sft", FIXTURES / "questions.jsonl")
    for command, stem in (("train.py --dataset_path", "pretrain"), ("train.py -t sft --dataset_path", "sft")):
        line = next(line for line in prepared.stdout.splitlines() if command in line)
        assert json.loads(line.split("'")[1]) == [[str(prepared.folder / f"{stem}_{side}.npy")
                                                   for side in ("train", "val")]]


def test_a_text_left_from_before_a_curriculum_is_answered_with_the_curriculum(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("another text " * 100)
    prepare("--pretrain", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text(MARKED)
    prepared = prepare("--pretrain", tmp_path / "a.txt", FIXTURES / "minimind_pretrain.jsonl", block_size=16)
    with pytest.raises(InputError, match="left from before data.py wrote 2 texts") as error:
        check_vocabulary(str(prepared.folder / "pretrain_train.npy"), prepared.tokenizer)
    pairs = json.loads(str(error.value).split("'")[1])
    assert len(pairs) == 2
    for path in sum(pairs, []):
        check_vocabulary(path, prepared.tokenizer)


def test_a_curriculum_says_how_to_train_on_it(prepare, tmp_path):
    (tmp_path / "a").write_text(MARKED)
    prepared = prepare("--pretrain", tmp_path / "a", FIXTURES / "minimind_pretrain.jsonl", block_size=16)
    line = next(line for line in prepared.stdout.splitlines() if "--dataset_path" in line)
    pairs = json.loads(line.split("'")[1])
    assert [[os.path.basename(path) for path in pair] for pair in pairs] == [
        [f"pretrain_{i}_train.npy", f"pretrain_{i}_val.npy"] for i in range(2)]


# ---- Encodings ----

@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_another_encoding_is_named_and_read_when_given(prepare, encoding):
    path = FIXTURES / f"text_{encoding.replace('-', '')}.txt"
    with pytest.raises(InputError, match=rf"not UTF-8 at byte \d+; its encoding is probably {encoding}: "
                                         f"add --encoding {encoding}"):
        prepare("--pretrain", path, block_size=16)
    prepared = prepare("--pretrain", path, "--encoding", encoding, block_size=16)
    expected = path.read_bytes().decode(encoding)
    assert sorted(prepared.text()) == sorted(expected)
    assert f"decoded from {encoding}" in prepared.stdout


def test_rows_in_another_encoding_are_read(prepare, tmp_path):
    path = tmp_path / "a.json"
    pairs = [(f"第{n}台在哪里？", f"在{n}米波段。") for n in range(20)]
    rows = [{"instruction": q, "output": a} for q, a in pairs]
    path.write_bytes(json.dumps(rows, ensure_ascii=False).encode("gbk"))
    assert prepare("--sft", path, "--encoding", "gbk").rows() == rows_of([[pair] for pair in pairs])


def test_the_wrong_encoding_is_one_line(prepare):
    with pytest.raises(InputError, match="text_gb18030.txt: not utf-16, between bytes 0 and 1570"):
        prepare("--pretrain", FIXTURES / "text_gb18030.txt", "--encoding", "utf-16")


def test_utf16_without_byte_order_mark_is_not_read_as_ascii(prepare, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(("The fox is on the air. " * 100).encode("utf-16-be"))
    with pytest.raises(InputError, match="add --encoding utf-16-be"):
        prepare("--pretrain", path)


SAMPLES = {
    "gb18030": "业余无线电台的频率和呼号由国家分配，操作员应当遵守规定。镕",
    "big5": "業餘無線電臺的頻率和呼號由國家分配，操作員應當遵守規定。",
    "shift_jis": "アマチュア無線局の周波数と呼出符号は国が割り当てます。",
    "cp1252": "Der Funkamateur hört täglich über Kurzwelle – très bien.",
    "utf-16": "radio 无线电"}


@pytest.mark.parametrize("encoding", SAMPLES)
def test_the_likely_encoding_is_the_right_one(encoding):
    for times in (1, 50):
        for cut in (0, 1):
            content = (SAMPLES[encoding] * times).encode(encoding)
            assert likely_encoding(content[:len(content) - cut]) == encoding


# ---- The split ----

@pytest.mark.parametrize("fraction", ["0.1", "0.05", "0.3"])
def test_a_tail_split_is_the_last_part_of_the_text(prepare, tmp_path, fraction):
    text = "".join(chr(0x4E00 + n) for n in range(3001))
    path = tmp_path / "a.txt"
    path.write_text(text)
    prepared = prepare("--pretrain", path, "--val_split", "tail", "--val_fraction", fraction, block_size=16)
    at = int(len(text) * (1 - float(fraction)))  # as nanoGPT's prepare.py cuts
    for name, part in (("train", text[:at]), ("val", text[at:])):
        assert prepared.tokenizer.decode(np.load(prepared.folder / f"pretrain_{name}.npy")) == part
    assert prepared.result["pretrain"][0]["validation"]["tokens"] == len(text) - at


def test_a_tail_split_keeps_the_order_of_documents(prepare, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(MARKED)
    prepared = prepare("--pretrain", path, "--val_split", "tail", block_size=16)
    assert prepared.text() == MARKED


def test_a_tail_too_short_for_a_block_is_refused(prepare, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 500)
    with pytest.raises(InputError, match="475 tokens for training and 25 for validation, but a block"):
        prepare("--pretrain", path, "--val_split", "tail")


# ---- Vocabularies ----

def test_every_prepared_file_has_the_fingerprint_of_its_vocabulary(prepare, tmp_path):
    (tmp_path / "a.txt").write_text(MARKED)
    prepared = prepare("--pretrain", tmp_path / "a.txt", "--sft", FIXTURES / "questions.jsonl")
    copied = shutil.copytree(prepared.folder, tmp_path / "copied")
    for name in ("pretrain_train", "pretrain_val", "sft_train", "sft_val"):
        check_vocabulary(str(copied / f"{name}.npy"), prepared.tokenizer)


def test_a_file_left_from_another_vocabulary_is_refused_by_name(prepare, tmp_path):
    (tmp_path / "a.txt").write_text(MARKED)
    prepare("--pretrain", tmp_path / "a.txt")
    prepared = prepare("--sft", FIXTURES / "questions.jsonl")
    assert "note: pretrain_train.npy, pretrain_val.npy" in prepared.stdout
    check_vocabulary(str(prepared.folder / "sft_train.npy"), prepared.tokenizer)
    with pytest.raises(InputError, match=r"pretrain_train.npy: prepared with another vocabulary than .*"
                                         r"tokenizer.json; run python data.py"):
        check_vocabulary(str(prepared.folder / "pretrain_train.npy"), prepared.tokenizer)


def test_padding_may_have_any_id(prepare, tmp_path):
    built = Tokenizer.build([q + a for q, a in PAIRS])
    special, characters = built.itos[:6], built.itos[6:]
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"vocab_size": built.vocab_size, "special_tokens": special,
                               "itos": characters + special}))
    prepared = prepare("--sft", FIXTURES / "questions.jsonl", "--tokenizer", own)
    assert prepared.rows() == rows_of([[pair] for pair in PAIRS])


# ---- Leftovers and mistakes ----

def test_the_folder_of_a_killed_run_is_removed_after_an_hour(prepare, tmp_path):
    hour_ago = time.time() - 3700
    for name in ("old", "busy", "new"):
        folder = tmp_path / "out" / f".data-{name}" / "finished"
        folder.mkdir(parents=True)
        (folder / "pretrain_train.npy").write_text("x")
        if name != "new":
            for path in (folder, folder.parent, folder / "pretrain_train.npy"):
                os.utime(path, (hour_ago, hour_ago))
    os.utime(tmp_path / "out" / ".data-busy" / "finished" / "pretrain_train.npy")  # still being written
    prepare(FIXTURES / "questions.jsonl")
    assert sorted(path.name for path in (tmp_path / "out").glob(".data-*")) == [".data-busy", ".data-new"]


def test_a_checkpoint_given_as_tokenizer_is_told_how_to_become_one(prepare, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="a.pt: a checkpoint.* python checkpoint.py .*a.pt tokenizer.json"):
        prepare(FIXTURES / "questions.jsonl", "--tokenizer", tmp_path / "a.pt")


def test_data_py_works_from_another_drive(tmp_path):
    """os.path.relpath raises ValueError on Windows if the two paths are on different drives."""
    program = ("import os, runpy, sys\n"
               "def relpath(path, start=None): raise ValueError('path is on mount C:, start on mount D:')\n"
               "os.path.relpath = relpath\n"
               f"sys.path.insert(0, {os.path.dirname(data.__file__)!r})\n"
               f"runpy.run_path({data.__file__!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program, FIXTURES / "questions.jsonl", "--out", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_data_py_works_in_a_folder_that_was_removed(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = [sys.executable, data.__file__, FIXTURES / "questions.jsonl", "--out", tmp_path / "out"]
    program = (f"import os, subprocess; os.rmdir({str(gone)!r}); "
               f"raise SystemExit(subprocess.call({list(map(str, command))}))")
    done = subprocess.run([sys.executable, "-c", program], cwd=gone, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_reader_that_stops_reading_does_not_stop_the_work(tmp_path):
    """As with data.py … | head -1, if output is not buffered."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-u", data.__file__, FIXTURES / "questions.jsonl", "--out", tmp_path / "out"]
    subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (tmp_path / "out" / "sft_train.npy").exists()
