"""Score a checkpoint: loss and bits per character, exact match on questions, multiple choice (C-Eval).

    python evaluate.py -m checkpoint/pretrain_best.pt --text dataset/pretrain.txt
    python evaluate.py -m checkpoint/sft_best.pt --data dataset/sft_val.npy
    python evaluate.py -m checkpoint/sft_best.pt --qa dataset/sample_heldout.jsonl
    python evaluate.py -m checkpoint/sft_best.pt --ceval DIR      (a folder of C-Eval's CSV files)

The last line on standard output is one JSON object with every score.
"""

import csv
import glob
import json
import math
import os
import sys

from config import IGNORE, InputError, Parser, before_imports, run_script
from cpu import native


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("-m", "--model", required=True, metavar="FILE", help="checkpoint")
    cli.add_argument("--text", metavar="FILE", help="loss and bits per character over all of a text")
    cli.add_argument("--data", metavar="FILE", help="loss over all of a prepared .npy file")
    cli.add_argument("--qa", metavar="FILE", help="exact match on the question-answer pairs of a JSONL file")
    cli.add_argument("--ceval", metavar="DIR",
                     help="accuracy on multiple choice, CSV files as C-Eval has them")
    cli.add_argument("--show", type=int, default=5, metavar="N", help="print N right and N wrong answers")
    cli.add_argument("--int8", action="store_true", help="score with int8 weights, on a CPU")
    cli.add_argument("--device", default="auto")
    args = cli.parse_args()
    if not (args.text or args.data or args.qa or args.ceval):
        cli.error("nothing to score: give --text, --data, --qa or --ceval")
    return args


if __name__ == "__main__":
    before_imports(command_line)
    native.start("decode.c")  # is compiled while torch is imported

import numpy as np
import torch
from tqdm import tqdm

import checkpoint as ckpt
from dataloader import InstructionRows, TextBlocks, open_array
from device import pick_device
from generate import complete, quantize
from tokenizer import encode_conversation, encode_prompt


@torch.inference_mode()
def mean_loss(model, batches, total):
    """Loss per counted token over `batches` of (x, y) arrays (B, T); returns (loss, number of tokens)."""
    loss = tokens = 0
    for x, y in tqdm(batches, total=total, desc="loss", unit="batch"):
        n = int((y != IGNORE).sum())
        x, y = torch.from_numpy(x).to(model.device), torch.from_numpy(y).to(model.device)
        loss += n * float(model(x, y)[1])
        tokens += n
    return loss / max(1, tokens), tokens


def text_batches(ids, block_size, batch_size=16):
    """Every token of `ids` (1-D) but the first is a target once, in windows of block_size, in order."""
    n = math.ceil((len(ids) - 1) / block_size)
    padded = np.full(n * block_size + 1, IGNORE, np.int64)
    padded[: len(ids)] = ids
    x, y = padded[:-1].reshape(n, block_size), padded[1:].reshape(n, block_size)
    return [(np.maximum(x[i : i + batch_size], 0), y[i : i + batch_size]) for i in range(0, n, batch_size)]


def score_text(model, tokenizer, path):
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    ids = tokenizer.encode(text, allow_special=True)
    if len(ids) < 2:
        raise InputError(f"{path}: too short to score")
    batches = text_batches(ids, model.config.block_size)
    loss, tokens = mean_loss(model, batches, len(batches))
    unknown = int((ids == tokenizer.unknown_id).sum())
    return {"loss": loss, "bits_per_character": loss / math.log(2), "tokens": tokens, "unknown": unknown}


def score_data(model, path):
    data = open_array(path)
    largest = int((data if data.ndim == 1 else data[:, 0]).max(initial=0))
    if largest >= model.config.vocab_size:
        raise InputError(f"{path}: holds token id {largest}, beyond the model's vocabulary of "
                         f"{model.config.vocab_size}; prepare it with data.py --tokenizer")
    if data.ndim == 1:
        source = TextBlocks(path, model.config.block_size)
        batches = text_batches(np.asarray(source.tokens), model.config.block_size)
    else:
        source = InstructionRows(path, model.config.block_size)
        rows = source.fixed_rows(source.n_rows)
        batches = [source.batch(rows[i : i + 32]) for i in range(0, len(rows), 32)]
    loss, tokens = mean_loss(model, batches, len(batches))
    return {"loss": loss, "bits_per_character": loss / math.log(2), "tokens": tokens}


