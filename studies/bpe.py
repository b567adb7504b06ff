"""Byte-level byte pair encoding (BPE): how GPT-2's kind of tokenizer is trained, and how it encodes.

    merges = train(text, 1024)            # 256 bytes and 768 merges: a vocabulary of 1,024
    ids = BPE(merges).encode("CQ CQ")     # a list of ints
    text = BPE(merges).decode(ids)

The idea (Gage 1994; Sennrich et al. 2016; on bytes: Radford et al. 2019): write the text as bytes, find the
pair of neighbours that occurs most often, and make it a new token. Repeat. To encode, apply the merges that
the text allows, the earliest learnt first. No merge reaches across two chunks, so that a word does not get
one token with the blank after it and another with the full stop. As all bytes are tokens, no text is unknown.

The pipeline itself uses characters (tokenizer.py); studies/bpe_compare.py compares the two.
"""

import functools
import heapq
import re
import unicodedata
from collections import Counter, defaultdict

# ---- Chunks ----


@functools.cache
def character_class(category):
    """The characters of a Unicode category ("L": letters, "N": numbers), as the inside of a regex class."""
    codes = [c for c in range(0x110000) if unicodedata.category(chr(c)).startswith(category)]
    ranges = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


@functools.cache
def chunk_pattern():
    """GPT-2's rule, for which Python's re lacks \\p{L} and \\p{N}: English endings, words and numbers with
    the blank before them, runs of other characters, white space."""
    letters = character_class("L")
    numbers = character_class("N")
    blanks = r"\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
    return re.compile(f"'(?:[sdmt]|ll|ve|re)| ?[{letters}]+| ?[{numbers}]+| ?[^{blanks}{letters}{numbers}]+|"
                      f"[{blanks}]+(?![^{blanks}])|[{blanks}]+")


def chunks(text):
    """The text cut into the chunks that are encoded one by one, a list of strings."""
    return chunk_pattern().findall(text)


# ---- Training ----

# A word is a string whose characters are token ids, chr(id), so that `str.replace` is a merge: both go from
# left to right. Such a string can hold ids up to the surrogates.
LARGEST_VOCABULARY = 0xD800


def pairs_in(word):
    """The pairs of neighbours in a word, as tuples of two characters."""
    return zip(word, word[1:], strict=False)


def train(text, vocab_size):
    """The merges for a vocabulary of `vocab_size`: a list of pairs of ids; merge n makes the id 256 + n.

    The pair that occurs most often is merged, of equally frequent ones the smallest. Fewer merges come out if
    no pair is left that occurs twice. Raises ValueError for more than LARGEST_VOCABULARY."""
    if vocab_size > LARGEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}, but must be at most {LARGEST_VOCABULARY}")
    frequency = Counter(chunk.encode().decode("latin-1") for chunk in chunks(text))
    words = list(frequency)  # the distinct chunks
    times = list(frequency.values())
    counts = Counter()
    holders = defaultdict(set)  # pair -> numbers of the words that hold it
    for number, word in enumerate(words):
        for pair, n in Counter(pairs_in(word)).items():
            counts[pair] += n * times[number]
            holders[pair].add(number)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and 256 + len(merges) < vocab_size:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:
            continue  # counted before a merge changed it; its newer entry is in the heap as well
        if -n < 2:
            break
        new = chr(256 + len(merges))
        merges.append((ord(pair[0]), ord(pair[1])))
        # Only the words that hold the pair change, and of their pairs only some.
        changed = set()
        for number in holders[pair].copy():
            before = Counter(pairs_in(words[number]))
            words[number] = words[number].replace("".join(pair), new)
            after = Counter(pairs_in(words[number]))
            for other in {other for other, _ in before.items() ^ after.items()}:
                counts[other] += (after[other] - before[other]) * times[number]
                changed.add(other)
                if after[other]:
                    holders[other].add(number)
                else:
                    holders[other].discard(number)
        for other in changed:
            heapq.heappush(heap, (-counts[other], other))
    return merges


# ---- Encoding ----


class BPE:
    """A vocabulary of 256 bytes and the merges of `train`.

    vocab: list, token id -> bytes."""

    def __init__(self, merges):
        self.rank = {(chr(first), chr(second)): n for n, (first, second) in enumerate(merges)}
        self.vocab = [bytes([byte]) for byte in range(256)]
        for first, second in merges:
            self.vocab.append(self.vocab[first] + self.vocab[second])
        self.encode_chunk = functools.cache(self.encode_chunk)  # words come again and again

    @property
    def vocab_size(self):
        return len(self.vocab)

    def encode_chunk(self, chunk):
        """The ids of one chunk, a list: of the pairs in it, the one learnt first is merged, until none is."""
        word = chunk.encode("utf-8", "surrogatepass").decode("latin-1")
        while found := self.rank.keys() & set(pairs_in(word)):
            pair = min(found, key=self.rank.get)
            word = word.replace("".join(pair), chr(256 + self.rank[pair]))
        return [ord(character) for character in word]

    def encode(self, text):
        """The ids of a text, a list of ints."""
        return [i for chunk in chunks(text) for i in self.encode_chunk(chunk)]

    def decode(self, ids):
        """The text of some ids; bytes that are no UTF-8, as a model may output, become U+FFFD."""
        return b"".join(self.vocab[i] for i in ids).decode("utf-8", "replace")
