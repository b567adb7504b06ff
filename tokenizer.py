"""The character tokenizer: one character, one token.

    python data.py --pretrain input.txt      # builds one and writes dataset/tokenizer.json

In Python:

    tokenizer = Tokenizer.load("dataset/tokenizer.json")
    ids = tokenizer.encode("CQ CQ CQ")       # numpy array, shape (tokens,)
    text = tokenizer.decode(ids)

Ids 0 to 5 are the special tokens, then come the distinct characters of the text, sorted.
"""

import functools
import hashlib
import json
import os
from collections import Counter

import numpy as np

from config import read_json
from script import InputError, atomic_write

SPECIAL_TOKENS = ["<|Padding|>", "<|unknown|>", "<|bos|>", "<|eos|>", "<|InstructMark|>", "<|ResponseMark|>"]
CODE_POINTS = 0x110000
LONG = 0xFFFFFFFF  # marks an entry of several characters, which has no single code point
# Surrogates are code points that no character has: here they represent the special tokens.
SPECIAL_CODES = range(0xD800, 0xDFFF)
NO_CHARACTER = 0xDFFF


def code_points(text):
    """The Unicode code points of a string, shape (characters,), uint16 where they fit, or else uint32.

    A lone surrogate, which cannot be written to a file, becomes NO_CHARACTER."""
    try:
        codes = np.frombuffer(text.encode("utf-16-le"), "<u2")
        if len(codes) == len(text):  # no character takes two
            return codes
    except UnicodeEncodeError:
        pass
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").copy()
    codes[is_surrogate(codes)] = NO_CHARACTER
    return codes


def is_surrogate(codes):
    """Whether code points (a number or an array) are halves of a surrogate pair."""
    return codes >> 11 == NO_CHARACTER >> 11


