"""Text for pretraining: cut into documents, split into training and validation, encoded to token ids."""

import codecs
import random
import re

from corpus.forms import read_rows
from corpus.inputs import DOCUMENTS, not_utf8, progress
from corpus.split import Counts, sides_of_texts, validation_buckets, write_split, write_tail_split
from script import InputError

CHUNK_BYTES = 1 << 21  # read at once; small enough for the arrays made of it to stay in the cache
LONGEST_DOCUMENT = 1 << 20  # characters; the parts of a longer one are treated as documents
FEWEST_DOCUMENTS = 20  # with fewer, whole documents are too coarse a unit to split by
ROWS_AT_ONCE = 1000

# What a piece of text must not end with, as the next may complete it: a special token or a CRLF.
UNFINISHED = re.compile(r"(?:<(?:\|\w{0,14}\|?)?|\r)\Z", re.ASCII)
# White space after <|eos|> belongs to the document before it; the group is where it ends. A <|bos|> that
# follows is part of the match, which makes one cut of the two.
BOUNDARY = re.compile(r"<\|(?:eos\|>\s*()(?:<\|bos\|>)?|bos\|>)")
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


# ---- From bytes to documents ----

def read_text(source, counts):
    """Yield the text of a source in pieces, without byte order mark, its lines ended by \\n.

    No piece ends within a character, a special token or a CRLF. Characters, and what was normalised, are
    counted. Raises InputError naming the first byte that is not UTF-8."""
    offset = 0  # in the file, of the first byte of `rest`
    rest = b""  # the bytes that the last piece left over
    with open(source.path, "rb") as file, progress(source.path, source.name) as bar:
        while True:
            block = file.read(CHUNK_BYTES)
            data = rest + block
            try:
                text, used = codecs.utf_8_decode(data, "strict", not block)
            except UnicodeDecodeError as error:
                raise InputError(f"{source.name}: {not_utf8(source.path, offset + error.start)}") from None
            unfinished = UNFINISHED.search(text, max(0, len(text) - 20)) if block else None
            if unfinished:
                text = text[:unfinished.start()]
                used -= len(unfinished[0])  # ASCII: as many bytes as characters
            if offset == 0 and text.startswith("\ufeff"):
                text = text[1:]
                counts.byte_order_marks += 1
            if "\r" in text:
                counts.line_ends += text.count("\r")
                text = text.replace("\r\n", "\n").replace("\r", "\n")
            counts.characters += len(text)
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


def cut_lines(text):
    """Cut at each line end, which belongs to no document."""
    return text.split("\n")


def cut_blank_lines(text):
    """Cut at blank lines, which belong to no document."""
    text = text.lstrip("\n")
    end = len(text.rstrip())  # white space at the end may continue in the next piece
    *documents, last = BLANK_LINES.split(text[:end])
    return [*documents, last + text[end:]]


def keep_whole(text):
    """Cut nowhere: a file is a document."""
    return [text]


# By --documents; "file" is for several files.
CUT = {"marked": cut_marked, "line": cut_lines, "blank": cut_blank_lines, "file": keep_whole}


def has_no_marks(text):
    """Whether a text holds neither <|bos|> nor <|eos|>."""
    return "<|bos|>" not in text and "<|eos|>" not in text


def cut_text(source, how, counts):
    """Yield lists of the documents in a source of plain text; how many there are is counted.

    A document over LONGEST_DOCUMENT comes in parts. White space alone is no document."""
    rest = ""
    for text in read_text(source, counts):
        if len(rest) > LONGEST_DOCUMENT:
            yield [rest]
            rest = ""
        # Looking for marks twice, in C, costs less than cutting a long text without any again and again.
        whole = how == "marked" and has_no_marks(text) and has_no_marks(rest)
        *documents, rest = [rest + text] if whole else CUT[how](rest + text)
        documents = [document for document in documents if document and not document.isspace()]
        counts.documents += len(documents)
        if documents:
            yield documents
    if rest.strip():
        counts.documents += 1
        yield [rest.rstrip() if how == "blank" else rest]


def read_json_documents(source, counts, strict):
    """Yield lists of the documents in a source of JSON rows with the field "text"."""
    def complain(place, reason):
        counts.add_bad_row(f"{source.name}, {place}: {reason}", strict)

    documents = []
    size = 0
    with progress(source.path, source.name) as bar:
        for place, row in read_rows(source.path, source.name, bar, complain):
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                complain(place, 'has no text in a field "text"')
                continue
            text = text.removeprefix("<|bos|>").removesuffix("<|eos|>")  # these are added to every row
            counts.characters += len(text)
            if not text or text.isspace():
                continue
            documents.append(text)
            size += len(text)
            if len(documents) == ROWS_AT_ONCE or size > LONGEST_DOCUMENT:
                counts.documents += len(documents)
                yield documents
                documents = []
                size = 0
    if documents:
        counts.documents += len(documents)
        yield documents


def read_documents(sources, args, counts):
    """Yield (documents, marked): a list of documents, and whether their <|bos|> and <|eos|> are in them.

    --documents says what a document is in plain text; if there are several files, one without marks is a
    document. A row of JSON is always one."""
    for source in sources:
        if source.kind == DOCUMENTS:
            for documents in read_json_documents(source, counts, args.strict):
                yield documents, False
            continue
        how = args.documents
        if how == "marked" and len(sources) > 1 and has_no_marks(next(read_text(source, Counts()), "")):
            how = "file"
        for documents in cut_text(source, how, counts):
            yield documents, how == "marked"


