"""Instruction data: conversations encoded as ids with a loss mask, split into training and validation."""

import tempfile
from itertools import islice

import numpy as np

from corpus.forms import WANTED, form_of, read_rows, turns_of
from corpus.inputs import HEAD, ROWS, not_utf8, open_inputs, progress
from corpus.split import Counts, sides_of_texts, validation_buckets, write_split
from script import InputError
from tokenizer import encode_conversation

ROWS_AT_ONCE = 1000


def read_conversations(sources, counts, strict=False):
    """Yield the turns, a list of (question, answer), of each good row of the sources; bad ones are counted.

    Raises InputError at the first bad row if `strict`."""
    for source in sources:
        def complain(place, reason, source=source):
            counts.add_bad_row(f"{source.name}, {place}: {reason}", strict)

        with progress(source.path, source.name) as bar:
            for place, row in read_rows(source.path, source.name, bar, complain):
                try:
                    turns = turns_of(row)
                except ValueError as error:
                    complain(place, str(error))
                else:
                    counts.forms[" + ".join(form_of(row) or ["messages"])] += 1
                    yield turns


def load_conversations(path, encoding=None, password=None):
    """The conversations of a file (or folder, glob, archive), in any form that data.py --sft reads.

    Returns a list of lists of (question, answer). Raises InputError naming the first row that is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        sources = open_inputs([path], ROWS, folder, encoding, password)
        conversations = list(read_conversations(sources, Counts(), strict=True))
    if not conversations:
        raise InputError(f"{path}: holds no rows")
    return conversations


def encode_row(turns, tokenizer, args, counts):
    """A conversation as (row, cropped): ids and loss mask, shape (tokens, 2), ended by <|Padding|>.

    The row is None if it is to be dropped. A row of block_size + 1 tokens makes block_size predictions."""
    ids, mask = encode_conversation(tokenizer, turns)
    counts.add_unknown(ids, "".join([text for turn in turns for text in turn]), tokenizer)
    cropped = len(ids) > args.block_size + 1
    if cropped:
        answered = np.flatnonzero(mask[:args.block_size + 1])
        if args.long_rows == "drop" or not len(answered):
            return None, False
        end = answered[-1] + 1  # not within a later question, which would teach nothing
        ids = ids[:end]
        mask = mask[:end]
    row = np.full((len(ids) + 1, 2), (tokenizer.pad_id, 0), tokenizer.dtype)
    row[:-1, 0] = ids
    row[:-1, 1] = mask
    return row, cropped


def split_rows(sources, tokenizer, args, fraction, counts):
    """Yield (side, rows), rows of shape (tokens, 2).

    The first question decides on the side, so that the same prompt is never on both."""
    buckets = validation_buckets(fraction, args.seed)
    conversations = read_conversations(sources, counts, args.strict)
    while batch := list(islice(conversations, ROWS_AT_ONCE)):
        rows = ([], [])
        for turns in batch:
            row, cropped = encode_row(turns, tokenizer, args, counts)
            if row is None:
                counts.dropped += 1
                continue
            [side] = sides_of_texts([turns[0][0]], buckets)
            rows[side].append(row)
            counts.sides[side].rows += 1
            counts.sides[side].turns += len(turns)
            counts.cropped += cropped
        for side in range(2):
            if rows[side]:
                yield side, np.concatenate(rows[side])


def prepare_rows(name, sources, tokenizer, args, paths):
    """Encode the instruction data of some sources into `paths`, the training and the validation file.

    Returns (numbers for the report, Counts). Raises InputError if the rows are too few or too long."""
    counts = write_split(lambda fraction, counts: split_rows(sources, tokenizer, args, fraction, counts),
                         paths, tokenizer.dtype, (2,), args.val_fraction, least=1)
    training, validation = counts.sides
    n_used = training.rows + validation.rows
    if not n_used + counts.dropped:
        raise InputError(why_no_row(name, sources, counts))
    counts.print_bad_rows(name)
    if not n_used:
        raise InputError(f"{name}: no row fits into --block_size {args.block_size}; give a larger one")
    if not (training.rows and validation.rows):
        raise InputError(f"{name}: needs at least two different questions, one of them for validation")
    numbers = {"file": name, "forms": dict(counts.forms), "bad_rows": counts.bad_rows,
               "cropped": counts.cropped, "dropped": counts.dropped}
    return {**numbers, **counts.by_side("rows", "turns", "tokens")}, counts


def why_no_row(name, sources, counts):
    """One line for data without a single good row: what is wrong with the first, and what is wanted."""
    if not counts.bad_rows:
        return f"{name}: is empty; give rows {WANTED}"
    first = counts.complaints[0]
    for source in sources if "not UTF-8" in first else []:
        with open(source.path, "rb") as file:
            try:
                file.read(HEAD).decode()
            except UnicodeDecodeError as error:
                return f"{source.name}: {not_utf8(source.path, error.start)}"
    return f"{name}: holds no row that can be used ({first.removeprefix(f'{name}, ')}); a row is {WANTED}"
