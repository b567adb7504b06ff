"""Score a checkpoint: loss and bits per character, exact match on questions, multiple choice (C-Eval).

    python evaluate.py -m checkpoint/pretrain_best.pt --text dataset/pretrain.txt
    python evaluate.py -m checkpoint/sft_best.pt --data dataset/sft_val.npy
    python evaluate.py -m checkpoint/sft_best.pt --qa dataset/sample_heldout.jsonl
    python evaluate.py -m checkpoint/sft_best.pt --ceval DIR      (or a file; C-Eval's or CMMLU's columns)
    python evaluate.py -m checkpoint/sft_best.pt --ceval DIR --shots 5      (examples from the folder dev)
    python evaluate.py -m checkpoint/sft_best.pt --ceval DIR --contamination dataset/pretrain.txt

The last line on standard output is one JSON object with every score.
"""

import math
import os
import sys

from config import IGNORE_INDEX
from cpu import native
from flags import Parser, require_checkpoint
from script import InputError, before_imports, print_json, run_script


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("-m", "--model", required=True, metavar="FILE", help="checkpoint")
    cli.add_argument("--text", metavar="FILE", help="loss and bits per character over all of a text")
    cli.add_argument("--data", metavar="FILE", help="loss over all of a prepared .npy file")
    cli.add_argument("--qa", metavar="FILE",
                     help="exact match on questions and answers, in any form that data.py --sft reads")
    cli.add_argument("--ceval", metavar="PATH",
                     help="accuracy on multiple choice: a CSV file, or a folder of them, as C-Eval has them")
    cli.add_argument("--shots", type=int, default=0, choices=range(6), metavar="0..5",
                     help="examples before each question of --ceval (default %(default)s)")
    cli.add_argument("--dev", metavar="DIR", help="where the examples are (default: the folder dev, in "
                     "the folder of --ceval or beside it)")
    cli.add_argument("--contamination", nargs="+", metavar="FILE",
                     help="also count the questions of --ceval and --qa that occur in this training text")
    cli.add_argument("--show", type=int, default=5, metavar="N", help="print N right and N wrong answers")
    cli.add_argument("--int8", action="store_true", help="score with int8 weights, on a CPU")
    cli.add_argument("--device", default="auto")
    args = cli.parse_args()
    if not (args.text or args.data or args.qa or args.ceval):
        cli.error("nothing to score: give --text, --data, --qa or --ceval")
    if args.contamination and not (args.qa or args.ceval):
        cli.error("--contamination looks for the questions of --ceval or --qa: give one of them")
    if (args.shots or args.dev) and not args.ceval:
        cli.error("--shots and --dev belong to --ceval")
    require_checkpoint(args.model)
    return args


if __name__ == "__main__":
    before_imports(command_line)
    native.start("decode.c")  # is compiled while torch is imported

import numpy as np
import torch
from tqdm import tqdm

import checkpoint as ckpt
from corpus.fingerprint import check_vocabulary
from corpus.inputs import DOCUMENTS, Source, find_files
from corpus.rows import load_conversations
from corpus.split import Counts
from corpus.text import read_text
from cpu.int8 import quantize
from dataloader import InstructionRows, open_array
from device import pick_device, setup_device
from model import batch_loss
from scoring.answers import complete
from scoring.contamination import count_contamination
from scoring.likelihood import fit_prompt
from scoring.multiple_choice import print_table, score_choices

IDS_AT_ONCE = 1 << 20
TEXT_BATCH = 16  # windows of block_size tokens
ROW_BATCH = 32


# ---- Loss ----

def characters_of_ids(tokenizer):
    """How many characters of text each token id stands for, int64 (V,).

    A word counts all of its characters, <|unknown|> the one that it replaces, and the other special tokens
    none: they are marks, not text. Their bits are counted all the same."""
    lengths = np.array([len(token) for token in tokenizer.itos], np.int64)
    lengths[[tokenizer.stoi[token] for token in tokenizer.special_tokens]] = 0
    lengths[tokenizer.unknown_id] = 1
    return lengths


