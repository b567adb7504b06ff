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


class CountedSteps(SingleProcess):
    """A process that prints nothing and calls `after_step()` after each step."""

    def __init__(self, after_step):
        self.after_step = after_step

    def take_step(self, lr, norm):
        norm = super().take_step(lr, norm)
        self.after_step()
        return norm

    def say(self, text):
        pass


def train_run(model_config, config, text, after_step, val_rows=None):
    """Train one model from the start, with nothing on disk, and validate it.

    text: plan.PreparedText. val_rows: validate on so many rows, evenly spaced (default: all of them). Returns
    fit()'s dict and `loss`, `epochs` and `model`."""
    strategy = CountedSteps(after_step)
    strategy.setup(config)
    val_batch_size = max(1, 8192 // model_config.block_size)
    setup = build_run(config, strategy, "pretrain", text.tokenizer, model_config,
                      lambda c, _: text.loaders(c.block_size, config.batch_size, val_batch_size),
                      folder=None, quiet=True)
    result = fit(setup.model, setup.tokenizer, setup.loader, setup.val_loader, config, strategy, setup.run)
    n_batches = -(-(val_rows or len(text.pairs) * text.n_val_rows) // val_batch_size)
    loss = validation_loss(setup.model, setup.val_loader, strategy, config, setup.tokenizer, n_batches)
    micro_batches = result["step"] * config.gradient_accumulation_steps
    return {**result, "loss": loss, "epochs": micro_batches / setup.loader.batches_per_epoch,
            "model": setup.model}


def save_plot(figure, path):
    """Write a matplotlib figure as a PNG, whole or not at all."""
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=110)
