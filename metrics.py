"""The training log: one line a step, fields separated by " | ". This file both writes and parses it.

    Task: pretrain | Date: 2026-11-26 17:00:00
    Epoch: 0.12 | Step: 10 | Loss: 2.345 | LR: 0.0006 | 85.1 ms/step | 48129 tokens/s | 101.2 GFLOP/s | …
    Step: 100 | Val_loss: 2.1 | Best_val_loss: 2.1 | …
"""

import contextlib
import os
import time

from script import InputError, note


def first_line(task):
    return f"Task: {task} | Date: {time.strftime('%Y-%m-%d %H:%M:%S')}"


def train_line(epoch, step, loss, lr, seconds, tokens_per_second, flops_per_second, tokens, elapsed, norm):
    """A training line.

    loss: mean over the steps since the last line. seconds: of one step. tokens: read so far. elapsed: seconds
    since the start. norm: of the last step's gradient, before it was clipped."""
    return (f"Epoch: {epoch:.3f} | Step: {step} | Loss: {loss:.6f} | LR: {lr:.4e}"
            f" | {seconds * 1e3:.1f} ms/step | {tokens_per_second:.0f} tokens/s"
            f" | {flops_per_second / 1e9:.1f} GFLOP/s | Tokens: {tokens} | Time: {elapsed:.1f} s"
            f" | Norm: {norm:.4g}")


def val_line(step, val_loss, best_val_loss, tokens, elapsed):
    """A validation line; tokens and elapsed as in `train_line`."""
    return (f"Step: {step} | Val_loss: {val_loss:.6f} | Best_val_loss: {best_val_loss:.6f}"
            f" | Tokens: {tokens} | Time: {elapsed:.1f} s")


class Log:
    """A new file `train_<date>_<time>.log` in `folder` (None: no file); each line reaches the system at once.
    tensorboard: None, or a folder for the same curves in TensorBoard's format.

    `stamp` is "<date>_<time>", which no other run in the folder has. A log that can no longer be written (a
    full disk) is given up with one line, and training goes on. Raises InputError if it cannot be created."""

    SCALARS = {"loss": "loss", "learning_rate": "lr", "gradient_norm": "norm",
               "tokens_per_second": "tokens_per_second", "validation_loss": "val_loss"}  # in TensorBoard

    def __init__(self, folder, tensorboard=None):
        self.file = None
        self.name = None
        self.stamp = None
        self.writer = open_tensorboard(tensorboard) if tensorboard else None
        while folder is not None and self.file is None:
            self.stamp = time.strftime("%Y%m%d_%H%M%S")
            self.name = f"train_{self.stamp}.log"
            try:
                self.file = open(os.path.join(folder, self.name), "x", encoding="utf-8", buffering=1)
            except FileExistsError:  # two runs in one second: the later one waits for the next
                time.sleep(0.2)
            except OSError as error:
                raise InputError(f"{folder}: cannot write the training log ({error.strerror})") from None

    def training(self, **values):
        """Log a step; values: the arguments of `train_line`."""
        self.write(train_line(**values))
        self.draw(values)

    def validation(self, **values):
        """Log a validation; values: the arguments of `val_line`."""
        self.write(val_line(**values))
        self.draw(values)

    def draw(self, values):
        """Add a point to each of TensorBoard's curves that `values` has."""
        for name, key in self.SCALARS.items() if self.writer else ():
            if key in values:
                self.writer.add_scalar(name, values[key], values["step"])

    def write(self, line):
        if self.file is None:
            return
        try:
            self.file.write(line + "\n")
        except OSError as error:
            note(f"{self.name}: cannot be written ({error.strerror}); training goes on without a log")
            self.close_file()

    def close(self):
        self.close_file()
        if self.writer:
            self.writer.close()

    def close_file(self):
        if self.file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been reported
                self.file.close()
            self.file = None


def open_tensorboard(folder):
    """A SummaryWriter. Raises InputError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(folder)


class Speed:
    """How fast training is from one log line to the next, without pauses such as validation."""

    def __init__(self):
        self.since = time.perf_counter()
        self.steps = 0
        self.tokens = 0
        self.seconds_per_step = 0.0
        self.shortest_step = 0.0  # of the last two readings: a first step may take long, to compile
        self.tokens_per_second = 0.0

    def exclude(self, seconds):
        """Leave out a pause that has just ended."""
        self.since += seconds

    def count(self, tokens):
        """Count a step."""
        self.steps += 1
        self.tokens += tokens

    def read(self):
        """Set the rates of the steps since the last reading."""
        seconds = time.perf_counter() - self.since
        self.shortest_step = min(self.seconds_per_step, seconds / self.steps)
        self.seconds_per_step = seconds / self.steps
        self.tokens_per_second = self.tokens / seconds
        self.since += seconds
        self.steps = 0
        self.tokens = 0


def parse_line(line):
    """The fields of one line as a dict of numbers, keys in lower case; None for any other line."""
    fields = {}
    for part in line.rstrip("\n").split(" | "):
        name, colon, value = part.partition(": ")
        if not colon:
            value, _, name = part.partition(" ")
        try:
            fields[name.strip().lower()] = float(value.split(" ")[0])
        except (ValueError, IndexError):
            return None
    return fields if "step" in fields and ("loss" in fields or "val_loss" in fields) else None


def parse_log(path):
    """Read a log: two lists of dicts, training lines and validation lines. Other lines are skipped."""
    train = []
    val = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            fields = parse_line(line)
            if fields and line.endswith("\n"):  # a line without its end is still being written
                (val if "val_loss" in fields else train).append(fields)
    return train, val


def log_task(path):
    """The task that the first line of a log names, or None (older logs have no such line)."""
    with open(path, encoding="utf-8", errors="replace") as f:
        name, _, task = f.readline().split(" | ")[0].strip().partition(": ")
    return task if name == "Task" and task else None
