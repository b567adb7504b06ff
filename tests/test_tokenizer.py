import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.vocabulary import GrowingTokenizer
from script import InputError
from tokenizer import SPECIAL_TOKENS, Tokenizer, encode_conversation, encode_prompt

TEXT = "你好，CQ CQ de BD4SUR! <|eos|> 🙂\n"

# As the reference project stores it: ids as keys, other spellings, a call sign and words among the entries.
OLDER_SPECIAL = ["<|padding|>", "<|unknown|>", "<|bos|>", "<|eos|>", "<|instruct_mark|>", "<|response_mark|>",
                 "BD4SUR"]
OLDER_ENTRIES = OLDER_SPECIAL + list("ABDSU4adioruw是 ") + ["radio", "rad", "无线电", "<table>"]


@pytest.fixture
def tokenizer():
    return Tokenizer.build([TEXT])


def older_dict(**changes):
    return {"vocab_size": len(OLDER_ENTRIES), "stoi": {token: i for i, token in enumerate(OLDER_ENTRIES)},
            "itos": dict(enumerate(OLDER_ENTRIES)), "special_tokens": OLDER_SPECIAL, **changes}


def test_special_tokens_come_first_then_the_sorted_characters():
    tokenizer = Tokenizer.build(["ba", "cab"])
    assert tokenizer.itos == SPECIAL_TOKENS + ["a", "b", "c"]
    assert (tokenizer.pad_id, tokenizer.unknown_id, tokenizer.bos_id, tokenizer.eos_id,
            tokenizer.instruct_id, tokenizer.response_id) == (0, 1, 2, 3, 4, 5)
    assert tokenizer.vocab_size == 9


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_known_text_survives_the_round_trip(data):
    characters = data.draw(st.lists(st.characters(exclude_categories=["Cs"]), min_size=1, unique=True))
    tokenizer = Tokenizer.build(characters)
    text = data.draw(st.text(st.sampled_from(characters)))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|eo", "<", "|>", "<|<|eos|>", "中", "a"])))
@settings(max_examples=100, deadline=None)
def test_text_with_special_tokens_survives_the_round_trip(pieces):
    text = "".join(pieces)
    tokenizer = Tokenizer.build([*SPECIAL_TOKENS, "中a"])
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(ids) == text
    assert (ids < 6).sum() == sum(text.count(token) for token in SPECIAL_TOKENS)


def test_special_token_text_is_plain_unless_asked_for(tokenizer):
    plain, special = tokenizer.encode("CQ<|eos|>"), tokenizer.encode("CQ<|eos|>", allow_special=True)
    assert plain.min() >= len(SPECIAL_TOKENS)
    assert len(plain) == 9
    assert special.tolist() == [*tokenizer.encode("CQ"), tokenizer.eos_id]


@pytest.mark.parametrize("text", ["\ud800", "\udfff", "\ufffe", "\U0010ffff", "\0"])
def test_an_odd_code_point_is_unknown(tokenizer, text):
    assert tokenizer.encode(text).tolist() == [tokenizer.unknown_id]


@pytest.mark.parametrize("text", [
    "\ud802", "\ud802<|eos|>", "C\ud803Q<|bos|>\U0001f4fb", "\U0001f4fb\udfff\ud800"])
def test_a_lone_surrogate_is_no_special_token(tokenizer, text):
    """Within the tokenizer surrogates stand for special tokens, so that a token is one number."""
    special = {"<|eos|>": tokenizer.eos_id, "<|bos|>": tokenizer.bos_id}
    pieces = re.findall(r"<\|\w+\|>|.", text)
    expected = [special.get(piece, tokenizer.stoi.get(piece, tokenizer.unknown_id)) for piece in pieces]
    assert tokenizer.encode(text, allow_special=True).tolist() == expected


def test_unknown_characters_are_counted_and_special_tokens_are_none_of_them():
    tokenizer = Tokenizer.build(["ab"])
    text = "a中<|unknown|><|eos|>b中\U0001f4fb"
    assert tokenizer.unknown(text, allow_special=True) == {"中": 2, "\U0001f4fb": 1}
    assert tokenizer.unknown("<a|") == {"<": 1, "|": 1}
    assert tokenizer.unknown("ab") == {}


