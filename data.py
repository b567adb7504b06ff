"""Stage 1: texts and questions with answers -> tokenizer, training and validation files.

    python data.py                                        # dataset/pretrain.txt and sft.jsonl, or the sample
    python data.py a.txt b.jsonl books/                   # what each holds is recognised by its content
    python data.py --pretrain a.txt b.txt --sft c.jsonl   # these alone; several texts make a curriculum
    python data.py --pretrain poems.txt --documents line --val_fraction 0.1
    python data.py --sft new.jsonl --tokenizer dataset/tokenizer.json
    python data.py dataset.zip --password nano

An input is a file, a folder, a glob in quotes, or - for standard input; .gz, .xz and .zip are unpacked.
Texts are plain text, or JSON rows with the field "text". Questions and answers are JSON rows, JSONL or an
array, in any of the forms that corpus/forms.py lists.

Text is written as token ids, shape (tokens,). Instruction data is written as ids and loss mask side by side,
shape (tokens, 2), each row of it ended by one <|Padding|>. FILE.npy.json is the fingerprint of a file's
vocabulary, which training checks.

Inputs are read a piece at a time, so that memory does not grow with the file. Characters get their ids in
order of appearance; when all are known, they are sorted and the ids in the files changed. No file is put in
place before everything has succeeded.
"""

import contextlib
import filecmp
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter

from config import ROOT, ModelConfig, load_config
from corpus.fingerprint import fingerprint_path, write_fingerprint
from corpus.inputs import DOCUMENTS, ROWS, open_inputs, progress
from corpus.rows import prepare_rows
from corpus.split import SIDES, renumber
from corpus.text import prepare_text
from corpus.vocabulary import GrowingTokenizer
from flags import Parser
from script import InputError, guarded_output, print_json, run_script
from tokenizer import Tokenizer

PREPARED = re.compile(r"(?:pretrain(?:_\d+)?|sft)_(?:train|val)\.npy")
WORK_FOLDER = ".data-"  # how the name of the temporary folder begins
LEFTOVER_SECONDS = 3600  # a temporary folder that nothing was written to for so long is left over


def short_path(path):
    """`path` relative to the current folder, or as it is if that cannot be said: on another drive of
    Windows, or if the current folder has been removed."""
    with contextlib.suppress(ValueError, OSError):
        return os.path.relpath(path)
    return path


DATASET = short_path(os.path.join(ROOT, "dataset"))


