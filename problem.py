"""The problem lab: what a Transformer can learn besides language. Data and answers are generated.

    python problem.py sort                                   114515 → 111455
    python problem.py palindrome                             123456 → 654321
    python problem.py q                                      closed loops in the digits: 8086 = 6
    python problem.py bool                                   + is or, * is and: (+ (* 0 1) (* 1 1)) = 1
    python problem.py sort --length 8 --max_steps 2000       any setting; see python problem.py sort --help
    python problem.py sort --eval_only -m checkpoint/sort_last.pt
    python problem.py sort -i -m checkpoint/sort_last.pt     type inputs yourself

Trains, then scores the exact matches on 10,000 inputs that the training never draws. The last line on
standard output is one JSON object. Model, loop, tokenizer and checkpoints are those of language.
"""

import time

START = time.perf_counter()

import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from config import IGNORE, ROOT, ModelConfig, Parser, TrainConfig, load_config, parse_value
from script import InputError, before_imports, guarded_output, run_script


@dataclass
class Task:
    """One problem. An input is a string without spaces; `settings` has a value for each of the task's flags.

    A causal model reads "input=" and writes the answer and <|eos|>, token by token. One with full attention
    (`is_causal` false in `model`) reads inputs of one length and puts out as long an answer at once.
    """

    generate: Callable  # (rng, n, settings) → list of n inputs, drawn with the numpy Generator rng
    answer: Callable  # input → right answer
    vocabulary: str  # the characters of inputs and answers
    settings: dict  # the task's own flags: name → (default, help)
    block_size: Callable  # settings → tokens in the longest row
    check: Callable  # (input, settings) raises InputError for an input that training would not draw
    model: dict = field(default_factory=dict)  # over the defaults of ModelConfig
    train: dict = field(default_factory=dict)  # over TRAIN
    practice: Callable | None = None  # draws the training's inputs, where they are not to be as the test's
    labels: Callable | None = None  # (input, settings) → [(position, character)]: more targets on the input
    show: Callable = str  # an input as people write it


TRAIN = dict(device="auto", dtype="float32", optimizer="muon", learning_rate=3e-3, min_lr=0.0,
             lr_schedule="linear", warmup_iters=50, lr_decay_iters=0, max_steps=1000, weight_decay=0.0,
             gradient_accumulation_steps=1, batch_size=100, eval_interval=100, log_interval=10)


def digit_strings(rng, n, settings):
    """n strings of `length` digits."""
    if settings["length"] < 1:
        raise InputError(f"length {settings['length']}: must be at least 1")
    digits = rng.integers(ord("0"), ord("9") + 1, (n, settings["length"]), dtype=np.uint8)
    return [row.tobytes().decode() for row in digits]


def check_length(text, settings):
    if len(text) != settings["length"]:
        raise InputError(f"{text}: {len(text)} digits, but the model was trained on {settings['length']}; "
                         "train one with --length")


def numbers(rng, n, settings):
    """n numbers between min_number and max_number: the number of digits is drawn first, then the number."""
    low, high = settings["min_number"], settings["max_number"]
    if not 0 <= low <= high < 10**18:
        raise InputError(f"min_number {low}, max_number {high}: must be from 0 up, in order, and below 10^18")
    digits = rng.integers(len(str(low)), len(str(high)) + 1, n)
    least = np.where(digits == 1, 0, 10 ** (digits - 1))
    return list(map(str, rng.integers(np.maximum(low, least), np.minimum(high, 10**digits - 1) + 1).tolist()))


def numbers_with_eights(rng, n, settings):
    """`numbers`, but in half of them a random share of the digits has become eights, where that is in range.

    In plain draws a high count is so rare that training hardly meets it."""
    texts = numbers(rng, n, settings)
    shares = rng.random(n) * (rng.random(n) < 0.5)
    for i, share in enumerate(shares):
        drawn = rng.random(len(texts[i])) < share
        text = "".join("8" if eight else digit for digit, eight in zip(texts[i], drawn, strict=True))
        if settings["min_number"] <= int(text) <= settings["max_number"]:
            texts[i] = text
    return texts


