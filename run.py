"""One training run as a value: where it writes, what it starts from, whether it was asked to stop.

    run = Run(folder, task="pretrain")      writes folder/train_<date>_<time>.log and folder/checkpoint/
    run = Run(None)                         a run that keeps nothing on disk
    setup = build_run(config, …)            the same set-up of model, data and run for every caller

`train.fit` takes a run. Only this file builds the names of checkpoints and takes them apart.
"""

import glob
import os
import re
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

import checkpoint as ckpt
from config import ROOT, ModelConfig, find
from metrics import Log, first_line
from model import GPT
from script import InputError, StopRequest

# pretrain_20260101_120000_step_300.pt, pretrain_20260101_120000_best.pt; DeepSpeed's folders have no ".pt".
DATED_NAME = re.compile(
    r"(?P<task>\w+?)_(?P<stamp>\d{4,}(?:_\d{6})?)_(?P<kind>best|last|step_(?P<step>\d+))(?:\.pt)?")


class Run:
    """What a training run knows about itself.

    folder: holds the log and checkpoint/; None keeps nothing on disk. task: "pretrain", "sft", or a problem's
    name. is_main: only the first of several processes writes. quiet: no bar and no messages. tensorboard: a
    folder for TensorBoard's files, or None. As a context manager it opens the log and notes signals.

    start: the checkpoint dict that this run continues exactly, or None. stop: its StopRequest. stamp: its
    "<date>_<time>", None before it is open and on other processes than the first, until `stamp` is set."""

    def __init__(self, folder, task="pretrain", is_main=True, quiet=False, tensorboard=None):
        self.folder = folder
        self.checkpoints = None if folder is None else os.path.join(folder, "checkpoint")
        self.task = task
        self.is_main = is_main
        self.quiet = quiet or not is_main
        self.tensorboard = tensorboard
        self.start = None
        self.stamp = None
        self.log = None
        self.stop = StopRequest()

    @property
    def writes(self):
        """Does this process write files?"""
        return self.folder is not None and self.is_main

    def __enter__(self):
        self.log = Log(self.folder if self.writes else None, self.tensorboard if self.is_main else None)
        self.log.write(first_line(self.task))
        self.stamp = self.log.stamp
        self.stop.__enter__()
        return self

    def __exit__(self, kind, error, traceback):
        self.stop.__exit__(kind, error, traceback)
        self.log.close()
        of_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if of_compiler and self.stop.signum:  # Ctrl-C has reached the processes that compile, too
            reason = next(iter(str(error).splitlines()), "")
            raise InputError(f"interrupted while compiling, before this step was saved: {reason}") from None

    def stats_path(self):
        """The file of the statistics per layer (stats.py), beside the log; None where nothing is written."""
        if not self.writes:
            return None
        return os.path.join(self.folder, self.log.name.removesuffix(".log") + "_stats.jsonl")

    def say(self, text):
        if not self.quiet:
            tqdm.write(text)

    def progress(self, total, initial):
        """A tqdm bar over `total` steps (0: no end is known)."""
        return tqdm(total=total or None, initial=initial, desc=self.task, unit="step", dynamic_ncols=True,
                    disable=self.quiet, mininterval=0.2 if sys.stderr.isatty() else 15)

    def path(self, kind):
        """The dated name of this run's checkpoint of `kind`: "best", "last" or "step_300"."""
        return os.path.join(self.checkpoints, f"{self.task}_{self.stamp}_{kind}.pt")

    def fixed_name(self, kind):
        """The name that always means the newest checkpoint of `kind`; None for those of a step."""
        return None if kind.startswith("step_") else f"{self.task}_{kind}.pt"

    def dated_name_of_best(self):
        """The dated name of the checkpoint that the fixed name of the best one means now, or None."""
        if not self.writes:
            return None
        try:
            _, stamp, _ = ckpt.peek(os.path.join(self.checkpoints, self.fixed_name("best")))
        except InputError:
            return None
        name = f"{self.task}_{stamp}_best.pt"
        return name if os.path.exists(os.path.join(self.checkpoints, name)) else None

    def latest(self):
        """Path and content of the newest valid checkpoint of this task; says which ones were skipped.

        The newest run goes by the date in the name, then the highest step inside. A file with a fixed name
        has its run's date inside; an older one without it comes last."""
        found = []
        for path in glob.glob(os.path.join(glob.escape(self.checkpoints), "*.pt")):
            name = DATED_NAME.fullmatch(os.path.basename(path))
            if name and name["task"] != self.task:
                continue
            try:
                task, stamp, step = ckpt.peek(path)
            except InputError as error:
                self.say(f"skipped: {error}")
                continue
            if task == self.task:
                stamp = name["stamp"] if name else stamp or ""
                found.append((stamp, step, path))
        for _, _, path in sorted(found, reverse=True):
            try:
                return path, ckpt.load(path)
            except InputError as error:
                self.say(f"skipped: {error}")
        raise InputError(f'from_checkpoint "latest": no valid {self.task} checkpoint in {self.checkpoints}')

    def starting_point(self, config, model_flags):
        """The checkpoint dict to start from, or None; sets `start` where training continues it exactly.

        model_flags: ModelConfig fields that were given on the command line. Raises InputError where they, or
        the optimizer's settings, contradict the checkpoint."""
        path = config.from_checkpoint
        if not path:
            return None
        if path == "latest":
            path, checkpoint = self.latest()
        else:
            path = find(path)
            checkpoint = ckpt.load(path)
        for name, value in model_flags.items():
            there = checkpoint["model_config"].get(name, value)
            if name != "dropout" and there != value:
                raise InputError(f"--{name} {value}: {path} has {there}, and a model's shape cannot change")
        if checkpoint["task"] == self.task:
            check_optimizer_settings(config, checkpoint["train_config"], path)
            self.start = checkpoint
        self.say(f"{'continuing' if self.start else 'weights from'} {path} (step {checkpoint['step']})")
        return checkpoint