@given(st.lists(st.text(st.sampled_from("cab中\U0001f4fb\ud800<|>os"), max_size=20)))
@settings(max_examples=100, deadline=None)
def test_a_growing_tokenizer_ends_up_as_one_that_knew_all_before(texts):
    growing, whole = GrowingTokenizer("<u2"), Tokenizer.build(texts)
    encoded = [growing.encode(text) for text in texts]
    tokenizer, new_ids = growing.in_order()
    assert tokenizer.to_dict() == whole.to_dict()
    for text, ids in zip(texts, encoded, strict=True):
        assert new_ids[ids].tolist() == whole.encode(text).tolist()


def test_a_growing_tokenizer_leaves_the_letters_of_special_tokens_out():
    growing = GrowingTokenizer("<u2")
    growing.encode("<|bos|>xy<|eos|>", allow_special=True)
    assert growing.in_order()[0].itos == [*SPECIAL_TOKENS, "x", "y"]


def test_a_growing_tokenizer_says_when_its_ids_are_too_short():
    growing = GrowingTokenizer("<u2")
    growing.encode("".join(map(chr, range(0x20000, 0x20000 + 65535 - len(SPECIAL_TOKENS)))))
    with pytest.raises(OverflowError):
        growing.encode("a")


def test_a_lone_surrogate_does_not_enter_the_vocabulary():
    assert Tokenizer.build(["a\ud800b"]).itos == SPECIAL_TOKENS + ["a", "b"]


def test_ids_take_two_bytes_until_the_vocabulary_is_too_large():
    characters = [chr(code) for code in range(0x20000, 0x20000 + 65535 - len(SPECIAL_TOKENS))]
    small, large = Tokenizer.build(characters), Tokenizer.build([*characters, "a"])
    assert small.encode("x").dtype == np.uint16
    assert large.encode("x").dtype == np.uint32
    assert large.decode(large.encode(characters[-1])) == characters[-1]


def test_decode_takes_an_id_a_list_and_an_array(tokenizer):
    ids = tokenizer.encode("CQ")
    assert tokenizer.decode(int(ids[0])) == tokenizer.decode(ids[0]) == "C"
    assert tokenizer.decode(ids.tolist()) == tokenizer.decode(ids.astype(np.int64)) == "CQ"
    assert tokenizer.decode([]) == ""


def test_decode_can_skip_special_tokens(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("CQ"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<|bos|>CQ<|eos|>"
    assert tokenizer.decode(ids, skip_special=True) == "CQ"
    assert tokenizer.decode([tokenizer.eos_id], skip_special=True) == ""


@pytest.mark.parametrize("ids", [-1, [0, 10**6], [1.5], ["a"], np.array([2**40])])
def test_decode_refuses_what_is_no_id(tokenizer, ids):
    with pytest.raises(InputError):
        tokenizer.decode(ids)


def test_a_saved_tokenizer_loads_equal_and_leaves_no_temporary_file(tokenizer, tmp_path):
    path = tmp_path / "a b;c.json"
    tokenizer.save(path)
    assert Tokenizer.load(path).to_dict() == tokenizer.to_dict()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_keeps_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    before = path.read_bytes()

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InputError, match="tokenizer.json: cannot be written .No space"):
        Tokenizer.build(["other"]).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content, complaint", [
    ("{", "not valid JSON"),
    ("[]", "JSON object"),
    ("{}", "vocab_size"),
    ({"vocab_size": 7, "itos": [*SPECIAL_TOKENS, "a"]}, "special_tokens"),
    ({"vocab_size": 8, "special_tokens": SPECIAL_TOKENS, "itos": [*SPECIAL_TOKENS, "a", "a"]}, "'a' occurs"),
    ({"vocab_size": 9, "special_tokens": SPECIAL_TOKENS, "itos": [*SPECIAL_TOKENS, "a"]}, "vocab_size is 9"),
    ({"vocab_size": 7, "special_tokens": SPECIAL_TOKENS, "itos": [*SPECIAL_TOKENS, 5]}, "non-empty string"),
    ({"vocab_size": 7, "special_tokens": SPECIAL_TOKENS[:5], "itos": [*SPECIAL_TOKENS, "a"]}, "responsemark"),
    ({"vocab_size": 2, "special_tokens": SPECIAL_TOKENS, "itos": ["a", "b"]}, "Padding"),
    ({"vocab_size": 2, "special_tokens": 3, "itos": ["a", "b"]}, "special_tokens"),
    ({"vocab_size": 3000, "special_tokens": [f"<|{n}|>" for n in range(3000)],
      "itos": [f"<|{n}|>" for n in range(3000)]}, "at most 2047"),
])
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, content, complaint):
    path = tmp_path / "broken.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=complaint) as error:
        Tokenizer.load(str(path))
    assert str(error.value).startswith(str(path))