def loops(text):
    """The closed loops in a number's digits: 0, 6 and 9 have one, 8 has two."""
    return str(sum({"0": 1, "6": 1, "9": 1, "8": 2}.get(digit, 0) for digit in text))


def check_number(text, settings):
    if not re.fullmatch("0|[1-9][0-9]*", text):
        raise InputError(f"{text}: write a whole number without leading zeros")
    if not settings["min_number"] <= int(text) <= settings["max_number"]:
        raise InputError(f"{text}: the model was trained on numbers from {settings['min_number']} to "
                         f"{settings['max_number']}; train one with --min_number, --max_number")


def expressions(rng, n, settings):
    """n expressions: at each place a digit with probability 0.2 (never at the root), always at `depth`."""
    draw = random.Random(int(rng.integers(2**63))).random

    def expression(depth):
        if depth == 0 or (draw() < 0.2 and depth < settings["depth"]):
            return "01"[draw() < 0.5]
        return f"({'+*'[draw() < 0.5]}{expression(depth - 1)}{expression(depth - 1)})"

    if settings["depth"] < 1 or settings["length"] < 7:
        raise InputError(f"depth {settings['depth']}, length {settings['length']}: must be at least 1 and 7")
    texts = []
    while len(texts) < n:
        text = expression(settings["depth"])
        if len(text) + 2 <= settings["length"]:  # "=" and the answer have to fit in too
            texts.append(text)
    return texts


def evaluate(text):
    """Value and depth of a prefix expression, and the (position, value) of each bracket that closes one."""
    stack, closed, depth = [], [], 0
    for at, character in enumerate(text):
        if character != ")":
            stack.append(int(character) if character in "01" else character)
            depth = max(depth, stack.count("("))
            continue
        bracket, operator, a, b = stack[-4:] if len(stack) >= 4 else ("", "", "", "")
        if bracket != "(" or operator not in ("+", "*") or not (isinstance(a, int) and isinstance(b, int)):
            raise InputError(f"{text}: the bracket at character {at + 1} does not close an operator with two "
                             "values, such as (+ 0 1)")
        stack[-4:] = [a | b if operator == "+" else a & b]
        closed.append((at, stack[-1]))
    if len(stack) != 1 or not isinstance(stack[0], int):
        raise InputError(f"{text}: is not one whole expression, such as (+ (* 0 1) 1)")
    return stack[0], depth, closed


def check_expression(text, settings):
    _, depth, _ = evaluate(text)
    if not 1 <= depth <= settings["depth"] or len(text) + 2 > settings["length"]:
        raise InputError(f"{text}: depth {depth}, {len(text) + 2} tokens with the answer, but the model was "
                         f"trained on depth 1 to {settings['depth']}, up to {settings['length']} tokens; "
                         "train one with --depth, --length")


def closed_values(text, settings):
    """The value of every closed sub-expression, at its bracket."""
    return [(at, str(value)) for at, value in evaluate(text)[2]] if settings["label_subexpressions"] else []


DIGITS = "0123456789"
TASKS = {
    "q": Task(
        generate=numbers, practice=numbers_with_eights, answer=loops, vocabulary=DIGITS, check=check_number,
        settings={"min_number": (0, "smallest number"), "max_number": (99_999_999, "largest number")},
        block_size=lambda settings: len(str(settings["max_number"])) + 3,
        model=dict(n_layer=2, n_head=4, n_embd=64), train=dict(max_steps=2000)),
    "sort": Task(
        generate=digit_strings, answer=lambda text: "".join(sorted(text)), vocabulary=DIGITS,
        check=check_length, settings={"length": (6, "digits in an input")},
        block_size=lambda settings: settings["length"],
        model=dict(n_layer=2, n_head=4, n_embd=64, activation="relu2", is_causal=False, use_rope=False),
        train=dict(max_steps=1500)),
    "palindrome": Task(
        generate=digit_strings, answer=lambda text: text[::-1], vocabulary=DIGITS,
        check=check_length, settings={"length": (6, "digits in an input")},
        block_size=lambda settings: settings["length"],
        model=dict(n_layer=2, n_head=4, n_embd=64, is_causal=False, use_rope=False),
        train=dict(max_steps=500)),
    "bool": Task(
        generate=expressions, answer=lambda text: str(evaluate(text)[0]), vocabulary="()+*01",
        check=check_expression, labels=closed_values,
        show=lambda text: re.sub(r"(?<=[^(])(?=[(01])", " ", text),
        settings={"depth": (4, "deepest nesting of an expression"),
                  "length": (64, "longest expression with = and its answer, in tokens"),
                  "label_subexpressions": (True, "in training, label each closing bracket with the value of "
                                                  "its sub-expression?")},
        block_size=lambda settings: settings["length"],
        model=dict(n_layer=6, n_head=4, n_embd=64, activation="relu2", qk_norm=True, use_rope=False),
        train=dict(max_steps=800)),
}
TEST_INPUTS = 10_000
NOT_HERE = ("dataset_path", "backend", "document_mask", "vocab_size")  # fields without a meaning in the lab