@torch.inference_mode()
def score_batches(model, tokenizer, batches, document_mask, total=None):
    """The scores of some batches (x, y), int64 arrays (B, T), as a dict.

    total: the number of batches, for the time left on the progress bar; None: not known.
    loss: nats a predicted token. bits_per_character: the bits of all predicted tokens by the number of their
    characters (None if they have none). unknown: how many of them are <|unknown|>."""
    lengths = characters_of_ids(tokenizer)
    nats = 0.0
    n_tokens = 0
    n_characters = 0
    n_unknown = 0
    for x, y in tqdm(batches, desc="loss", unit="batch", total=total):
        predicted = y[y != IGNORE_INDEX]
        x = torch.from_numpy(x).to(model.device)
        y = torch.from_numpy(y).to(model.device)
        loss = batch_loss(model, x, y, document_mask, tokenizer.bos_id, tokenizer.eos_id)
        nats += len(predicted) * float(loss)
        n_tokens += len(predicted)
        n_characters += int(lengths[predicted].sum())
        n_unknown += int((predicted == tokenizer.unknown_id).sum())
    bits_per_character = nats / math.log(2) / n_characters if n_characters else None
    return {"loss": nats / max(1, n_tokens), "bits_per_character": bits_per_character,
            "tokens": n_tokens, "characters": n_characters, "unknown": n_unknown}


