"""Stage 1: raw text and JSONL -> tokenizer, training and validation files.

    python data.py                                        # dataset/pretrain.txt and sft.jsonl, or the sample
    python data.py --pretrain a.txt b.txt --sft c.jsonl   # these alone; several texts make a curriculum
    python data.py --pretrain poems.txt --documents line --val_fraction 0.1
    python data.py --sft new.jsonl --tokenizer dataset/tokenizer.json

Text comes out as token ids, shape (tokens,). Instruction data comes out as ids and loss mask side by side,
shape (tokens, 2), each row of it ended by one <|Padding|>.

Inputs are read a piece at a time, so that memory does not grow with the file. Characters get their ids as
they turn up; when all are known, they are put in order and the ids in the files changed. Nothing is put in
place before everything has succeeded.
"""

import codecs
import filecmp
import importlib.util
import json
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from functools import partial
from itertools import islice
from zlib import crc32

import numpy as np
from tqdm import tqdm

from config import ROOT, InputError, ModelConfig, Parser, load_config, run_script
from tokenizer import GrowingTokenizer, Tokenizer, encode_conversation

DATASET = os.path.normpath(os.path.join(os.path.relpath(ROOT), "dataset"))
SIDES = ("training", "validation")
CHUNK_BYTES = 1 << 21  # read at once; small enough for the arrays made of it to stay in the cache
LONGEST_DOCUMENT = 1 << 20  # characters; the parts of a longer one are treated as documents
LONGEST_ROW = 1 << 24  # bytes of a line of JSONL: what holds more is a mistake, and is not read into memory
BUCKETS = 1 << 16  # that texts are sorted into; a bucket is for training or for validation
FEWEST_DOCUMENTS = 20  # of fewer, whole documents are too coarse a choice
ROWS_AT_ONCE = 1000
IDS_AT_ONCE = 1 << 20
BAD_ROWS_SHOWN = 10

# What a piece of text must not end with, as the next may complete it: a special token or a CRLF.
UNFINISHED = re.compile(r"(?:<(?:\|\w{0,14}\|?)?|\r)\Z", re.ASCII)
# White space after <|eos|> is of the document before it; the group is where it ends. A <|bos|> there is part
# of the match, which makes one cut of the two.
BOUNDARY = re.compile(r"<\|(?:eos\|>\s*()(?:<\|bos\|>)?|bos\|>)")
NORMALISED = "byte order mark", "CRLF or CR line ends"
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
PREPARED = re.compile(r"(?:pretrain(?:_\d+)?|sft)_(?:train|val)\.npy")


def progress(path, verb="encoding"):
    """A bar over the bytes of a file, on a terminal's stderr only."""
    return tqdm(total=os.path.getsize(path), desc=f"{verb} {os.path.basename(path)}", unit="B",
                unit_scale=True, leave=False, disable=None)


def read_text(path, totals):
    """Yield the text of a UTF-8 file in pieces, without byte order mark, its lines ended by \\n.

    No piece ends within a character, a special token or a CRLF. Its characters and what was normalised are
    counted in the Counter `totals`. Raises InputError naming the first byte that is not UTF-8."""
    offset, rest = 0, b""  # the bytes that the last piece left over, and where in the file they begin
    with open(path, "rb") as file, progress(path) as bar:
        while True:
            block = file.read(CHUNK_BYTES)
            data = rest + block
            try:
                text, used = codecs.utf_8_decode(data, "strict", not block)
            except UnicodeDecodeError as error:
                where = offset + error.start
                raise InputError(f"{path}: not UTF-8 at byte {where}; convert the file first") from None
            unfinished = UNFINISHED.search(text, max(0, len(text) - 20)) if block else None
            if unfinished:
                text = text[:unfinished.start()]
                used -= len(unfinished[0])  # ASCII: as many bytes as characters
            if offset == 0 and text.startswith("\ufeff"):
                text = text[1:]
                totals["byte order mark"] += 1
            if "\r" in text:
                totals["CRLF or CR line ends"] += text.count("\r")
                text = text.replace("\r\n", "\n").replace("\r", "\n")
            totals["characters"] += len(text)
            if text:
                yield text
            if not block:
                return
            rest = data[used:]
            offset += used
            bar.update(len(block))


