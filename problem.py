"""The problem lab: what a Transformer can learn besides language. Inputs and answers are generated.

    python problem.py sort                                   114515 → 111455
    python problem.py palindrome                             123456 → 654321
    python problem.py q                                      closed loops in the digits: 8086 → 6
    python problem.py bool                                   + is or, * is and: (+ (* 0 1) (* 1 1)) → 1
    python problem.py sort --length 8 --max_steps 2000       any setting; see python problem.py sort --help
    python problem.py sort --eval_only -m checkpoint/sort_last.pt
    python problem.py sort -i -m checkpoint/sort_last.pt     type inputs yourself

Trains a model, then counts the exact matches on 10,000 inputs that training never generates. The last line
on standard output is one JSON object. Model, loop, tokenizer and checkpoints are the same as for language;
the problems themselves are in problems/.
"""

import time

START = time.perf_counter()

import hashlib
import itertools
import os
import random
import re
import sys

import numpy as np

from config import IGNORE_INDEX, ROOT, ModelConfig, TrainConfig, find, from_dict, load_config, shorten_warmup
from flags import Parser, parse_value
from problems.digits import PALINDROME, SORT
from problems.logic import BOOL
from problems.numbers import Q
from script import InputError, before_imports, guarded_output, print_json, run_script

TASKS = {
    "q": Q,
    "sort": SORT,
    "palindrome": PALINDROME,
    "bool": BOOL,
}
TRAIN = dict(device="auto", dtype="float32", optimizer="muon", learning_rate=3e-3, min_lr=0.0,
             lr_schedule="linear", warmup_iters=50, lr_decay_iters=0, max_steps=1000, weight_decay=0.0,
             gradient_accumulation_steps=1, batch_size=100, eval_interval=100, log_interval=10)
TEST_INPUTS = 10_000
UNUSED_FIELDS = ("dataset_path", "backend", "document_mask", "vocab_size")  # they have no meaning here


def command_line():
    """Parse the flags: the common ones and those of the task, which is the first word.

    Raises InputError for settings that cannot work, before torch is imported."""
    cli = Parser(__doc__)
    cli.add_argument("task", choices=TASKS)
    cli.add_argument("--eval_only", action="store_true", help="score the checkpoint -m without training")
    cli.add_argument("-i", "--interactive", action="store_true",
                     help="answer what you type with the checkpoint -m, without training")
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
    cli.add_config(TrainConfig, UNUSED_FIELDS, train_defaults)
    cli.add_config(ModelConfig, UNUSED_FIELDS, task.model)
    args = cli.parse_args()
    args.settings = {name: getattr(args, name) for name in task.settings if getattr(args, name) is not None}
    train_flags = cli.overrides(args, TrainConfig)
    args.train = from_dict(TrainConfig, {**train_defaults, **train_flags}, "command line")
    shorten_warmup(args.train, train_flags)
    args.train.validate("command line")
    args.model_flags = cli.overrides(args, ModelConfig)
    args.root = ROOT
    if args.eval_only or args.interactive:
        args.model = find_model(args)
    elif not args.train.from_checkpoint:
        check_settings(task, args)
    elif args.train.from_checkpoint != "latest" and not os.path.exists(find(args.train.from_checkpoint)):
        raise InputError(f"from_checkpoint {args.train.from_checkpoint}: no such file")
    return args


def find_model(args):
    """The path of the checkpoint to open. Raises InputError if there is none."""
    path = args.model or os.path.join("checkpoint", f"{args.task}_last.pt")
    if not os.path.exists(find(path)):
        raise InputError(f"{path}: no such file; train a model first: python problem.py {args.task}")
    return find(path)


def check_settings(task, args):
    """Raises InputError if the flags leave no inputs for a part of the split, or if no model can be built."""
    settings = {**default_settings(task), **args.settings}
    for split in ("training", "validation", "test"):
        sample_inputs(task, settings, np.random.default_rng(0), 100, split)
    shape = {"block_size": task.block_size(settings), **task.model, **args.model_flags}
    load_config(ModelConfig, None, shape)