def command_line():
    """Parse the flags: those of everything, then those of the task named first."""
    cli = Parser(__doc__)
    cli.add_argument("task", choices=TASKS)
    cli.add_argument("--eval_only", action="store_true", help="train nothing, score the checkpoint -m")
    cli.add_argument("-i", "--interactive", action="store_true",
                     help="train nothing, answer what you type with the checkpoint -m")
    cli.add_argument("-m", "--model", metavar="FILE", help="default: checkpoint/TASK_last.pt")
    task = TASKS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if task is None:
        cli.parse_args()  # prints the help, or what is wrong with the task
        cli.error("the task comes first: python problem.py TASK --flags")
    group = cli.add_argument_group("The problem")
    for name, (default, text) in task.settings.items():
        kind = type(default)
        extra = {"nargs": "?", "const": True} if kind is bool else {}
        group.add_argument(f"--{name}", type=parse_value(kind), metavar=kind.__name__.upper(),
                           help=f"{text} (default {default})", **extra)
    train_defaults = {**TRAIN, **task.train}
    cli.add_config(TrainConfig, NOT_HERE, train_defaults).add_config(ModelConfig, NOT_HERE, task.model)
    args = cli.parse_args()
    args.settings = {name: getattr(args, name) for name in task.settings if getattr(args, name) is not None}
    train_flags = cli.overrides(args, TrainConfig)
    args.train = load_config(TrainConfig, None, {**train_defaults, **train_flags})
    args.model_flags = cli.overrides(args, ModelConfig)
    args.root = ROOT
    return args


if __name__ == "__main__":
    before_imports(command_line)

import torch
from tqdm import tqdm

import checkpoint as ckpt
from device import pick_device
from generate import complete, generate_all_at_once
from run import build_run
from strategy import SingleProcess
from tokenizer import Tokenizer
from train import fit


def side_of(text):
    """The side of the split that an input is on, whatever the seed: 1 in 10 test, 1 in 10 validation."""
    return {0: "test", 1: "validation"}.get(hashlib.blake2b(text.encode()).digest()[0] % 10, "training")


def draw(task, settings, rng, n, side, distinct=False):
    """Up to n inputs on one side of the split, in random order; fewer if `distinct` and there are no more.

    Raises InputError if the settings leave none at all."""
    generate = task.practice if task.practice and side == "training" else task.generate
    texts, fruitless = [], 0
    while len(texts) < n and fruitless < 20:
        found = texts + [text for text in generate(rng, n, settings) if side_of(text) == side]
        found = list(dict.fromkeys(found)) if distinct else found
        fruitless = 0 if len(found) > len(texts) else fruitless + 1
        texts = found
    if not texts:
        chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
        raise InputError(f"with {chosen} there are no {side} inputs; allow longer ones")
    return texts[:n]