def cut_marked(text):
    """Cut before each <|bos|> and after each <|eos|>; the marks stay in the pieces."""
    cuts = [mark.start(1) if mark.lastindex else mark.start() for mark in BOUNDARY.finditer(text)]
    if cuts and cuts[-1] == len(text):  # more white space may follow
        cuts.pop()
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def cut_blank(text):
    text = text.lstrip("\n")
    end = len(text.rstrip())  # white space at the end may go on in the next piece
    *documents, last = BLANK_LINES.split(text[:end])
    return [*documents, last + text[end:]]


CUT = {"marked": cut_marked, "line": lambda text: text.split("\n"), "blank": cut_blank}  # by --documents


def read_documents(path, how, totals):
    """Yield lists of documents; how many there are is added to `totals`.

    A document over LONGEST_DOCUMENT comes in parts. White space alone is no document."""
    rest = ""
    for text in read_text(path, totals):
        if len(rest) > LONGEST_DOCUMENT:
            yield [rest]
            rest = ""
        *documents, rest = CUT[how](rest + text)
        documents = [document for document in documents if document and not document.isspace()]
        totals["documents"] += len(documents)
        if documents:
            yield documents
    if rest.strip():
        totals["documents"] += 1
        yield [rest.rstrip() if how == "blank" else rest]


def may_hold_documents(path, how):
    """Whether there may be FEWEST_DOCUMENTS in a file, of which no more is read than it takes to see that."""
    marks, found, block = (b"<|bos|>", b"<|eos|>") if how == "marked" else (b"\n", b"\r"), 1, b""
    with open(path, "rb") as file:
        while found < FEWEST_DOCUMENTS:
            # The end of the block before is looked at again: a mark may lie on the edge.
            edge = block[max(0, len(block) - len(marks[0]) + 1):]
            block = edge + file.read(CHUNK_BYTES)
            if block == edge:
                return False
            found += sum(map(block.count, marks))
    return True


def count_unknown(ids, text, tokenizer, totals, allow_special=False):
    """Add to `totals` which characters of the text are unknown, if any of its ids says so."""
    if (ids == tokenizer.unknown_id).any():
        for character, n in tokenizer.unknown(text, allow_special).items():
            totals["unknown", character] += n


def encode_documents(documents, how, tokenizer, totals):
    """Token ids of documents, shape (tokens,), each between <|bos|> and <|eos|>."""
    if how == "marked":
        text = "".join(documents)
    else:
        bos, eos = tokenizer.itos[tokenizer.bos_id], tokenizer.itos[tokenizer.eos_id]
        text = bos + (eos + bos).join(documents) + eos
    ids = tokenizer.encode(text, allow_special=True)
    count_unknown(ids, text, tokenizer, totals, allow_special=True)
    return ids


# ---- The split: side 0 is training, side 1 validation ----

def side_table(fraction, seed):
    """The side of each bucket, as bytes: 1 for `fraction` of them, and the same ones again if it grows."""
    return (np.random.default_rng(seed).permutation(BUCKETS) < fraction * BUCKETS).tobytes()


def side_of(text, table):
    """The side of a text. Nothing but the text decides, so equal texts fall to the same side."""
    return table[crc32(text.strip().encode("utf-8", "surrogatepass")) % BUCKETS]


def split_documents(read, encode, seed, fraction, totals):
    """Yield (side, ids): whole documents, chosen by their content."""
    table = side_table(fraction, seed)
    for documents in read(totals=totals):
        # As side_of, without a call for each document, which costs as much as the hash itself.
        sides = [table[crc32(document.strip().encode()) % BUCKETS] for document in documents]
        for side in range(2):
            chosen = [document for document, its in zip(documents, sides, strict=True) if its == side]
            if chosen:
                totals["documents", side] += len(chosen)
                yield side, encode(chosen, totals=totals)