class Tokenizer:
    """A vocabulary and the lookup tables that make encoding and decoding one NumPy call each.

    itos: list, token id -> string.
    stoi: dict, string -> token id.
    special_tokens: the entries of the form <|…|>, which `encode` recognises only if asked to.
    pad_id, unknown_id, bos_id, eos_id, instruct_id, response_id: their ids.
    dtype: the type of encoded ids, uint16 if the vocabulary fits.
    name: where the vocabulary comes from (a file), for messages.
    """

    def __init__(self, itos, special_tokens, where="tokenizer"):
        self.name = where
        self.itos = itos
        self.stoi = {token: i for i, token in enumerate(itos)}
        if len(self.stoi) < len(itos):
            twice = next(token for i, token in enumerate(itos) if self.stoi[token] != i)
            raise InputError(f"{where}: the entry {twice!r} occurs twice")
        self.vocab_size = len(itos)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 65535 else "<u4")
        self.special_tokens = special_tokens
        self._find_special_ids(where)
        self._build_tables()

    def _find_special_ids(self, where):
        # The reference project spells <|instruct_mark|> where we spell <|InstructMark|>.
        ids = {token.strip("<|>").replace("_", "").lower(): self.stoi[token] for token in self.special_tokens}
        for role in ("padding", "unknown", "bos", "eos", "instructmark", "responsemark"):
            if role not in ids:
                raise InputError(f"{where}: has no special token <|{role}|>")
        self.pad_id = ids["padding"]
        self.unknown_id = ids["unknown"]
        self.bos_id = ids["bos"]
        self.eos_id = ids["eos"]
        self.instruct_id = ids["instructmark"]
        self.response_id = ids["responsemark"]

    def _build_tables(self):
        self._id_of_code = np.full(CODE_POINTS, self.unknown_id, dtype=self.dtype)
        self._code_of_id = np.full(self.vocab_size, LONG, dtype="<u4")
        self._is_special = np.zeros(self.vocab_size, dtype=bool)
        self._is_special[[self.stoi[token] for token in self.special_tokens]] = True
        self._word_lengths = {}  # first character -> lengths of the words that begin with it, longest first
        for i, token in enumerate(self.itos):
            if len(token) == 1:
                self._id_of_code[ord(token)] = i
                self._code_of_id[i] = ord(token)
            elif not self._is_special[i]:
                self._word_lengths.setdefault(token[0], set()).add(len(token))
        self._special_codes = dict(zip(self.special_tokens, SPECIAL_CODES, strict=False))
        for token, code in self._special_codes.items():
            self._id_of_code[code] = self.stoi[token]
        for first, lengths in self._word_lengths.items():
            self._word_lengths[first] = sorted(lengths, reverse=True)

    @functools.cached_property
    def fingerprint(self):
        """16 hexadecimal digits that differ for different vocabularies (the start of a SHA-256)."""
        content = json.dumps([self.itos, sorted(self.special_tokens)])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def build(cls, texts):
        """A tokenizer of every distinct character of `texts` (strings, or single characters)."""
        characters = set()
        for text in texts:
            characters.update(text)
        characters = sorted(c for c in characters if not is_surrogate(ord(c)))
        return cls(SPECIAL_TOKENS + characters, SPECIAL_TOKENS)

    def encode(self, text, allow_special=False):
        """Token ids of a string, shape (tokens,), dtype `self.dtype`; unknown characters become unknown_id.

        With `allow_special`, the text of a special token becomes that token; without, it stays ordinary
        characters, so that nobody can end a turn by typing <|eos|> into a question.
        """
        if self._word_lengths:
            return self._encode_words(text, allow_special)
        return self._id_of_code.take(self._codes(text, allow_special))

    def _codes(self, text, allow_special):
        """The code points of a text, shape (tokens,); special tokens, if allowed, are among SPECIAL_CODES."""
        codes = code_points(text)
        if not (allow_special and "<|" in text):
            return codes
        merged = codes.copy()
        keep = np.ones(len(codes), dtype=bool)
        opened = np.flatnonzero(codes[:-1] == ord("<"))
        opened = opened[codes[opened + 1] == ord("|")]
        for token, code in self._special_codes.items():
            at = opened[opened <= len(codes) - len(token)]
            for i, character in enumerate(token):
                at = at[codes[at + i] == ord(character)]
            merged[at] = code
            for i in range(1, len(token)):
                keep[at + i] = False
        return merged[keep]

    def unknown(self, text, allow_special=False):
        """The characters of a text that are not in the vocabulary, with their numbers, as a Counter."""
        codes = self._codes(text, allow_special)
        codes = codes[self._id_of_code.take(codes) == self.unknown_id].astype("<u4")
        codes = codes[codes != self._special_codes[self.itos[self.unknown_id]]]
        return Counter(str(codes, "utf-32-le", "surrogatepass"))

    def _encode_words(self, text, allow_special):
        """Repeatedly take the longest entry that matches: the reference project's rule for words."""
        ids = []
        start = 0
        special_lengths = sorted({len(token) for token in self.special_tokens}, reverse=True)
        while start < len(text):
            lengths = [*self._word_lengths.get(text[start], ()), 1]
            if allow_special and text.startswith("<|", start):
                lengths = special_lengths + lengths
            for length in lengths:
                token = text[start:start + length]
                found = self.stoi.get(token)
                if found is not None and (allow_special or not self._is_special[found]):
                    break
            ids.append(self.unknown_id if found is None else found)
            start += len(token)
        return np.array(ids, dtype=self.dtype)

    def decode(self, ids, skip_special=False):
        """The text of one id, a list or an array of ids. Raises InputError for ids that are not in itos."""
        ids = np.asarray(ids).reshape(-1)
        if ids.size == 0:
            return ""
        if ids.dtype.kind not in "iu":
            raise InputError(f"token ids must be integers, not {ids.dtype}")
        for extreme in (int(ids.min()), int(ids.max())):
            if not 0 <= extreme < self.vocab_size:
                raise InputError(f"token id {extreme} is not in the vocabulary (0 to {self.vocab_size - 1})")
        if skip_special:
            ids = ids[~self._is_special[ids]]
        codes = self._code_of_id.take(ids)
        long = np.flatnonzero(codes == LONG)
        codes[long] = 0  # a placeholder for an entry of several characters
        text = str(codes, "utf-32-le", "surrogatepass")
        pieces = []
        start = 0
        for i in long.tolist():
            pieces += [text[start:i], self.itos[ids[i]]]
            start = i + 1
        return "".join([*pieces, text[start:]]) if pieces else text

    def to_dict(self):
        """Plain lists and numbers, for a JSON file or a checkpoint's `tokenizer_config`."""
        return {"vocab_size": self.vocab_size, "special_tokens": self.special_tokens, "itos": self.itos}

    @classmethod
    def from_dict(cls, values, where="tokenizer_config"):
        """The opposite of `to_dict`; also accepts the reference project's dicts (itos keyed by id, words).

        Raises InputError that begins with `where` if keys are missing or contradict each other."""
        for key in ("vocab_size", "special_tokens", "itos"):
            if key not in values:
                raise InputError(f'{where}: the key "{key}" is missing')
        itos = values["itos"]
        if isinstance(itos, dict):
            by_id = {str(i): token for i, token in itos.items()}  # JSON turns the ids into strings
            itos = [by_id.get(str(i)) for i in range(len(by_id))]
        if not isinstance(itos, list) or not all(isinstance(token, str) and token for token in itos):
            raise InputError(f"{where}: itos must give a non-empty string for every id from 0 on")
        if values["vocab_size"] != len(itos):
            raise InputError(f"{where}: vocab_size is {values['vocab_size']!r}, but itos has {len(itos)}")
        if "stoi" in values and values["stoi"] != {token: i for i, token in enumerate(itos)}:
            raise InputError(f"{where}: stoi and itos contradict each other")
        if not isinstance(values["special_tokens"], (list, dict)):
            raise InputError(f"{where}: special_tokens must be a list")
        # The reference project lists BD4SUR, a call sign, among its special tokens. It is a word that people
        # type and that the model says, so it is treated as one.
        special_tokens = [token for token in values["special_tokens"]
                          if isinstance(token, str) and token.startswith("<|") and token.endswith("|>")]
        if len(special_tokens) > len(SPECIAL_CODES):
            raise InputError(f"{where}: {len(special_tokens)} special tokens, but there may be at most "
                             f"{len(SPECIAL_CODES)}")
        for token in special_tokens:
            if token not in itos:
                raise InputError(f"{where}: the special token {token!r} is not in itos")
        return cls(itos, special_tokens, where)

    def save(self, path):
        """Write the tokenizer as JSON, whole or not at all. Raises InputError naming the file."""
        with atomic_write(path, "w") as file:
            json.dump(self.to_dict(), file)

    @classmethod
    def load(cls, path):
        """A tokenizer from its JSON file. Raises InputError naming the file and what is wrong with it."""
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file; python data.py writes it")
        if is_checkpoint(path):
            raise InputError(f"{path}: a checkpoint, not a tokenizer; run python checkpoint.py {path} "
                             "tokenizer.json, then give that file")
        return cls.from_dict(read_json(path), str(path))