def parse_args(argv):
    """The command line as a namespace. Raises InputError for values that cannot be used."""
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="*", metavar="INPUT",
                        help="texts, which are put into one data set, and questions with answers")
    parser.add_argument("--pretrain", nargs="+", metavar="INPUT", default=[],
                        help="texts; each input is a data set of its own")
    parser.add_argument("--sft", nargs="+", metavar="INPUT", default=[], help="questions and answers")
    parser.add_argument("--tokenizer", metavar="FILE", help="use this vocabulary (default: build one)")
    parser.add_argument("--documents", choices=["marked", "line", "blank"], default="marked",
                        help="what a document in plain text is: text between <|bos|> and <|eos|>, a line, or "
                        "text between blank lines (default %(default)s)")
    parser.add_argument("--val_fraction", type=float, default=0.05,
                        help="share of the data that is kept for validation (default %(default)s)")
    parser.add_argument("--val_split", choices=["random", "tail"], default="random",
                        help="which part of a text validates: documents or spans chosen by the seed, or the "
                        "last part of it, as in nanoGPT (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="decides what is kept (default %(default)s)")
    parser.add_argument("--long_rows", choices=["crop", "drop"], default="crop",
                        help="if question and answer exceed a block: crop the answer or drop the row "
                        "(default %(default)s)")
    parser.add_argument("--block_size", type=int, help="context length (default: that of model_config.json)")
    parser.add_argument("--encoding", metavar="NAME", help="of the inputs, such as gb18030 (default utf-8)")
    parser.add_argument("--password", metavar="WORD", help="of an encrypted .zip")
    parser.add_argument("--out", metavar="DIR", default=DATASET, help="where to write (default %(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    args = parser.parse_args(argv)
    if args.files and (args.pretrain or args.sft):
        raise InputError(f"{args.files[0]}: give inputs either without a flag or with --pretrain and --sft")
    if not 0 < args.val_fraction < 1:
        raise InputError(f"--val_fraction is {args.val_fraction:g}, but must lie between 0 and 1")
    if not 0 <= args.seed < 2**64:
        raise InputError(f"--seed is {args.seed}, but must lie between 0 and 2**64")
    args.encoding = known_encoding(args.encoding)
    path = os.path.join(ROOT, "model_config.json")
    given = {} if args.block_size is None else {"block_size": args.block_size}
    args.block_size = load_config(ModelConfig, path if os.path.exists(path) else None, given).block_size
    return args


def known_encoding(name):
    """The name of an encoding, None for UTF-8. Raises InputError if Python does not know it."""
    try:
        b"x".decode(name or "utf-8", "replace")
    except (LookupError, UnicodeError):
        raise InputError(f"--encoding is {name}, which Python does not know; some that it does: "
                         "gb18030, big5, utf-16, cp1252") from None
    return None if name is None or name.lower().replace("_", "-") in ("utf-8", "utf8") else name


# ---- What to read ----

def find_inputs(args):
    """If no input is given, use the two usual files, or one of them, or else the sample."""
    if args.files or args.pretrain or args.sft:
        return
    text = os.path.join(DATASET, "pretrain.txt")
    rows = os.path.join(DATASET, "sft.jsonl")
    if not os.path.exists(text) and not os.path.exists(rows):
        text, rows = sample_files(text, rows)
    args.pretrain = [text] if os.path.exists(text) else []
    args.sft = [rows] if os.path.exists(rows) else []


def sample_files(text, rows):
    """The two files of the sample, written by dataset/make_sample.py if they do not exist yet."""
    paths = [os.path.join(DATASET, name) for name in ("sample_pretrain.txt", "sample_sft.jsonl")]
    print(f"neither {text} nor {rows} exists: using the sample, {' and '.join(paths)}")
    if not all(os.path.exists(path) for path in paths):
        spec = importlib.util.spec_from_file_location("make_sample", os.path.join(DATASET, "make_sample.py"))
        make_sample = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(make_sample)
        make_sample.write_sample(DATASET)
    return paths


def open_data_sets(args, folder):
    """The data sets to prepare: a list of (name, sources) of text, and (name, sources) of rows or None."""
    if args.files:
        sources = open_inputs(args.files, None, folder, args.encoding, args.password)
        texts = [source for source in sources if source.kind != ROWS]
        rows = [source for source in sources if source.kind == ROWS]
        text_sets = [(name_of(texts), texts)] if texts else []
    else:
        text_sets = [(word, open_inputs([word], DOCUMENTS, folder, args.encoding, args.password))
                     for word in args.pretrain]
        rows = open_inputs(args.sft, ROWS, folder, args.encoding, args.password)
    return text_sets, (name_of(rows), rows) if rows else None


def name_of(sources):
    """How messages name a data set of some sources."""
    first = sources[0].name
    return first if len(sources) == 1 else f"{first} and {len(sources) - 1:,} more"


# ---- Preparing ----

def prepare(args, text_sets, row_set, folder, dtype="<u2"):
    """Write all prepared files into `folder`; returns the numbers for the report."""
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else GrowingTokenizer(dtype)
    unknown = Counter()
    texts = []
    rows = None
    try:
        for i, (name, sources) in enumerate(text_sets):
            stem = "pretrain" if len(text_sets) == 1 else f"pretrain_{i}"
            numbers, counts = prepare_text(name, sources, tokenizer, args, both_paths(folder, stem))
            texts.append(numbers)
            unknown += counts.unknown
        if row_set:
            name, sources = row_set
            rows, counts = prepare_rows(name, sources, tokenizer, args, both_paths(folder, "sft"))
            unknown += counts.unknown
    except OverflowError:  # more characters than ids of two bytes
        if dtype == "<u4":
            raise
        return prepare(args, text_sets, row_set, folder, "<u4")
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    if not args.tokenizer:
        tokenizer, new_ids = tokenizer.in_order()
        for path in paths:
            with progress(path, path, "sorting ids of") as bar:
                renumber(path, new_ids, bar)
    for path in paths:
        write_fingerprint(path, tokenizer)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    return {"vocab_size": tokenizer.vocab_size, "block_size": args.block_size,
            "unknown_characters": unknown.total(), "commonest_unknown": unknown.most_common(10),
            "pretrain": texts, "sft": rows}


def both_paths(folder, stem):
    """The training and the validation file of a data set."""
    return [os.path.join(folder, f"{stem}_{side}.npy") for side in ("train", "val")]


def put_in_place(folder, out):
    """Move the finished files from `folder` to `out`. Returns the paths of all but the fingerprints."""
    names = sorted(os.listdir(folder))
    others = sorted(name for name in os.listdir(out) if PREPARED.fullmatch(name) and name not in names)
    new = os.path.join(folder, "tokenizer.json")
    old = os.path.join(out, "tokenizer.json")
    if others and os.path.exists(old) and not filecmp.cmp(old, new, shallow=False):
        print(f"note: {', '.join(others)} in {out} were prepared with another vocabulary than the new "
              "tokenizer.json, so training will refuse them; prepare them again, together with these")
    for name in names:
        os.replace(os.path.join(folder, name), os.path.join(out, name))
    return [os.path.join(out, name) for name in names if not name.endswith(fingerprint_path(".npy"))]


def remove_leftovers(out):
    """Remove the temporary folders of earlier runs that were killed."""
    for name in os.listdir(out):
        path = os.path.join(out, name)
        if name.startswith(WORK_FOLDER) and os.path.isdir(path):
            changed = [os.path.getmtime(path)]
            for folder, _, names in os.walk(path):
                for name in names:
                    with contextlib.suppress(OSError):  # one that ends right now removes its own
                        changed.append(os.path.getmtime(os.path.join(folder, name)))
            if time.time() - max(changed) > LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


# ---- The report ----

def path_in_config(path):
    """`path` as dataset_path takes it, whatever the current folder: relative to the repository if it is in
    there."""
    path = os.path.abspath(path)
    return os.path.relpath(path, ROOT) if path.startswith(os.path.join(ROOT, "")) else path


def training_command(out, stems):
    """The command that trains on the data sets `stems` in the folder `out`."""
    pairs = [[path_in_config(path) for path in both_paths(out, stem)] for stem in stems]
    task = " -t sft" if stems == ["sft"] else ""
    return f"python train.py{task} --dataset_path '{json.dumps(pairs, ensure_ascii=False)}'"


def report(result, out):
    """Print the result, for people first; the last line is JSON. out: the folder with the files."""
    for numbers in [*result["pretrain"], *([result["sft"]] if result["sft"] else [])]:
        facts = [fact_in_words(name, value) for name, value in numbers.items()
                 if name not in ("file", *SIDES)]
        print(f"\n{numbers['file']}: {', '.join(facts)}")
        print(f"{'':10}{SIDES[0]:>14}{SIDES[1]:>14}")
        for name, n in numbers["training"].items():
            if n:  # spans belong to no document
                print(f"{name:10}{n:14,}{numbers['validation'][name]:14,}")
    print(f"\nvocabulary: {result['vocab_size']:,} tokens; blocks of {result['block_size']:,} tokens; "
          f"unknown characters: {result['unknown_characters']:,}")
    if result["commonest_unknown"]:
        print("commonest unknown: " + ", ".join(f"{c!r} {n:,}" for c, n in result["commonest_unknown"]))
    print(f"wrote {', '.join(result['files'])}")
    if len(result["pretrain"]) > 1:
        stems = [f"pretrain_{i}" for i in range(len(result["pretrain"]))]
        print(f"to train on them in this order: {training_command(out, stems)}")
    is_elsewhere = os.path.realpath(out) != os.path.realpath(DATASET)  # than config_*.json say
    if is_elsewhere and len(result["pretrain"]) == 1:
        print(f"to train on it: {training_command(out, ['pretrain'])}")
    if is_elsewhere and result["sft"]:
        print(f"to fine-tune on it: {training_command(out, ['sft'])}")
    print_json(result)


def fact_in_words(name, value):
    """A number of the report in words."""
    if name == "split":
        return f"split by {value}"
    if name == "forms":
        return "rows with " + ", ".join(f"{form} {n:,}" for form, n in value.items())
    return f"{name.replace('_', ' ')} {value:,}"


def main(argv=None):
    args = parse_args(argv)
    try:
        find_inputs(args)
        os.makedirs(args.out, exist_ok=True)
        remove_leftovers(args.out)
        # Everything is made in a folder of its own, which is removed with all in it if anything fails.
        with guarded_output(), tempfile.TemporaryDirectory(prefix=WORK_FOLDER, dir=args.out) as folder:
            unpacked = os.path.join(folder, "unpacked")
            finished = os.path.join(folder, "finished")
            os.mkdir(unpacked)
            os.mkdir(finished)
            result = prepare(args, *open_data_sets(args, unpacked), finished)
            result["files"] = put_in_place(finished, args.out)
    except OSError as error:
        raise InputError(f"{error.filename or args.out}: {error.strerror or error}") from None
    report(result, args.out)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the temporary folder is then removed
    run_script(main)