def check_optimizer_settings(config, before, path):
    """Raise InputError where the optimizer's state in a checkpoint is not of the kind that is asked for."""
    for name, default in (("optimizer", config.optimizer), ("embedding_lr", 1.0)):
        now = getattr(config, name)
        then = before.get(name, default)
        if now != then:
            raise InputError(f"{name} {now}: {path} was trained with {then}, and holds the optimizer's "
                             f"state; set --{name} {then}")


@dataclass
class Setup:
    """What `train.fit` needs: the model on the strategy's device, the data, the run."""

    model: GPT
    tokenizer: Any
    loader: Any
    val_loader: Any
    run: Run


def build_run(config, strategy, task, tokenizer, model_config: ModelConfig, make_loaders, folder=ROOT,
              model_flags=None, quiet=False, tensorboard=None):
    """Set up a run the same way for every caller. Returns a Setup.

    strategy: is set up already. model_config: the shape of a new model; vocabulary and dropout are filled in.
    make_loaders(model_config, start): training and validation loader; start is the checkpoint that is
    continued exactly, or None. folder: see Run. model_flags: see Run.starting_point."""
    run = Run(folder, task, strategy.is_main, quiet, tensorboard)
    checkpoint = run.starting_point(config, model_flags or {})
    torch.manual_seed(config.random_seed)
    if checkpoint:
        model, own_tokenizer = ckpt.build_model(checkpoint, config.from_checkpoint, dropout=config.dropout)
        if own_tokenizer.to_dict() != tokenizer.to_dict():
            raise InputError(
                f"the data were prepared with another vocabulary than {config.from_checkpoint}; run python "
                f"checkpoint.py {config.from_checkpoint} tokenizer.json, then data.py --tokenizer that file")
    else:
        model = GPT(replace(model_config, vocab_size=tokenizer.vocab_size, dropout=config.dropout))
    model.to(strategy.device)
    loader, val_loader = make_loaders(model.config, run.start)
    if run.writes:
        ckpt.prepare_folder(run.checkpoints)
    return Setup(model, tokenizer, loader, val_loader, run)