def split_spans(read, encode, seed, span, fraction, totals):
    """Yield (side, ids): spans of `span` tokens, every 1/fraction-th of them for validation.

    They are evenly spread, as chance would leave gaps in a short text; the seed says which is the first."""
    phase, position = random.Random(seed).random(), 0
    for documents in read(totals=totals):
        ids = encode(documents, totals=totals)
        while len(ids):
            number, offset = divmod(position, span)
            side = int((number + 1) * fraction + phase) - int(number * fraction + phase)
            yield side, ids[:span - offset]
            position += len(ids[:span - offset])
            ids = ids[span - offset:]


class NpyWriter:
    """A .npy file that is written row by row; its header, which numpy pads, is corrected at the end."""

    def __init__(self, path, dtype, row_shape):
        self.file, self.dtype, self.row_shape, self.length = open(path, "wb"), dtype, row_shape, 0
        self.write_header()

    def write_header(self):
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": self.dtype.str, "fortran_order": False, "shape": (self.length, *self.row_shape)})

    def append(self, rows):
        """rows: array of shape (n, *row_shape)."""
        self.file.write(np.ascontiguousarray(rows, self.dtype))
        self.length += len(rows)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.file:
            self.write_header()


def write_split(parts, paths, dtype, row_shape, fraction, least, fewest_documents=0):
    """Write `parts(fraction, totals)`, pairs of (side, rows), to the file of their side.

    Returns the Counter `totals`, with ("tokens", side) added. Of few documents, all may by chance fall to one
    side: where a side has fewer than `least` tokens, the fraction is moved and everything is written anew;
    but not for fewer than `fewest_documents`."""
    low, high = 0.0, 1.0
    for _ in range(20):
        totals = Counter()
        with NpyWriter(paths[0], dtype, row_shape) as training, \
                NpyWriter(paths[1], dtype, row_shape) as validation:
            for side, rows in parts(fraction=fraction, totals=totals):
                (training, validation)[side].append(rows)
                totals["tokens", side] += len(rows)
        short = [totals["tokens", side] < least for side in range(2)]
        if (not any(short) or totals["tokens", 0] + totals["tokens", 1] < 2 * least
                or totals["documents"] < fewest_documents):
            break
        low, high = (fraction, high) if short[1] else (low, fraction)
        fraction = min(2 * low, (low + high) / 2) if low else high / 2
    return totals


def unknown_of(totals):
    """Which characters were unknown, and how often, as a Counter."""
    return Counter({key[1]: n for key, n in totals.items() if key[0] == "unknown"})


def by_side(totals, *names):
    """{"training": {name: number}, "validation": …} for the report."""
    return {word: {name: totals[name, side] for name in names} for side, word in enumerate(SIDES)}


def renumber(path, new_ids):
    """Put new_ids[i] for the token id i, all through a prepared file."""
    array = np.load(path, mmap_mode="r")
    with open(path, "r+b") as file, progress(path, "ordering") as bar:
        file.seek(array.offset)
        while len(ids := np.fromfile(file, array.dtype, IDS_AT_ONCE)):
            tokens = ids[::2] if array.ndim == 2 else ids  # between them may be the loss mask
            tokens[:] = new_ids.take(tokens)
            file.seek(-ids.nbytes, os.SEEK_CUR)
            file.write(ids)
            bar.update(ids.nbytes)