def test_an_older_dict_finds_its_special_tokens_by_either_spelling():
    tokenizer = Tokenizer.from_dict(older_dict())
    assert (tokenizer.pad_id, tokenizer.unknown_id, tokenizer.bos_id, tokenizer.eos_id,
            tokenizer.instruct_id, tokenizer.response_id) == (0, 1, 2, 3, 4, 5)


def test_an_older_dict_encodes_the_longest_entry_that_matches():
    tokenizer = Tokenizer.from_dict(older_dict())
    assert [tokenizer.itos[i] for i in tokenizer.encode("radio rad ra无线电")] == [
        "radio", " ", "rad", " ", "r", "a", "无线电"]
    assert [tokenizer.itos[i] for i in tokenizer.encode("无线")] == ["<|unknown|>", "<|unknown|>"]


def test_the_call_sign_of_an_older_dict_is_a_word_in_any_text():
    tokenizer = Tokenizer.from_dict(older_dict())
    assert tokenizer.encode("是BD4SUR").tolist() == [OLDER_ENTRIES.index("是"), 6]
    assert tokenizer.decode([6], skip_special=True) == "BD4SUR"


def test_an_older_dict_keeps_special_token_text_plain_unless_asked_for():
    tokenizer = Tokenizer.from_dict(older_dict())
    assert 3 not in tokenizer.encode("w<|eos|>")
    assert tokenizer.encode("w<|eos|>", allow_special=True).tolist() == [OLDER_ENTRIES.index("w"), 3]


def test_an_older_dict_loads_from_json_and_survives_our_own_format():
    stored = json.dumps(older_dict(special_tokens={token: i for i, token in enumerate(OLDER_SPECIAL)}))
    tokenizer = Tokenizer.from_dict(json.loads(stored))
    again = Tokenizer.from_dict(tokenizer.to_dict())
    assert again.encode("radio 是BD4SUR").tolist() == tokenizer.encode("radio 是BD4SUR").tolist()


def test_an_older_dict_that_contradicts_itself_is_refused():
    with pytest.raises(InputError, match="contradict"):
        Tokenizer.from_dict(older_dict(stoi={"a": 0}))
    with pytest.raises(InputError, match="every id"):
        Tokenizer.from_dict(older_dict(itos={i + 1: token for i, token in enumerate(OLDER_ENTRIES)}))


def test_mask_covers_the_answer_and_its_eos_only(tokenizer):
    ids, mask = encode_conversation(tokenizer, [("CQ", "de"), ("你", "好")])
    assert tokenizer.decode(ids) == ("<|InstructMark|>CQ<|ResponseMark|>de<|eos|>"
                                     "<|InstructMark|>你<|ResponseMark|>好<|eos|>")
    assert tokenizer.decode(ids[mask == 1]) == "de<|eos|>好<|eos|>"
    assert ids.dtype == tokenizer.dtype and len(ids) == len(mask)


def test_a_prompt_is_the_beginning_of_the_conversation_that_it_asks_for(tokenizer):
    prompt = encode_prompt(tokenizer, [("CQ", "de")], "你")
    ids, _ = encode_conversation(tokenizer, [("CQ", "de"), ("你", "好")])
    assert prompt.tolist() == ids[:len(prompt)].tolist()
    assert prompt[-1] == tokenizer.response_id


def test_special_token_text_in_a_question_or_an_answer_stays_plain_characters(tokenizer):
    ids, _ = encode_conversation(tokenizer, [("<|eos|>", "<|eos|>")])
    assert (ids == tokenizer.eos_id).sum() == 1
    assert len(ids) == 7 + 7 + 3
