"""Grids of short training runs, for the studies. A run that is done is a line of a .jsonl file, so that a
study which is started again trains only what is missing."""

import json
import sys

from tqdm import tqdm

from run import build_run
from script import InputError, atomic_write
from strategy import SingleProcess
from train import fit, validation_loss


def read_runs(path, keys):
    """The runs in a .jsonl file, a list of dicts (empty if there is no file).

    Raises InputError naming the line that is not a JSON object with all `keys`."""
    runs = []
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                run = json.loads(line)
                if not keys <= run.keys():
                    raise ValueError
                runs.append(run)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError):
        raise InputError(f"{path}, line {len(runs) + 1}: not a run of this study; delete that line") from None
    return runs


def append_run(path, run):
    """Append a run to a .jsonl file; None only finds out whether it can be written. Raises InputError."""
    try:
        with open(path, "a", encoding="utf-8") as f:
            if run is not None:
                f.write(json.dumps(run) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def progress(total, unit="FLOP"):
    """A tqdm bar over all runs of a study; invisible if there is nothing to do."""
    return tqdm(total=total, unit=unit, unit_scale=True, dynamic_ncols=True, disable=not total,
                mininterval=0.2 if sys.stderr.isatty() else 15)


class ObservedProcess(SingleProcess):
    """A process that prints nothing, keeps the loss of every step, and calls `after_step(model)` after it.

    rate: a function of the step that replaces the schedule of the learning rate; None: the schedule stays."""

    def __init__(self, after_step, rate=None):
        self.after_step = after_step
        self.rate = rate
        self.losses = []

    def read(self, loss, norm):
        loss, norm = super().read(loss, norm)
        self.losses.append(loss)
        return loss, norm

    def optimizer_step(self, lr, norm):
        if self.rate:
            lr = self.rate(len(self.losses) - 1)
        norm = super().optimizer_step(lr, norm)
        self.after_step(self.model)
        return norm

    def say(self, text):
        pass


def train_run(model_config, config, text, after_step, rate=None, prepare=None):
    """Train one model from the start, with nothing on disk, and validate it on every row.

    text: plan.PreparedText. after_step, rate: see ObservedProcess. prepare(model): called before training.
    Returns fit()'s dict and `loss`, `losses` (of each step), `epochs`, `model`, and `validate`, a function
    that gives the loss of the model's present weights."""
    strategy = ObservedProcess(after_step, rate)
    strategy.setup(config)
    val_batch_size = max(1, 8192 // model_config.block_size)
    setup = build_run(config, strategy, "pretrain", text.tokenizer, model_config,
                      lambda c, _: text.loaders(c.block_size, config.batch_size, val_batch_size),
                      folder=None, quiet=True)
    if prepare:
        prepare(setup.model)
    result = fit(setup.model, setup.tokenizer, setup.loader, setup.val_loader, config, strategy, setup.run)
    n_batches = sum(-(-source.n_rows // val_batch_size) for source in setup.val_loader.sources)

    def validate():
        return validation_loss(setup.model, setup.val_loader, strategy, config, setup.tokenizer,
                               n_batches * len(text.pairs))  # the shortest file gets its share of them

    micro_batches = result["step"] * config.gradient_accumulation_steps
    return {**result, "loss": validate(), "losses": strategy.losses, "model": setup.model,
            "epochs": micro_batches / setup.loader.batches_per_epoch, "validate": validate}


def save_plot(figure, path):
    """Write a matplotlib figure as a PNG, whole or not at all."""
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=110)