def is_checkpoint(path):
    """Whether a file begins as torch.save's files do (a zip archive, or a pickle in old ones)."""
    try:
        with open(path, "rb") as file:
            return file.read(4).startswith((b"PK", b"\x80"))
    except OSError:
        return False  # read_json says what is wrong


def join_ids(tokenizer, parts):
    """Arrays and lists of ids concatenated, shape (tokens,), in the tokenizer's dtype."""
    return np.concatenate(parts, dtype=tokenizer.dtype, casting="unsafe")


def encode_question(tokenizer, question):
    """<|InstructMark|>question<|ResponseMark|>, shape (tokens,). The question's own text is never special."""
    return join_ids(tokenizer, [[tokenizer.instruct_id], tokenizer.encode(question), [tokenizer.response_id]])


def encode_conversation(tokenizer, turns):
    """Ids and loss mask of a conversation, a list of (question, answer) that may be empty.

    A turn is <|InstructMark|>question<|ResponseMark|>answer<|eos|>. mask[i] is 1 if predicting token i
    counts: the answer and its <|eos|>. Returns (ids, mask), both of shape (tokens,), mask uint8.
    """
    parts = [[]]
    counts = [np.empty(0, np.uint8)]
    for question, answer in turns:
        asked = encode_question(tokenizer, question)
        answered = tokenizer.encode(answer)
        parts += [asked, answered, [tokenizer.eos_id]]
        counts += [np.zeros(len(asked), np.uint8), np.ones(len(answered) + 1, np.uint8)]
    return join_ids(tokenizer, parts), np.concatenate(counts)


def encode_prompt(tokenizer, turns, question):
    """What the model reads before it answers: the turns so far, list of (question, answer), and the question.

    Returns ids, shape (tokens,), that end with <|ResponseMark|>."""
    history, _ = encode_conversation(tokenizer, turns)
    return join_ids(tokenizer, [history, encode_question(tokenizer, question)])