def window_batches(pieces, block_size, pad_id):
    """Yield batches (x, y) of windows, (B, block_size), over the ids that come in `pieces`, arrays (n,).

    Every id but the first is a target once, in order. No more ids are in memory than a piece and a batch."""
    rest = np.empty(0, np.int64)
    size = TEXT_BATCH * block_size
    for piece in pieces:
        ids = np.concatenate([rest, piece])
        start = 0
        while start + size < len(ids):
            yield (ids[start : start + size].reshape(-1, block_size),
                   ids[start + 1 : start + size + 1].reshape(-1, block_size))
            start += size
        rest = ids[start:]
    n = -(-(len(rest) - 1) // block_size)
    if n > 0:
        x = np.full(n * block_size, pad_id, np.int64)
        y = np.full(n * block_size, IGNORE_INDEX, np.int64)
        x[: len(rest) - 1] = rest[:-1]
        y[: len(rest) - 1] = rest[1:]
        yield x.reshape(n, block_size), y.reshape(n, block_size)


def n_window_batches(n_ids, block_size):
    """How many batches `window_batches` makes of `n_ids` ids."""
    return -(-max(0, n_ids - 1) // (TEXT_BATCH * block_size))


def last_cut(text, tokenizer, longest):
    """Where `text`, which goes on, can be cut in two that are encoded as in the whole: no entry of the
    vocabulary, of at most `longest` characters, reaches across. 0 if nowhere."""
    for cut in range(len(text) - longest + 1, 0, -1):
        if not any(text[start:end] in tokenizer.stoi for start in range(max(0, cut - longest + 1), cut)
                   for end in range(cut + 1, start + longest + 1)):
            return cut
    return 0


def encode_pieces(tokenizer, path):
    """Yield the ids of a UTF-8 text, piece by piece, as encoding all of it gives them. Raises InputError."""
    longest = max(len(token) for token in tokenizer.itos)
    has_words = any(len(token) > 1 and token not in tokenizer.special_tokens for token in tokenizer.itos)
    rest = ""
    try:
        # A piece never ends within a special token, but may end within a word of the vocabulary.
        for text in read_text(Source(path, path, DOCUMENTS), Counts()):
            text = rest + text
            cut = last_cut(text, tokenizer, longest) if has_words else len(text)
            rest = text[cut:]
            yield tokenizer.encode(text[:cut], allow_special=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if rest:
        yield tokenizer.encode(rest, allow_special=True)


def score_text(model, tokenizer, path, document_mask):
    block_size = model.config.block_size
    total = None
    if os.path.isfile(path):  # a pipe can be read only once
        total = n_window_batches(sum(map(len, encode_pieces(tokenizer, path))), block_size)
    batches = window_batches(encode_pieces(tokenizer, path), block_size, tokenizer.pad_id)
    scores = score_batches(model, tokenizer, batches, document_mask, total)
    if not scores["tokens"]:
        raise InputError(f"{path}: too short to score; it must hold at least two tokens")
    return scores


def read_ids(path, data, vocab_size):
    """Yield the ids of an opened array, (n,) or (n, 2), piece by piece, without leaving it in memory.

    A memory map would stay there, page by page. Raises InputError for an id beyond the vocabulary."""
    width = 1 if data.ndim == 1 else data.shape[1]
    with open(path, "rb") as file:
        file.seek(data.offset)
        while len(ids := np.fromfile(file, data.dtype, IDS_AT_ONCE * width)):
            largest = int(ids[::width].max())
            if largest >= vocab_size:
                raise InputError(f"{path}: holds token id {largest}, beyond the model's vocabulary of "
                                 f"{vocab_size}; prepare it with data.py --tokenizer")
            yield ids


def row_batches(source):
    """Yield batches (x, y) of all instruction rows of an InstructionRows, short ones first."""
    rows = source.fixed_rows(source.n_rows)
    for start in range(0, len(rows), ROW_BATCH):
        yield source.batch(rows[start : start + ROW_BATCH])


def score_data(model, tokenizer, path, document_mask):
    data = open_array(path)
    check_vocabulary(path, tokenizer)
    pieces = read_ids(path, data, model.config.vocab_size)
    if data.ndim == 1:
        batches = window_batches(pieces, model.config.block_size, tokenizer.pad_id)
        total = n_window_batches(len(data), model.config.block_size)
    else:
        for _ in pieces:  # only looks for ids beyond the vocabulary
            pass
        source = InstructionRows(path, model.config.block_size, tokenizer.pad_id)
        batches = row_batches(source)
        total = -(-source.n_rows // ROW_BATCH)
    scores = score_batches(model, tokenizer, batches, document_mask, total)
    if not scores["tokens"]:
        raise InputError(f"{path}: holds no token to score; run python data.py")
    return scores


# ---- Questions and answers ----

def score_pairs(model, tokenizer, conversations, show):
    """Greedy answers to the last question of each conversation, after its earlier turns, against the expected
    ones, character for character.

    A prompt that leaves no room for the expected answer loses earlier turns, then the beginning of the
    question. Both are counted, as are answers that no answer can equal: without room (no_room), or with
    characters outside the vocabulary (unknown_in_answer)."""
    counts = {"fewer_turns": 0, "cut_questions": 0, "no_room": 0, "unknown_in_answer": 0}
    asked = []
    prompts = []
    longest = 0
    for *turns, (question, answer) in conversations:
        n_answer = len(tokenizer.encode(answer)) + 1  # and <|eos|>
        prompt, n_dropped, is_cut = fit_prompt(tokenizer, turns, question, model.config.block_size - n_answer)
        counts["unknown_in_answer"] += bool(tokenizer.unknown(answer))
        if prompt is None:
            counts["no_room"] += 1
            continue
        counts["fewer_turns"] += n_dropped > 0
        counts["cut_questions"] += is_cut
        asked.append((question, answer))
        prompts.append(prompt)
        longest = max(longest, n_answer)
    rows = []
    for i in tqdm(range(0, len(prompts), 64), desc="answers", unit="batch"):
        answers = complete(model, prompts[i : i + 64], longest + 1, stop_ids=(tokenizer.eos_id,),
                           temperature=0)
        for (question, wanted), ids in zip(asked[i : i + 64], answers, strict=True):
            rows.append((question, tokenizer.decode(ids), wanted))
    right = [row for row in rows if row[1] == row[2]]
    wrong = [row for row in rows if row[1] != row[2]]
    for question, got, _ in right[:show]:
        print(f"  right: {question} → {got}")
    for question, got, wanted in wrong[:show]:
        print(f"  wrong: {question} → {got}   (expected {wanted})")
    return {"exact_match": len(right) / len(conversations), "right": len(right),
            "questions": len(conversations), **counts}


def print_scores(scores):
    """A table for people, without what `print_table` has printed."""
    for name, values in scores.items():
        for key, value in values.items() if isinstance(values, dict) and name != "ceval" else []:
            print(f"{name:6} {key:20} {value if not isinstance(value, float) else format(value, '.4f')}")


def main():
    args = command_line()
    for path in args.contamination or []:
        find_files(path)  # a missing one is better known before the scoring
    checkpoint = ckpt.load(args.model)
    document_mask = checkpoint["train_config"].get("document_mask", False)
    model, tokenizer = ckpt.build_model(checkpoint, args.model)
    device = pick_device(args.device)
    setup_device(device)
    model.to(device)
    if args.int8:
        quantize(model)
    scores = {"model": args.model}
    pairs = []
    if args.text:
        scores["text"] = score_text(model, tokenizer, args.text, document_mask)
    if args.data:
        scores["data"] = score_data(model, tokenizer, args.data, document_mask)
    if args.qa:
        conversations = load_conversations(args.qa)
        pairs += [turns[-1] for turns in conversations]
        native.wait("decode.c")  # so that every answer is computed in the same way
        scores["qa"] = score_pairs(model, tokenizer, conversations, args.show)
    if args.ceval:
        scores["ceval"], questions = score_choices(model, tokenizer, args.ceval, args.shots, args.dev,
                                                   args.show)
        pairs += [(question.text, question.right_option) for question in questions]
        print_table(scores["ceval"])
    if args.contamination:
        scores["contamination"] = count_contamination(pairs, args.contamination)
    sys.stderr.flush()
    print_scores(scores)
    print_json(scores)


if __name__ == "__main__":
    run_script(main)
