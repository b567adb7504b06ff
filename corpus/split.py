"""Training and validation: which side a piece of data belongs to, and how the .npy files are written."""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from script import InputError

SIDES = ("training", "validation")
BUCKETS = 1 << 16  # texts are sorted into buckets; a bucket is for training or for validation
IDS_AT_ONCE = 1 << 20
BAD_ROWS_SHOWN = 10


@dataclass
class SideCounts:
    """What went to one side: the training file or the validation file."""

    documents: int = 0
    rows: int = 0
    turns: int = 0
    tokens: int = 0
    blocks: int = 0


@dataclass
class Counts:
    """What was read and written, for the report."""

    characters: int = 0
    documents: int = 0
    byte_order_marks: int = 0
    line_ends: int = 0  # CRLF or CR, normalised to \n
    bad_rows: int = 0
    cropped: int = 0
    dropped: int = 0
    unknown: Counter = field(default_factory=Counter)  # character -> number
    forms: Counter = field(default_factory=Counter)  # form of a row -> number
    complaints: list = field(default_factory=list)  # of the first bad rows
    sides: tuple = field(default_factory=lambda: (SideCounts(), SideCounts()))

    @property
    def fewest_tokens(self):
        """The tokens of the smaller side."""
        return min(side.tokens for side in self.sides)

    def by_side(self, *names):
        """{"training": {name: number, …}, "validation": {…}}"""
        return {word: {name: getattr(side, name) for name in names}
                for word, side in zip(SIDES, self.sides, strict=True)}

    def add_bad_row(self, complaint, strict):
        """Count a row that cannot be used. Raises InputError if `strict`."""
        if strict:
            raise InputError(complaint)
        self.bad_rows += 1
        if len(self.complaints) < BAD_ROWS_SHOWN:
            self.complaints.append(complaint)

    def print_bad_rows(self, name):
        """Name the first bad rows on standard error, and say how many more there were."""
        for complaint in self.complaints:
            print(f"{complaint}; skipped", file=sys.stderr)
        if self.bad_rows > len(self.complaints):
            print(f"{name}: {self.bad_rows - len(self.complaints):,} more bad rows skipped", file=sys.stderr)

    def add_unknown(self, ids, text, tokenizer, allow_special=False):
        """Count the unknown characters of `text`, if its `ids` show that there are any."""
        if (ids == tokenizer.unknown_id).any():
            self.unknown.update(tokenizer.unknown(text, allow_special))


def validation_buckets(fraction, seed):
    """For each bucket 1 (validation, for `fraction` of them) or 0 (training), as bytes.

    With a larger fraction, the same buckets and some more are for validation."""
    return (np.random.default_rng(seed).permutation(BUCKETS) < fraction * BUCKETS).tobytes()


def sides_of_texts(texts, buckets):
    """0 (training) or 1 (validation) for each text, a list.

    The side depends on the text alone, so equal texts go to the same side."""
    return [buckets[crc32(text.strip().encode("utf-8", "surrogatepass")) % BUCKETS] for text in texts]


class NpyWriter:
    """A .npy file that is written piece by piece; its header, which numpy pads, is corrected at the end."""

    def __init__(self, path, dtype, row_shape):
        self.file = open(path, "wb+")
        self.dtype = dtype
        self.row_shape = row_shape
        self.length = 0
        self.write_header()
        self.data_start = self.file.tell()

    def write_header(self):
        """Write the header for the rows so far."""
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": self.dtype.str, "fortran_order": False, "shape": (self.length, *self.row_shape)})

    def append(self, rows):
        """rows: array of shape (n, *row_shape)."""
        self.file.write(np.ascontiguousarray(rows, self.dtype))
        self.length += len(rows)

    def move_tail(self, length, other):
        """Keep the first `length` ids of a file of ids, shape (tokens,); append the others to `other`."""
        end = self.data_start + length * self.dtype.itemsize
        self.file.seek(end)
        while block := self.file.read(IDS_AT_ONCE * self.dtype.itemsize):
            other.append(np.frombuffer(block, self.dtype))
        self.file.truncate(end)
        self.length = length

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.file:
            self.write_header()


def write_split(read_parts, paths, dtype, row_shape, fraction, least):
    """Write the parts of a data set to the training and the validation file; returns the Counts.

    read_parts: a function (fraction, counts) that yields (side, rows), rows of shape (n, *row_shape).
    Of few documents, all may by chance go to one side. While a side has fewer than `least` tokens, the
    fraction is changed and everything is written again."""
    low = 0.0
    high = 1.0
    for _ in range(20):
        counts = Counts()
        with NpyWriter(paths[0], dtype, row_shape) as training, \
                NpyWriter(paths[1], dtype, row_shape) as validation:
            writers = (training, validation)
            for side, rows in read_parts(fraction, counts):
                writers[side].append(rows)
                counts.sides[side].tokens += len(rows)
        training_tokens, validation_tokens = (side.tokens for side in counts.sides)
        hopeless = training_tokens + validation_tokens < 2 * least
        if counts.fewest_tokens >= least or hopeless:
            break
        if validation_tokens < least:
            low = fraction
        else:
            high = fraction
        fraction = min(2 * low, (low + high) / 2) if low else high / 2
    return counts


def write_tail_split(read_parts, paths, dtype, fraction):
    """Write a text so that its last `fraction` validates, as nanoGPT does; returns the Counts.

    read_parts: a function (counts) that yields ids, shape (tokens,)."""
    counts = Counts()
    with NpyWriter(paths[0], dtype, ()) as training, NpyWriter(paths[1], dtype, ()) as validation:
        for ids in read_parts(counts):
            training.append(ids)
        training.move_tail(int(training.length * (1 - fraction)), validation)
        for side, writer in zip(counts.sides, (training, validation), strict=True):
            side.tokens = writer.length
    return counts


def renumber(path, new_ids, bar):
    """Replace each token id i of a prepared file by new_ids[i], in place."""
    array = np.load(path, mmap_mode="r")
    has_mask = array.ndim == 2  # then every second number is a loss mask
    with open(path, "r+b") as file:
        file.seek(array.offset)
        while len(ids := np.fromfile(file, array.dtype, IDS_AT_ONCE)):
            tokens = ids[::2] if has_mask else ids
            tokens[:] = new_ids.take(tokens)
            file.seek(-ids.nbytes, os.SEEK_CUR)
            file.write(ids)
            bar.update(ids.nbytes)