def prepare_text(path, tokenizer, args, paths, unknown):
    """Encode one text file into its training and validation file; returns its numbers for the report."""
    least = args.block_size + 1
    read = partial(read_documents, path, args.documents)
    encode = partial(encode_documents, how=args.documents, tokenizer=tokenizer)
    write = partial(write_split, paths=paths, dtype=tokenizer.dtype, row_shape=(), fraction=args.val_fraction,
                    least=least)
    split, totals = "whole documents", Counter()
    if may_hold_documents(path, args.documents):
        totals = write(partial(split_documents, read, encode, args.seed), fewest_documents=FEWEST_DOCUMENTS)
    if totals["documents"] < FEWEST_DOCUMENTS or min(totals["tokens", 0], totals["tokens", 1]) < least:
        # Long spans, as a window over a seam between two of them is not running text; but enough of them.
        characters = sum(map(len, read_text(path, Counter())))
        if not characters:
            raise InputError(f"{path}: is empty; give a file with text in it")
        span = max(least, min(16 * args.block_size, characters // FEWEST_DOCUMENTS))
        split = f"spans of {span:,} tokens"
        totals = write(partial(split_spans, read, encode, args.seed, span))
    tokens = totals["tokens", 0], totals["tokens", 1]
    if min(tokens) < least:
        raise InputError(f"{path}: {tokens[0]:,} tokens for training and {tokens[1]:,} for validation, but a "
                         f"block takes {least:,}; give more text or a smaller --block_size")
    normalised = [f"{totals[what]:,} {what}" for what in NORMALISED if totals[what]]
    if normalised:
        print(f"{path}: normalised {', '.join(normalised)}")
    totals["blocks", 0], totals["blocks", 1] = (n // args.block_size for n in tokens)
    unknown += unknown_of(totals)
    return {"file": path, "characters": totals["characters"], "documents": totals["documents"],
            "split": split, **by_side(totals, "documents", "tokens", "blocks")}


# ---- Instruction data: rows of questions and answers ----

def parse_row(line):
    """The turns of a JSONL line, a list of (question, answer). Raises ValueError saying what is wrong."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "messages" in row:
        turns = pair_messages(row["messages"])
    else:
        for key in ("question", "answer"):
            if key not in row:
                raise ValueError(f'the key "{key}" is missing')
        turns = [(row["question"], row["answer"])]
    for turn in turns:
        for name, text in zip(("question", "answer"), turn, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"the {name} is not a string")
            if not text.strip():
                raise ValueError(f"the {name} is empty")
    return turns


def pair_messages(messages):
    """[user message, assistant message, …] -> [(question, answer), …]"""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is not a list of messages")
    for i, message in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        if not isinstance(message, dict) or message.get("role") != role:
            raise ValueError(f'message {i + 1} does not have the role "{role}"')
        if "content" not in message:
            raise ValueError(f"message {i + 1} has no content")
    if len(messages) % 2:
        raise ValueError("the last message is not the assistant's")
    contents = [message["content"] for message in messages]
    return list(zip(contents[::2], contents[1::2], strict=True))


def read_conversations(path, complain):
    """Yield the turns of each good row of a JSONL file; bad ones go to `complain(line number, reason)`."""
    with open(path, "rb") as file, progress(path) as bar:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_ROW), b""), 1):
            bar.update(len(line))
            if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):  # pass over the rest of the line
                    line = file.readline(LONGEST_ROW)
                    bar.update(len(line))
                complain(number, f"longer than {LONGEST_ROW >> 20} MB")
                continue
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                turns = parse_row(line)
            except ValueError as error:
                complain(number, str(error))
            else:
                yield turns


def in_batches(rows):
    rows = iter(rows)
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        yield batch


def encode_row(turns, tokenizer, args, totals):
    """A conversation as (row, cropped): ids and loss mask, shape (tokens, 2), ended by <|Padding|>.

    The row is None where it is to be dropped. A row of block_size + 1 tokens makes block_size predictions."""
    ids, mask = encode_conversation(tokenizer, turns)
    count_unknown(ids, "".join([text for turn in turns for text in turn]), tokenizer, totals)
    cropped = len(ids) > args.block_size + 1
    if cropped:
        answered = np.flatnonzero(mask[:args.block_size + 1])
        if args.long_rows == "drop" or not len(answered):
            return None, False
        end = answered[-1] + 1  # not within a later question, which would teach nothing
        ids, mask = ids[:end], mask[:end]
    row = np.full((len(ids) + 1, 2), (tokenizer.pad_id, 0), tokenizer.dtype)
    row[:-1, 0], row[:-1, 1] = ids, mask
    return row, cropped


def split_rows(path, tokenizer, args, shown, fraction, totals):
    """Yield (side, rows). The first question decides: the same prompt is never on both sides.

    Bad rows are printed, the first few, whose lines are added to the set `shown`, once each."""
    table = side_table(fraction, args.seed)

    def complain(number, reason):
        totals["bad_rows"] += 1
        if args.strict:
            raise InputError(f"{path}, line {number}: {reason}")
        if number not in shown and len(shown) < BAD_ROWS_SHOWN:
            shown.add(number)
            tqdm.write(f"{path}, line {number}: {reason}; skipped", file=sys.stderr)

    for batch in in_batches(read_conversations(path, complain)):
        sides = [], []
        for turns in batch:
            row, cropped = encode_row(turns, tokenizer, args, totals)
            if row is None:
                totals["dropped"] += 1
                continue
            side = side_of(turns[0][0], table)
            sides[side].append(row)
            totals["rows", side] += 1
            totals["turns", side] += len(turns)
            totals["cropped"] += cropped
        for side, rows in enumerate(sides):
            if rows:
                yield side, np.concatenate(rows)


def prepare_rows(path, tokenizer, args, paths, unknown):
    """Encode the instruction data into its training and validation file; returns its numbers."""
    totals = write_split(partial(split_rows, path, tokenizer, args, set()), paths, tokenizer.dtype, (2,),
                         args.val_fraction, least=1)
    n_bad, n_used = totals["bad_rows"], totals["rows", 0] + totals["rows", 1]
    if n_bad > BAD_ROWS_SHOWN:
        print(f"{path}: {n_bad - BAD_ROWS_SHOWN:,} more bad rows skipped", file=sys.stderr)
    if not n_used + totals["dropped"]:
        raise InputError(f"{path}: holds no row that can be used" if n_bad else f"{path}: is empty")
    if not n_used:
        raise InputError(f"{path}: no row fits into --block_size {args.block_size}; give a larger one")
    if not (totals["rows", 0] and totals["rows", 1]):
        raise InputError(f"{path}: needs at least two different questions, one of them for validation")
    unknown += unknown_of(totals)
    return {"file": path, "bad_rows": n_bad, "cropped": totals["cropped"], "dropped": totals["dropped"],
            **by_side(totals, "rows", "turns", "tokens")}


def prepare(args, folder, dtype="<u2"):
    """Read the inputs and write all prepared files into `folder`; returns the numbers for the report."""
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else GrowingTokenizer(dtype)
    unknown = Counter()

    def paths(stem):
        return [os.path.join(folder, f"{stem}_{side}.npy") for side in ("train", "val")]

    stems = ["pretrain"] if len(args.pretrain) == 1 else [f"pretrain_{i}" for i in range(len(args.pretrain))]
    try:
        texts = [prepare_text(path, tokenizer, args, paths(stem), unknown)
                 for path, stem in zip(args.pretrain, stems, strict=True)]
        rows = prepare_rows(args.sft, tokenizer, args, paths("sft"), unknown) if args.sft else None
    except OverflowError:  # more characters than ids of two bytes
        if dtype == "<u4":
            raise
        return prepare(args, folder, "<u4")
    if not args.tokenizer:
        tokenizer, new_ids = tokenizer.in_order()
        for name in os.listdir(folder):
            renumber(os.path.join(folder, name), new_ids)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    return {"vocab_size": tokenizer.vocab_size, "block_size": args.block_size,
            "unknown_characters": unknown.total(), "commonest_unknown": unknown.most_common(10),
            "pretrain": texts, "sft": rows}


def put_in_place(folder, out):
    """Move the finished files from `folder` to `out`. Returns their paths."""
    names = sorted(os.listdir(folder))
    new, old = (os.path.join(place, "tokenizer.json") for place in (folder, out))
    others = sorted(name for name in os.listdir(out) if PREPARED.fullmatch(name) and name not in names)
    if others and os.path.exists(old) and not filecmp.cmp(old, new, shallow=False):
        print(f"note: {', '.join(others)} in {out} were made with the tokenizer.json that is now replaced; "
              "prepare them again, together with these")
    for name in names:
        os.replace(os.path.join(folder, name), os.path.join(out, name))
    return [os.path.join(out, name) for name in names]


def report(result):
    """Print the result, for people first; the last line is JSON."""
    for data in [*result["pretrain"], *([result["sft"]] if result["sft"] else [])]:
        facts = [f"split by {value}" if name == "split" else f"{name.replace('_', ' ')} {value:,}"
                 for name, value in data.items() if name not in ("file", *SIDES)]
        print(f"\n{data['file']}: {', '.join(facts)}")
        print(f"{'':10}{SIDES[0]:>14}{SIDES[1]:>14}")
        for name, n in data["training"].items():
            if n:  # spans belong to no document
                print(f"{name:10}{n:14,}{data['validation'][name]:14,}")
    print(f"\nvocabulary: {result['vocab_size']:,} tokens; blocks of {result['block_size']:,} tokens; "
          f"unknown characters: {result['unknown_characters']:,}")
    if result["commonest_unknown"]:
        print("commonest unknown: " + ", ".join(f"{c!r} {n:,}" for c, n in result["commonest_unknown"]))
    print(f"wrote {', '.join(result['files'])}")
    print(json.dumps(result))


def find_inputs(args):
    """Where no file is named, take the usual two, or one of them, or else the sample."""
    if not args.pretrain and not args.sft:
        usual = os.path.join(DATASET, "pretrain.txt"), os.path.join(DATASET, "sft.jsonl")
        found = [path if os.path.exists(path) else None for path in usual]
        args.pretrain, args.sft = found if any(found) else sample_files(usual)
        args.pretrain = [args.pretrain] if args.pretrain else []
    for path in [*args.pretrain, *([args.sft] if args.sft else [])]:
        if not os.path.isfile(path):
            raise InputError(f"{path}: not a file" if os.path.exists(path) else f"{path}: no such file")


def sample_files(missing):
    """The two files of the sample, written by dataset/make_sample.py where they do not exist yet."""
    paths = [os.path.join(DATASET, name) for name in ("sample_pretrain.txt", "sample_sft.jsonl")]
    print(f"neither {missing[0]} nor {missing[1]} exists: taking the sample, {' and '.join(paths)}")
    if not all(os.path.exists(path) for path in paths):
        spec = importlib.util.spec_from_file_location("make_sample", os.path.join(DATASET, "make_sample.py"))
        make_sample = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(make_sample)
        make_sample.write_sample(DATASET)
    return paths


def parse_args(argv):
    parser = Parser(__doc__)
    parser.add_argument("--pretrain", nargs="+", metavar="FILE", default=[], help="texts")
    parser.add_argument("--sft", metavar="FILE", help="instruction data, JSONL")
    parser.add_argument("--tokenizer", metavar="FILE", help="take this vocabulary; by default one is built")
    parser.add_argument("--documents", choices=list(CUT), default="marked",
                        help="a document is what <|bos|> and <|eos|> mark, a line, or what blank lines part "
                        "(default %(default)s)")
    parser.add_argument("--val_fraction", type=float, default=0.05,
                        help="share of the data that is kept for validation (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="decides what is kept (default %(default)s)")
    parser.add_argument("--long_rows", choices=["crop", "drop"], default="crop",
                        help="where question and answer exceed a block: crop the answer or drop the row "
                        "(default %(default)s)")
    parser.add_argument("--block_size", type=int, help="context length (default: that of model_config.json)")
    parser.add_argument("--out", metavar="DIR", default=DATASET, help="where to write (default %(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row of instruction data")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise InputError(f"--val_fraction is {args.val_fraction:g}, but must lie between 0 and 1")
    if not 0 <= args.seed < 2**64:
        raise InputError(f"--seed is {args.seed}, but must lie between 0 and 2**64")
    path = os.path.join(ROOT, "model_config.json")
    given = {} if args.block_size is None else {"block_size": args.block_size}
    args.block_size = load_config(ModelConfig, path if os.path.exists(path) else None, given).block_size
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        find_inputs(args)
        os.makedirs(args.out, exist_ok=True)
        # Everything is made in a folder of its own, which vanishes with all in it if anything fails.
        with tempfile.TemporaryDirectory(prefix=".data-", dir=args.out) as folder:
            result = prepare(args, folder)
            result["files"] = put_in_place(folder, args.out)
    except OSError as error:
        raise InputError(f"{error.filename or args.out}: {error.strerror}") from None
    report(result)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder goes then, too
    run_script(main)