def default_settings(task):
    return {name: default for name, (default, _) in task.settings.items()}


def split_of(text):
    """The part of the split that an input belongs to, the same for every seed: 1 input in 10 is for testing,
    1 in 10 for validation."""
    part = hashlib.blake2b(text.encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(part, "training")


def sample_inputs(task, settings, rng, n, split, distinct=False):
    """Up to n inputs of one part of the split, in random order; fewer if `distinct` and there are no more.

    Raises InputError if the settings leave none at all."""
    generate = task.practice if task.practice and split == "training" else task.generate
    texts = []
    fruitless = 0  # attempts in a row that found nothing new
    while len(texts) < n and fruitless < 20:
        found = texts + [text for text in generate(rng, n, settings) if split_of(text) == split]
        if distinct:
            found = list(dict.fromkeys(found))
        fruitless = 0 if len(found) > len(texts) else fruitless + 1
        texts = found
    if not texts:
        chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
        flags = ", ".join(f"--{name}" for name, value in settings.items() if not isinstance(value, bool))
        raise InputError(f"with {chosen} there are no {split} inputs; allow more inputs with {flags}")
    return texts[:n]


if __name__ == "__main__":
    before_imports(command_line)

import torch
from tqdm import tqdm

import checkpoint as ckpt
from device import pick_device, setup_device
from run import build_run
from scoring.answers import complete
from strategy import WIDTHS, SingleProcess
from tokenizer import Tokenizer
from train import fit


class ProblemLoader:
    """Batches of generated inputs, in an order that depends on the seed alone; same interface as
    dataloader.DataLoader.

    Letters: B rows in a batch, T tokens in its longest row."""

    POOL = 20  # batches sampled together and sorted by length, so that there is little padding
    epoch = 0.0  # inputs are generated without end

    def __init__(self, task, settings, tokenizer, is_causal, batch_size, seed, split):
        self.task = task
        self.settings = settings
        self.tokenizer = tokenizer
        self.is_causal = is_causal
        self.batch_size = batch_size
        self.seed = seed
        self.split = split
        self.position = 0  # batches read so far
        self.pool = []
        self.pool_number = -1

    def next_batch(self):
        """Inputs and targets, two int64 arrays (B, T)."""
        number, i = divmod(self.position, self.POOL)
        if number != self.pool_number:
            rng = np.random.default_rng([self.seed, number])
            self.pool = list(self.batches(rng, self.POOL))
            self.pool_number = number
            rng.shuffle(self.pool)
        self.position += 1
        return self.encode(self.pool[i])

    def fixed_batches(self, n):
        """n batches, the same at every call, for validation."""
        return map(self.encode, self.batches(np.random.default_rng(self.seed), n))

    def batches(self, rng, n):
        """n lists of batch_size inputs of similar length."""
        texts = sample_inputs(self.task, self.settings, rng, n * self.batch_size, self.split)
        texts.sort(key=len)
        return (texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size))

    def encode(self, texts):
        """Inputs and targets (B, T) of a list of inputs; IGNORE_INDEX where there is nothing to output."""
        encode = self.tokenizer.encode
        answers = [self.task.answer(text) for text in texts]
        if not self.is_causal:
            x = np.stack([encode(text) for text in texts])
            y = np.stack([encode(answer) for answer in answers])
            return x.astype(np.int64), y.astype(np.int64)
        longest = max(len(text) + len(answer) for text, answer in zip(texts, answers, strict=True)) + 1
        x = np.full((len(texts), longest), self.tokenizer.pad_id, np.int64)
        y = np.full((len(texts), longest), IGNORE_INDEX, np.int64)
        for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            end = len(text) + 1 + len(answer)
            x[row, :end] = encode(f"{text}={answer}")
            y[row, len(text) : end] = [*encode(answer), self.tokenizer.eos_id]
            for position, character in self.task.labels(text, self.settings) if self.task.labels else ():
                y[row, position] = self.tokenizer.stoi[character]
        return x, y

    def state_dict(self):
        return {"rows": self.position * self.batch_size, "settings": self.settings}

    def load_state_dict(self, state):
        self.position = state["rows"] // self.batch_size