class ProblemLoader:
    """Batches of inputs drawn from a seed; used by the loop as it uses dataloader.DataLoader.

    Letters: B rows in a batch, T tokens in its longest row."""

    POOL = 20  # batches drawn together and sorted by length, so that little is padded
    epoch = 0.0  # rows are drawn without end

    def __init__(self, task, settings, tokenizer, is_causal, batch_size, seed, side):
        self.task, self.settings, self.tokenizer, self.is_causal = task, settings, tokenizer, is_causal
        self.batch_size, self.seed, self.side = batch_size, seed, side
        self.position = 0  # batches read so far
        self.pool, self.pool_number = [], -1

    def next_batch(self):
        """Inputs and targets, two int64 arrays (B, T)."""
        number, i = divmod(self.position, self.POOL)
        if number != self.pool_number:
            rng = np.random.default_rng([self.seed, number])
            self.pool, self.pool_number = list(self.batches(rng, self.POOL)), number
            rng.shuffle(self.pool)
        self.position += 1
        return self.encode(self.pool[i])

    def fixed_batches(self, n):
        """n batches, the same at every call, for validation."""
        return map(self.encode, self.batches(np.random.default_rng(self.seed), n))

    def batches(self, rng, n):
        """n lists of batch_size inputs of similar length."""
        texts = sorted(draw(self.task, self.settings, rng, n * self.batch_size, self.side), key=len)
        return (texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size))

    def encode(self, texts):
        """Inputs and targets (B, T) of a list of inputs. Targets stand where the model is to put them out."""
        encode, eos = self.tokenizer.encode, [self.tokenizer.eos_id]
        answers = [self.task.answer(text) for text in texts]
        if not self.is_causal:
            return (np.stack([encode(text) for text in texts]).astype(np.int64),
                    np.stack([encode(answer) for answer in answers]).astype(np.int64))
        longest = max(len(text) + len(answer) for text, answer in zip(texts, answers, strict=True)) + 1
        x = np.full((len(texts), longest), self.tokenizer.pad_id, np.int64)
        y = np.full((len(texts), longest), IGNORE, np.int64)
        for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            end = len(text) + 1 + len(answer)
            x[row, :end] = encode(f"{text}={answer}")
            y[row, len(text) : end] = [*encode(answer), *eos]
            for at, character in self.task.labels(text, self.settings) if self.task.labels else ():
                y[row, at] = self.tokenizer.stoi[character]
        return x, y

    def state_dict(self):
        return {"rows": self.position * self.batch_size, "settings": self.settings}

    def load_state_dict(self, state):
        self.position = state["rows"] // self.batch_size


def solve(model, tokenizer, texts):
    """The model's answers to a list of inputs of one length, a list of strings."""
    if not model.config.is_causal:
        idx = torch.tensor(np.stack([tokenizer.encode(text) for text in texts]).astype(np.int64))
        return [tokenizer.decode(ids) for ids in generate_all_at_once(model, idx.to(model.device)).cpu()]
    prompts = [tokenizer.encode(text + "=") for text in texts]
    return [tokenizer.decode(ids) for ids in complete(model, prompts, model.config.block_size,
                                                      stop_ids=(tokenizer.eos_id,), temperature=0)]


def score(task, model, tokenizer, settings, show=3):
    """Answer unseen inputs, the same for every model, and print a few. Returns (right answers, inputs)."""
    texts = draw(task, settings, np.random.default_rng(0), TEST_INPUTS, "test", distinct=True)
    if len(texts) < TEST_INPUTS:
        print(f"these settings leave only {len(texts)} distinct inputs for the test")
    rows = []
    with tqdm(total=len(texts), desc="test", unit="input") as bar:
        for _, same in itertools.groupby(sorted(texts, key=len), key=len):
            same = list(same)
            for i in range(0, len(same), 500):
                rows += zip(same[i : i + 500], solve(model, tokenizer, same[i : i + 500]), strict=True)
                bar.update(len(rows) - bar.n)
    random.Random(0).shuffle(rows)  # examples of all lengths
    verdicts = [(text, got, task.answer(text)) for text, got in rows]
    right = [row for row in verdicts if row[1] == row[2]]
    wrong = [row for row in verdicts if row[1] != row[2]]
    for text, got, _ in right[:show]:
        print(f"  right: {task.show(text)} → {got}")
    for text, got, answer in wrong[:show]:
        print(f"  wrong: {task.show(text)} → {got}   (expected {answer})")
    return len(right), len(rows)