def encode_documents(documents, marked, tokenizer, counts):
    """Token ids of documents, shape (tokens,), each between <|bos|> and <|eos|>."""
    if marked:
        text = "".join(documents)
    else:
        bos = tokenizer.itos[tokenizer.bos_id]
        eos = tokenizer.itos[tokenizer.eos_id]
        text = bos + (eos + bos).join(documents) + eos
    ids = tokenizer.encode(text, allow_special=True)
    counts.add_unknown(ids, text, tokenizer, allow_special=True)
    return ids


# ---- The split ----

def split_documents(sources, tokenizer, args, fraction, counts):
    """Yield (side, ids) of whole documents, whose content decides the side."""
    buckets = validation_buckets(fraction, args.seed)
    for documents, marked in read_documents(sources, args, counts):
        sides = sides_of_texts(documents, buckets)
        for side in range(2):
            chosen = [document for document, its in zip(documents, sides, strict=True) if its == side]
            if chosen:
                counts.sides[side].documents += len(chosen)
                yield side, encode_documents(chosen, marked, tokenizer, counts)


def split_spans(sources, tokenizer, args, span, fraction, counts):
    """Yield (side, ids) of spans of `span` tokens, every 1/fraction-th of them for validation.

    They are evenly spaced, as random ones would leave gaps in a short text; the seed decides on the first."""
    phase = random.Random(args.seed).random()

    def side_of_span(number):
        return int((number + 1) * fraction + phase) - int(number * fraction + phase)

    position = 0  # of ids[0] in the whole text
    for documents, marked in read_documents(sources, args, counts):
        ids = encode_documents(documents, marked, tokenizer, counts)
        start = 0
        while start < len(ids):
            number = (position + start) // span
            side = side_of_span(number)
            while (number + 1) * span < position + len(ids) and side_of_span(number + 1) == side:
                number += 1  # neighbours on the same side are written together
            end = (number + 1) * span - position
            yield side, ids[start:end]
            start = end
        position += len(ids)


def encode_all(sources, tokenizer, args, counts):
    """Yield the ids of all documents in order."""
    for documents, marked in read_documents(sources, args, counts):
        yield encode_documents(documents, marked, tokenizer, counts)


def look_at_beginning(sources, args, characters):
    """The Counts of the beginning of the text, at least `characters` of it, or of all."""
    counts = Counts()
    for _ in read_documents(sources, args, counts):
        if counts.characters >= characters:
            break
    return counts


def prepare_text(name, sources, tokenizer, args, paths):
    """Encode the text of some sources into `paths`, the training and the validation file.

    Returns (numbers for the report, Counts). Raises InputError if the text is too short for two blocks."""
    least = args.block_size + 1
    longest_span = 16 * args.block_size
    beginning = look_at_beginning(sources, args, longest_span * FEWEST_DOCUMENTS)
    if not beginning.characters:
        raise InputError(f"{name}: is empty; give a file with text in it")
    # Long spans, as a window across the edge of two of them is not running text; but enough of them.
    span = max(least, min(longest_span, beginning.characters // FEWEST_DOCUMENTS))

    def documents(fraction, counts):
        return split_documents(sources, tokenizer, args, fraction, counts)

    def spans(fraction, counts):
        return split_spans(sources, tokenizer, args, span, fraction, counts)

    def write(read_parts):
        return write_split(read_parts, paths, tokenizer.dtype, (), args.val_fraction, least)

    if args.val_split == "tail":
        split = f"position: the last {args.val_fraction:.4g} of the text validates"
        counts = write_tail_split(lambda counts: encode_all(sources, tokenizer, args, counts),
                                  paths, tokenizer.dtype, args.val_fraction)
    else:
        split = f"spans of {span:,} tokens"
        # Most texts show at once whether they are marked; in others the marks may come later.
        counts = beginning if beginning.documents >= FEWEST_DOCUMENTS else write(spans)
        if counts.documents >= FEWEST_DOCUMENTS:
            split = "whole documents"
            counts = write(documents)
            if counts.fewest_tokens < least:
                split = f"spans of {span:,} tokens"
                counts = write(spans)
    training, validation = counts.sides
    if counts.fewest_tokens < least:
        raise InputError(f"{name}: {training.tokens:,} tokens for training and {validation.tokens:,} for "
                         f"validation, but a block takes {least:,}; give more text or a smaller --block_size")
    for side in counts.sides:
        side.blocks = side.tokens // args.block_size
    say_what_was_normalised(name, counts)
    numbers = {"file": name, "characters": counts.characters, "documents": counts.documents, "split": split}
    return {**numbers, **counts.by_side("documents", "tokens", "blocks")}, counts


def say_what_was_normalised(name, counts):
    """One line on byte order marks and line ends that were changed, and lines on skipped rows."""
    normalised = [f"{n:,} {what}" for n, what in ((counts.byte_order_marks, "byte order mark"),
                                                  (counts.line_ends, "CRLF or CR line ends")) if n]
    if normalised:
        print(f"{name}: normalised {', '.join(normalised)}")
    counts.print_bad_rows(name)