def read_pairs(path):
    """Question-answer pairs of a JSONL file. Raises InputError naming the line."""
    pairs, number = [], 0
    try:
        with open(path, encoding="utf-8-sig") as f:
            for line in f:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    pairs.append((row["question"] + "", row["answer"] + ""))  # TypeError if not strings
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{path}, line {number}: must be {{"question": …, "answer": …}}') from None
    if not pairs:
        raise InputError(f"{path}: holds no pairs")
    return pairs


def score_pairs(model, tokenizer, pairs, show):
    """Greedy answers against the expected ones, character for character."""
    prompts = [encode_prompt(tokenizer, [], question) for question, _ in pairs]
    limit = 2 + max(len(tokenizer.encode(answer)) for _, answer in pairs)
    right = []
    for i in tqdm(range(0, len(pairs), 64), desc="answers", unit="batch"):
        for (question, answer), ids in zip(pairs[i:], complete(model, prompts[i : i + 64], limit,
                                           stop_ids=(tokenizer.eos_id,), temperature=0), strict=False):
            right.append((tokenizer.decode(ids) == answer, question, tokenizer.decode(ids), answer))
    for verdict, mark in ((True, "right"), (False, "wrong")):
        for _, question, got, answer in [row for row in right if row[0] is verdict][:show]:
            print(f"  {mark}: {question} → {got}" + ("" if verdict else f"   (expected {answer})"))
    n_right = sum(row[0] for row in right)
    return {"exact_match": n_right / len(pairs), "right": n_right, "questions": len(pairs)}


def read_choices(path):
    """The rows of one of C-Eval's files, as dicts. Raises InputError naming the file and the line."""
    columns = ("question", "A", "B", "C", "D", "answer")
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f)
            rows = []
            for row in reader:
                if any(row.get(name) is None for name in columns):
                    raise InputError(f"{path}, line {reader.line_num}: needs the columns "
                                     f"{', '.join(columns)}")
                rows.append(row)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    if not rows:
        raise InputError(f"{path}: holds no questions")
    return rows


@torch.inference_mode()
def score_choices(model, tokenizer, folder):
    """Answer each question with the option whose text the model finds likeliest, a token on average."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.csv")))
    if not paths:
        raise InputError(f"{folder}: holds no .csv files")
    scores = {}
    for path in tqdm(paths, desc="multiple choice", unit="subject"):
        rows = read_choices(path)
        right = 0
        for row in rows:
            losses = []
            for letter in "ABCD":
                ids, mask = encode_conversation(tokenizer, [(row["question"], row[letter])])
                ids, mask = np.asarray(ids, np.int64), np.asarray(mask)
                y = np.where(mask[1:] == 1, ids[1:], IGNORE)[-model.config.block_size:]
                x = ids[:-1][-model.config.block_size:]
                losses.append(float(model(torch.from_numpy(x)[None].to(model.device),
                                          torch.from_numpy(y)[None].to(model.device))[1]))
            right += "ABCD"[int(np.argmin(losses))] == row["answer"]
        scores[os.path.splitext(os.path.basename(path))[0]] = (right, len(rows))
    total, right = sum(n for _, n in scores.values()), sum(r for r, _ in scores.values())
    return {"accuracy": right / total, "right": right, "questions": total, "chance": 0.25,
            "subjects": {name: r / n for name, (r, n) in scores.items()}}


def main():
    args = command_line()
    model, tokenizer = ckpt.build_model(ckpt.load(args.model), args.model)
    model.to(pick_device(args.device))
    if args.int8:
        quantize(model)
    scores = {"model": args.model}
    if args.text:
        scores["text"] = score_text(model, tokenizer, args.text)
    if args.data:
        scores["data"] = score_data(model, args.data)
    if args.qa:
        native.wait("decode.c")  # so that every answer is computed in the same way
        scores["qa"] = score_pairs(model, tokenizer, read_pairs(args.qa), args.show)
    if args.ceval:
        scores["ceval"] = score_choices(model, tokenizer, args.ceval)
    sys.stderr.flush()
    for name, values in scores.items():
        for key, value in values.items() if isinstance(values, dict) else []:
            print(f"{name:6} {key:20} {value if not isinstance(value, float) else format(value, '.4f')}")
    print(json.dumps(scores, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