def read_input(task, settings, typed):
    """The input that a person typed; spaces and a final "=" make no difference. Raises InputError."""
    text = re.sub(r"\s", "", typed).removesuffix("=")
    for character in text:
        if character not in task.vocabulary:
            raise InputError(f"{typed}: has {character!r}, but only {' '.join(task.vocabulary)} can be read")
    if not text:
        raise InputError("the input is empty")
    task.check(text, settings)
    return text


def interact(task, model, tokenizer, settings):
    """Answer line by line until the end of input. Returns 2 if a line was wrong, else 0."""
    status = 0
    while True:
        try:
            typed = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return status
        try:
            if typed:
                print(*solve(model, tokenizer, [read_input(task, settings, typed)]), flush=True)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2


def open_checkpoint(args):
    """Model, tokenizer, settings, step and seed of the checkpoint -m; the flags go over its settings."""
    path = args.model or os.path.join("checkpoint", f"{args.task}_last.pt")
    start = ckpt.load(path)
    if start["task"] != args.task:
        raise InputError(f"{path}: is a checkpoint of {start['task']}, not of {args.task}")
    model, tokenizer = ckpt.build_model(start, path)
    settings = {**start["dataloader"]["settings"], **args.settings}
    needed = TASKS[args.task].block_size(settings)
    if needed > model.config.block_size:
        raise InputError(f"{path}: has block_size {model.config.block_size}, but these settings need "
                         f"{needed}; train with --block_size {needed}")
    return model.to(pick_device(args.train.device)), tokenizer, settings, start


def train(args):
    """Train as the flags say. Returns model, tokenizer, settings and what fit() returns."""
    task = TASKS[args.task]
    config = args.train
    strategy = SingleProcess()
    strategy.setup(config)
    tokenizer = Tokenizer.build([task.vocabulary, "="])
    settings = {name: default for name, (default, _) in task.settings.items()}

    def make_loaders(model_config, start):
        settings.update((start["dataloader"]["settings"] if start else {}) | args.settings)
        return [ProblemLoader(task, settings, tokenizer, model_config.is_causal, config.batch_size,
                              config.random_seed, side) for side in ("training", "validation")]

    shape = {"block_size": task.block_size({**settings, **args.settings}), **task.model, **args.model_flags}
    setup = build_run(config, strategy, args.task, tokenizer, load_config(ModelConfig, None, shape),
                      make_loaders, args.root, args.model_flags)
    c = setup.model.config
    strategy.say(f"{args.task}, " + ", ".join(f"{name} {value}" for name, value in settings.items()) +
                 f": {setup.model.n_params() / 1e6:.2f} M parameters ({c.n_layer} layers, {c.n_embd} wide, "
                 f"{'causal' if c.is_causal else 'full'} attention) on {strategy.device}")
    with guarded_output():
        result = fit(setup.model, tokenizer, setup.loader, setup.val_loader, config, strategy, setup.run)
    return setup.model.eval(), tokenizer, settings, result


def main():
    args = command_line()
    task = TASKS[args.task]
    if args.eval_only or args.interactive:
        model, tokenizer, settings, start = open_checkpoint(args)
        if args.interactive:
            return interact(task, model, tokenizer, settings)
        steps, seed = start["step"], start["train_config"]["random_seed"]
    else:
        model, tokenizer, settings, result = train(args)
        if result["signal"]:
            return 128 + result["signal"]
        steps, seed = result["step"], args.train.random_seed
    right, n = score(task, model, tokenizer, settings)
    print(f"{args.task}: {right} of {n} unseen inputs right ({right / n:.2%}) after {steps} steps")
    print(json.dumps({"task": args.task, "accuracy": right / n, "right": right, "inputs": n, "steps": steps,
                      "parameters": model.n_params(), "seconds": round(time.perf_counter() - START, 1),
                      "seed": seed, "settings": settings}))


if __name__ == "__main__":
    run_script(main)
