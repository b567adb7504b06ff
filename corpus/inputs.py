"""The inputs of data.py: files, folders, globs, standard input; .gz, .xz, .zip; encodings other than UTF-8.

`open_inputs` brings all of them into one form, a list of `Source`: plain files in UTF-8, each with its kind,
which its content tells, not its name. What is compressed, encrypted, encoded otherwise or comes from standard
input is first written to a temporary folder as plain UTF-8.
"""

import codecs
import contextlib
import glob
import gzip
import json
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from tqdm import tqdm

from corpus.forms import ROW_FORMS, WANTED, form_of
from script import InputError

try:
    import lzma
except ImportError:  # some builds of Python lack it
    lzma = None

COPY_BLOCK = 1 << 20  # bytes
HEAD = 1 << 20  # bytes that are read to recognise a kind
ENCODING_SAMPLE = 1 << 16  # bytes that are read to guess an encoding
LINE_BEFORE = 1 << 12  # bytes in which a line is expected to begin
LINES_SEEN = 10
FEW_NULS = 1000  # a text has at most one NUL in so many bytes

TEXT = "plain text"
DOCUMENTS = 'JSON rows with the field "text"'
ROWS = "JSON rows of questions and answers"
OTHER_JSON = "JSON without texts or questions and answers"
TABLE = "a CSV table of questions and answers"
BINARY = "binary data"
STANDARD_INPUT = "standard input"

# The first bytes of formats that must be converted by other programs first.
OTHER_FORMATS = {b"PAR1\x15": "Parquet", b"%PDF-": "PDF", b"7z\xbc\xaf": "7z", b"Rar!\x1a": "RAR",
                 b"BZh91AY": "bzip2", b"\x28\xb5\x2f\xfd": "Zstandard", b"\x93NUMPY": "NumPy"}
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16",
                    b"\xfe\xff": "utf-16"}
# A codec that tells an encoding, the --encoding to give for it, and the share of the bytes beyond ASCII that
# it may fail on. GB2312, the common part of GB18030, fails on Big5; GB18030 itself decodes nearly everything.
LIKELY_ENCODINGS = (("gb2312", "gb18030", 0.03), ("shift_jis", "shift_jis", 0), ("big5", "big5", 0.03),
                    ("euc_kr", "euc_kr", 0.03), ("gb18030", "gb18030", 0), ("cp1252", "cp1252", 0))
DAMAGE = (zlib.error, EOFError, zipfile.BadZipFile, gzip.BadGzipFile, *([lzma.LZMAError] if lzma else []))
# Control characters and half-width katakana: what decoding with a wrong table gives.
ODD_CHARACTERS = re.compile("[\x80-\x9f\uff61-\uff9f]")


@dataclass
class Source:
    """A plain UTF-8 file to read."""

    path: str
    name: str  # what the user knows it by, for messages: the path, or "archive.zip: member"
    kind: str  # TEXT, DOCUMENTS or ROWS


@dataclass
class Entry:
    """A file, or a member of an archive, before it is known what it holds."""

    name: str
    open: Callable[[], BinaryIO]
    path: str | None = None  # None if it must be unpacked
    packing: str = ""  # ".gz", ".xz" or ".zip"


def progress(path, name, verb="reading"):
    """A progress bar over the bytes of a file, shown only if standard error is a terminal."""
    return tqdm(total=os.path.getsize(path), desc=f"{verb} {os.path.basename(name)}", unit="B",
                unit_scale=True, leave=False, disable=None)


# ---- From words on the command line to files ----

def find_files(word):
    """The files that a word names: a file, those in a folder and its subfolders, those that a glob matches.

    Hidden ones in a folder are left out. Raises InputError if there is none."""
    if os.path.isdir(word):
        paths = []
        for folder, subfolders, names in os.walk(word):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            paths += [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
        if not paths:
            raise InputError(f"{word}: the folder holds no files")
    elif os.path.exists(word):
        paths = [word]
    elif glob.has_magic(word):
        paths = [path for path in sorted(glob.glob(word, recursive=True)) if os.path.isfile(path)]
        if not paths:
            raise InputError(f"{word}: no file matches")
    else:
        raise InputError(f"{word}: no such file")
    return paths


def save_stream(stream, folder):
    """What can be read only once, as a file in `folder`, since data may be read again; returns its path."""
    path = os.path.join(folder, f"stream_{len(os.listdir(folder))}")
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file, COPY_BLOCK)
    return path


