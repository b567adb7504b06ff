"""studies/bpe.py against its definition and against the tokenizers package; studies/bpe_compare.py."""

import json
import unicodedata
from collections import Counter

import numpy as np
import pytest
from conftest import TEXT
from hypothesis import given
from hypothesis import strategies as st

from studies import bpe, bpe_compare

SAMPLE = TEXT + ("CQ CQ CQ de BD4SUR, it's 3.5 MHz; we'll QSY  to 7 MHz!\n\n 今天天气很好，今天通联。"
                 " ½ ²\t é 🙂🙂") * 3
# Characters that every version of Unicode in use puts into one category.
OLD = st.characters(max_codepoint=0xFFFF, exclude_categories=("Cn", "Co", "Cs", "Mn", "Mc", "Lo", "So", "Sk"))
TEXTS = st.text(st.one_of(st.sampled_from("aeth'sl \n\t12.,今天的，。🙂é½"), OLD), max_size=60)


def train_by_recounting(text, vocab_size):
    """The definition: count all pairs of all chunks, merge the commonest, and count again."""
    words = [tuple(chunk.encode()) for chunk in bpe.chunks(text)]
    merges = []
    while 256 + len(merges) < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        if not counts or max(counts.values()) < 2:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        for number, word in enumerate(words):
            merged = []
            for token in word:
                merged.append(token)
                if tuple(merged[-2:]) == pair:
                    merged[-2:] = [255 + len(merges)]
            words[number] = tuple(merged)
    return merges


def in_tokenizers(encoder):
    """The same vocabulary in the tokenizers package, which writes bytes as printable characters."""
    tokenizers = pytest.importorskip("tokenizers", reason="make test-export")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    written = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    names = ["".join(written[byte] for byte in token) for token in encoder.vocab]
    merges = [(names[ord(first)], names[ord(second)]) for first, second in encoder.rank]
    package = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=merges))
    package.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return package


@pytest.fixture(scope="module")
def encoder():
    return bpe.BPE(bpe.train(SAMPLE, 400))


@pytest.mark.parametrize("text", [SAMPLE[:1500], "aaaaaaa aaaa aaa" * 9, "ababab abab ab" * 5,
                                  "今天今天天今" * 9])
def test_kept_counts_give_the_merges_of_counting_anew(text):
    assert bpe.train(text, 330) == train_by_recounting(text, 330)


@given(st.text(st.sampled_from("ab c"), max_size=80))
def test_merges_of_short_texts_are_those_of_the_definition(text):
    assert bpe.train(text, 300) == train_by_recounting(text, 300)


@given(TEXTS)
def test_decoding_gives_the_text_back(encoder, text):
    assert encoder.decode(encoder.encode(text)) == text
    assert "".join(bpe.chunks(text)) == text


def test_ids_are_those_of_the_tokenizers_package(encoder):
    package = in_tokenizers(encoder)
    assert package.encode(SAMPLE).ids == encoder.encode(SAMPLE)

    @given(TEXTS)
    def check(text):
        assert package.encode(text).ids == encoder.encode(text), text
    check()


def test_a_text_without_pairs_has_no_merges():
    assert bpe.train("", 300) == bpe.train("a", 300) == bpe.train("ab", 300) == []
    with pytest.raises(ValueError, match="must be at most"):
        bpe.train("ab", 60_000)


def test_broken_bytes_are_decoded_as_replacement_characters(encoder):
    assert encoder.decode([0xE4, 0x41]) == "\ufffdA"


def test_letters_and_numbers_are_those_of_unicode():
    pattern = bpe.chunk_pattern()
    for character in "aé今½²٣_-\u200b \x1c":
        kind = unicodedata.category(character)[0]
        chunk = pattern.findall(f"a{character}")
        assert (len(chunk) == 1) == (kind == "L"), repr(character)


def test_the_comparison_trains_both_and_reports_bits_per_byte(workspace, capsys):
    (workspace.path / "text.txt").write_text("电台通联今天天气 the same words. " * 300)
    with workspace.here("bpe_compare", "--texts", "text.txt", "--vocabularies", "280", "300", "--seeds", "2",
                        "--flops", "5e8", "--n_layer", "1", "--n_head", "2", "--n_embd", "16",
                        "--block_size", "32", "--out", "picture"):
        bpe_compare.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [row["tokens"] for row in rows] == ["characters", "BPE 280", "BPE 300"]
    assert rows[0]["tokens_per_character"] == 1 > rows[2]["tokens_per_character"]
    flops = [row["steps"] * bpe_compare_flops(row) for row in rows]
    assert max(flops) < 1.2 * min(flops)
    for row in rows:
        assert len(set(row["bits_per_byte_runs"])) == 2 and 0 < row["bits_per_byte"] < 8
        assert np.mean(row["bits_per_byte_runs"]) == pytest.approx(row["bits_per_byte"])
    assert (workspace.path / "picture.png").read_bytes().startswith(b"\x89PNG")


def bpe_compare_flops(row):
    """Of a training step, but for constants: parameters, and the attention of the tiny shape."""
    return 6 * row["parameters"] + 12 * 16 * 32


def test_a_missing_text_is_named_before_anything_is_trained(workspace):
    assert "gone.txt: no such file" in workspace.refused(bpe_compare.main, "--texts", "gone.txt")


def test_the_text_in_the_dataset_folder_is_compared_if_none_is_named(workspace, monkeypatch, capsys):
    monkeypatch.setattr(bpe_compare, "ROOT", str(workspace.path))
    with workspace.here("bpe_compare"):
        with pytest.raises(SystemExit):
            bpe_compare.command_line()
        assert "the following arguments are required: --texts" in capsys.readouterr().err
        for name in ("sample_pretrain.txt", "pretrain.txt"):
            path = workspace.path / "dataset" / name
            path.write_text("a text")
            assert bpe_compare.command_line().texts == [str(path)]