@torch.inference_mode()
def solve(model, tokenizer, texts):
    """The model's answers to a list of inputs of one length, a list of strings: with full attention all
    tokens at once, else one after another."""
    if not model.config.is_causal:
        idx = torch.tensor(np.stack([tokenizer.encode(text) for text in texts]).astype(np.int64))
        return [tokenizer.decode(ids) for ids in model(idx.to(model.device))[0].argmax(-1).cpu()]
    prompts = [tokenizer.encode(text + "=") for text in texts]
    return [tokenizer.decode(ids) for ids in complete(model, prompts, model.config.block_size,
                                                      stop_ids=(tokenizer.eos_id,), temperature=0)]


def score(task, model, tokenizer, settings, show=3):
    """Answer unseen inputs, the same for every model, and print `show` right and wrong examples.

    Returns (right answers, inputs)."""
    texts = sample_inputs(task, settings, np.random.default_rng(0), TEST_INPUTS, "test", distinct=True)
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
    right = [row for row in rows if row[1] == task.answer(row[0])]
    wrong = [row for row in rows if row[1] != task.answer(row[0])]
    for text, output in right[:show]:
        print(f"  right: {task.show(text)} → {output}")
    for text, output in wrong[:show]:
        print(f"  wrong: {task.show(text)} → {output}   (expected {task.answer(text)})")
    return len(right), len(rows)


def read_input(task, settings, typed):
    """The input that a person typed; spaces and a final "=" make no difference. Raises InputError."""
    text = re.sub(r"\s", "", typed).removesuffix("=")
    for character in text:
        if character not in task.vocabulary:
            raise InputError(f"{typed}: has {character!r}, but the only characters are "
                             f"{' '.join(task.vocabulary)}")
    if not text:
        raise InputError("the input is empty")
    task.check(text, settings)
    return text


def interact(task, model, tokenizer, settings):
    """Answer line by line until the end of input. Returns 2 if a line was wrong, else 0."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="backslashreplace")  # bytes that are no text are refused by read_input
    status = 0
    while True:
        try:
            typed = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return status
        except OSError as error:
            raise InputError(f"standard input cannot be read ({error.strerror})") from None
        typed = typed.strip("\ufeff \t\r")  # PowerShell's pipes begin with a byte-order mark
        try:
            if typed:
                print(*solve(model, tokenizer, [read_input(task, settings, typed)]), flush=True)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2


def open_checkpoint(args):
    """Model, tokenizer, settings and content of the checkpoint -m; the flags override its settings."""
    path = args.model
    start = ckpt.load(path)
    if start["task"] != args.task:
        raise InputError(f"{path}: is a checkpoint of {start['task']}, not of {args.task}")
    model, tokenizer = ckpt.build_model(start, path)
    settings = {**start["dataloader"]["settings"], **args.settings}
    needed = TASKS[args.task].block_size(settings)
    if needed > model.config.block_size:
        raise InputError(f"{path}: has block_size {model.config.block_size}, but these settings need "
                         f"{needed}; train with --block_size {needed}")
    device = pick_device(args.train.device)
    setup_device(device)
    return model.to(device), tokenizer, settings, start


def train(args):
    """Train as the flags say. Returns model, tokenizer, settings and what fit() returns."""
    task = TASKS[args.task]
    config = args.train
    strategy = SingleProcess()
    strategy.setup(config, WIDTHS)
    tokenizer = Tokenizer.build([task.vocabulary, "="])
    settings = default_settings(task)

    def make_loaders(model_config, start):
        settings.update((start["dataloader"]["settings"] if start else {}) | args.settings)
        return [ProblemLoader(task, settings, tokenizer, model_config.is_causal, config.batch_size,
                              config.random_seed, split) for split in ("training", "validation")]

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
    print_json({"task": args.task, "accuracy": right / n, "right": right, "inputs": n, "steps": steps,
                "parameters": model.n_params(), "seconds": round(time.perf_counter() - START, 1),
                "seed": seed, "settings": settings})


if __name__ == "__main__":
    run_script(main)