def entries_of(path, name, password):
    """The Entry of a file, or those of the members of a .zip. Raises InputError for a damaged archive."""
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic.startswith(b"\x1f\x8b"):
        return [Entry(name, lambda: gzip.open(path), packing=".gz")]
    if magic.startswith(b"\xfd7zXZ\0"):
        if lzma is None:
            raise InputError(f"{name}: this Python cannot read .xz; unpack the file with xz -d first")
        return [Entry(name, lambda: lzma.open(path), packing=".xz")]
    if magic.startswith(b"PK\x03\x04"):
        return zip_entries(path, name, password)
    return [Entry(name, lambda: open(path, "rb"), path)]


def zip_entries(path, name, password):
    """The Entry of each member of a .zip archive that is neither a folder nor hidden."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise InputError(f"{name}: a damaged .zip archive ({error})") from None
    if "[Content_Types].xml" in archive.namelist():
        raise InputError(f"{name}: an Office document; save it as plain text first")
    entries = []
    for member in archive.infolist():
        hidden = any(part.startswith((".", "__MACOSX")) for part in member.filename.split("/"))
        if member.is_dir() or hidden:
            continue
        if member.flag_bits & 1 and password is None:
            raise InputError(f"{name}: the archive is encrypted; give its password with --password")
        opener = zip_opener(archive, member, password)
        entries.append(Entry(f"{name}: {member.filename}", opener, packing=".zip"))
    if not entries:
        raise InputError(f"{name}: the archive holds no files")
    return entries


def zip_opener(archive, member, password):
    """A function that opens a member of an archive."""
    return lambda: archive.open(member, pwd=password.encode() if password else None)


# ---- From files to sources ----

def open_inputs(words, wanted, folder, encoding=None, password=None):
    """The sources that words on the command line name; says in a line what was found for each.

    wanted: DOCUMENTS for text, ROWS for questions and answers, None for either.
    folder: an empty temporary folder to unpack into; it must stay while the sources are read.

    Raises InputError for an input that cannot be used, saying what to do. In a folder or archive, such files
    are skipped if others can be used."""
    sources = []
    for word in words:
        entries = find_entries(word, folder, password)
        alone = len(entries) == 1 and entries[0].name in (word, STANDARD_INPUT)
        found = []
        skipped = []
        for entry in entries:
            head = read_head(entry)
            kind = recognise(head, wanted, encoding)
            reason = why_not(kind, wanted, head, alone)
            if reason:
                skipped.append(f"{entry.name}: {reason}")
                continue
            path = entry.path
            if path is None or encoding:
                path = os.path.join(folder, f"unpacked_{len(os.listdir(folder))}")
                unpack(entry, path, encoding)
            found.append(Source(path, entry.name, ROWS if wanted == ROWS else kind))
        if not found:
            raise InputError(skipped[0] if alone else f"{word}: no file in it can be used here; {skipped[0]}")
        if skipped:
            more = f" (and {len(skipped) - 1:,} more)" if len(skipped) > 1 else ""
            print(f"note: skipped {skipped[0]}{more}")
        say_what_was_found(word, found, entries, encoding)
        sources += found
    return sources


def find_entries(word, folder, password):
    """Every Entry that a word on the command line names."""
    if word == "-":
        return entries_of(save_stream(sys.stdin.buffer, folder), STANDARD_INPUT, password)
    if os.path.exists(word) and not os.path.isfile(word) and not os.path.isdir(word):  # a pipe: <(command)
        with open(word, "rb") as stream:
            return entries_of(save_stream(stream, folder), word, password)
    return [entry for path in find_files(word) for entry in entries_of(path, path, password)]


def say_what_was_found(word, found, entries, encoding):
    """One line on what a word on the command line was recognised as."""
    kinds = {}
    for source in found:
        kinds[source.kind] = kinds.get(source.kind, 0) + 1
    facts = list(kinds)
    if len(entries) > 1:
        facts = [f"{kind} in {n:,} file{'s' if n > 1 else ''}" for kind, n in kinds.items()]
    packings = sorted({entry.packing for entry in entries} - {""})
    if packings:
        facts.append(f"unpacked from {' and '.join(packings)}")
    if encoding:
        facts.append(f"decoded from {encoding}")
    print(f"{STANDARD_INPUT if word == '-' else word}: {', '.join(facts)}")


def why_not(kind, wanted, head, alone):
    """Why data of a kind cannot be used where `wanted` is, and what to do; "" if it can."""
    if kind == BINARY:
        for magic, known in OTHER_FORMATS.items():
            if head.startswith(magic):
                return f"{known} data; unpack or convert it to text or JSONL first"
        likely = likely_encoding(head)
        if likely.startswith("utf-"):
            return f"not UTF-8 but probably {likely}; add --encoding {likely}"
        return "binary data, not text; unpack or convert it first"
    if kind == TABLE:
        return f"{TABLE}, which is not read; convert it to JSONL first, with a row {WANTED}"
    if wanted == ROWS:
        if kind == DOCUMENTS:
            return f'its rows have the field "text"; give it to --pretrain, or rows {WANTED}'
        # A file that was named is read anyway: its bad rows are then named by line.
        return f"{kind}, not rows of questions and answers" if kind != ROWS and not alone else ""
    if kind == ROWS and wanted == DOCUMENTS:
        return "holds rows of questions and answers; give it to --sft"
    if kind == OTHER_JSON:
        return ('JSON, which is not trained on as text; give rows with the field "text", or questions and '
                f"answers: {WANTED}")
    return ""


def read_head(entry):
    """The first HEAD bytes of an entry."""
    with unpacking_errors(entry), entry.open() as stream:
        return stream.read(HEAD)


def unpack(entry, path, encoding):
    """Write an entry to `path` as plain UTF-8. Raises InputError."""
    decoder = codecs.getincrementaldecoder(encoding)() if encoding else None
    offset = 0
    with unpacking_errors(entry), entry.open() as stream, open(path, "wb") as file, \
            tqdm(desc=f"unpacking {os.path.basename(entry.name)}", unit="B", unit_scale=True, leave=False,
                 disable=None) as bar:
        while True:
            block = stream.read(COPY_BLOCK)
            try:
                file.write(decoder.decode(block, not block).encode() if decoder else block)
            except UnicodeError:
                raise InputError(f"{entry.name}: not {encoding}, between bytes {offset} and "
                                 f"{offset + len(block)}; give another --encoding") from None
            if not block:
                return
            offset += len(block)
            bar.update(len(block))


@contextlib.contextmanager
def unpacking_errors(entry):
    """In this context the errors of a damaged or encrypted archive become one InputError."""
    try:
        yield
    except NotImplementedError as error:
        raise InputError(f"{entry.name}: packed or encrypted in a way that Python cannot read ({error}); "
                         "unpack it by hand first") from None
    except RuntimeError as error:  # the only class that zipfile has for a wrong password
        raise InputError(f"{entry.name}: {error}; the --password is wrong") from None
    except DAMAGE as error:
        reason = "damaged, or the --password is wrong" if entry.packing == ".zip" else "damaged"
        raise InputError(f"{entry.name}: {reason} ({error})") from None


# ---- What a file holds ----

def likely_encoding(data):
    """The name of the encoding that bytes, not valid as UTF-8 or full of NULs, most probably have."""
    for mark, name in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return name
    nuls = data.count(0)
    if nuls:  # in UTF-16, ASCII characters have a NUL at every second byte
        odd = data[1::2].count(0)
        if nuls > len(data) / 10 and max(odd, nuls - odd) > 0.98 * nuls:
            return "utf-16-le" if odd > nuls - odd else "utf-16-be"
    data = data[:ENCODING_SAMPLE]
    n_others = sum(byte > 127 for byte in data)
    for codec, name, tolerance in LIKELY_ENCODINGS:
        # An incremental decoder waits for the rest of a character that is cut off at the end.
        decoded = codecs.getincrementaldecoder(codec)("replace").decode(data)
        failures = decoded.count("\ufffd")
        is_foreign = sum(character > "\x7f" for character in decoded) > failures
        if is_foreign and failures <= tolerance * n_others and not ODD_CHARACTERS.search(decoded):
            return name
    return "latin-1"


def not_utf8(path, at):
    """The end of an error line on a file that is not UTF-8 at the byte `at`: which encoding it may have."""
    with open(path, "rb") as file:
        file.seek(max(0, at - LINE_BEFORE))
        near = file.read(ENCODING_SAMPLE)
    if at > LINE_BEFORE:
        near = near[near.find(b"\n") + 1:]  # from the beginning of a line on, not from within a character
    likely = likely_encoding(near)
    return f"not UTF-8 at byte {at}; its encoding is probably {likely}: add --encoding {likely}"


def recognise(head, wanted, encoding=None):
    """The kind of a file, from its first bytes: TEXT, TABLE, DOCUMENTS, ROWS, OTHER_JSON or BINARY.

    If its rows have a text as well as questions and answers, the kind is what is `wanted`."""
    if any(head.startswith(magic) for magic in OTHER_FORMATS):
        return BINARY
    marked = any(head.startswith(mark) for mark in BYTE_ORDER_MARKS)
    if not encoding and not marked and head.count(0) * FEW_NULS > len(head):
        return BINARY
    text = head.decode(encoding or "utf-8", "replace").removeprefix("\ufeff")
    rows = first_rows(text.lstrip())
    if rows is None:
        return TABLE if wanted != DOCUMENTS and is_table(text) else TEXT
    has_text = any(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows)
    has_turns = any(form_of(row) or has_message(row) for row in rows)
    if has_text and (wanted == DOCUMENTS or not has_turns):
        return DOCUMENTS
    return ROWS if has_turns else OTHER_JSON


def is_table(text):
    """Whether a text is CSV (or separated by tabs or semicolons) whose columns have the names of a form."""
    line = text.partition("\n")[0].lower()
    columns = [{cell.strip(' "\r') for cell in line.split(separator)} for separator in ",\t;"]
    return any(len(keys) > 1 and names.issuperset(keys) for keys in ROW_FORMS for names in columns)


def has_message(row):
    """Whether a row is a message or a list of messages, without a key around it."""
    message = row[0] if isinstance(row, list) and row else row
    return isinstance(message, dict) and bool({"role", "from"} & message.keys())


def first_rows(text):
    """The first rows of a text that is JSONL or JSON; None if it is neither."""
    if not text.startswith(("{", "[")):
        return None
    if text.startswith("["):
        element, _ = parse_start(text[1:].lstrip())
        if isinstance(element, dict):
            return [element]
    lines = [line for line in text.split("\n", LINES_SEEN)[:LINES_SEEN] if line.strip()]
    rows = []
    for line in lines:
        row, rest = parse_start(line)
        if isinstance(row, (dict, list)) and not rest.strip():
            rows.append(row)
    if 2 * len(rows) >= len(lines):
        return rows
    whole, rest = parse_start(text)  # one object over many lines
    return [whole] if isinstance(whole, (dict, list)) and not rest.strip() else None


def parse_start(text):
    """(value, rest): the JSON value that a text begins with, and the text after it; (None, text) if none.

    Of a long object that the text cuts off, the value is a dict of its keys, with empty strings as values."""
    try:
        value, end = json.JSONDecoder().raw_decode(text.strip())
        return value, text.strip()[end:]
    except (ValueError, RecursionError):
        pass
    if len(text) > HEAD // 8 and re.match(r'\s*\{\s*"[^"\n]*"\s*:', text):
        return dict.fromkeys(re.findall(r'"(\w+)"\s*:', text[:1 << 16]), ""), ""
    return None, text
