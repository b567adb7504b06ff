"""Draw the loss curves of one or more training logs.

    python plot_loss.py -n train_20260101_120000.log
    python plot_loss.py -n pretrain.log sft.log -o curves.png
    python plot_loss.py -n train_20260101_120000.log -x tokens

With a display it opens a window and keeps it fresh while training runs; without one, or with -o, it writes a
PNG beside the log. Faint lines are the raw training loss, strong ones its running mean, dots the validation.
"""

import json
import os
import sys

from config import ROOT, InputError, Parser, before_imports, run_script

REFRESH_SECONDS = 2


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("-n", "--name", nargs="+", required=True, metavar="LOG", help="training logs")
    cli.add_argument("-o", "--output", metavar="FILE", help="write the picture here, open no window")
    cli.add_argument("-x", "--axis", choices=("step", "tokens", "time"), default="step",
                     help="horizontal axis")
    return cli.parse_args()


if __name__ == "__main__":
    before_imports(command_line)

import matplotlib

HAS_DISPLAY = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
if not HAS_DISPLAY:
    matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

from metrics import parse_log

AXES = {"step": "steps", "tokens": "tokens", "time": "seconds"}


def read_logs(paths):
    """Label, training lines and validation lines of each log. Raises InputError naming a bad one."""
    runs = []
    for path in paths:
        path = path if os.path.exists(path) else os.path.join(ROOT, path)
        try:
            train, val = parse_log(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        if not train and not val:
            raise InputError(f"{path}: holds no training lines")
        runs.append((os.path.basename(path), train, val))
    return runs


def running_mean(values, weight):
    """Exponential running mean, corrected for its start as Adam does it."""
    mean, norm, smooth = 0.0, 0.0, []
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        smooth.append(mean / norm)
    return smooth


def draw(axes, runs, axis):
    axes.clear()
    for i, (label, train, val) in enumerate(runs):
        color, label = f"C{i}", label if len(runs) > 1 else ""
        train, val = ([line for line in lines if axis in line] for lines in (train, val))
        x, y = [line[axis] for line in train], [line["loss"] for line in train]
        axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(x, running_mean(y, 1 - 2 / (2 + min(25, len(y) / 20))), color=color, linewidth=1.6,
                  label=f"{label} training".strip())
        axes.plot([line[axis] for line in val], [line["val_loss"] for line in val], "o-", color=color,
                  markersize=4, linewidth=1, markeredgecolor="black", label=f"{label} validation".strip())
    values = [line[key] for _, train, val in runs for key, lines in (("loss", train), ("val_loss", val))
              for line in lines if np.isfinite(line[key])]
    if values and max(values) > 5 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def main():
    args = command_line()
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    runs = read_logs(args.name)
    draw(axes, runs, args.axis)
    if args.output or matplotlib.get_backend().lower() == "agg":
        output = args.output or os.path.splitext(args.name[0])[0] + ".png"
        try:
            figure.savefig(output, dpi=130)
        except (OSError, ValueError) as error:
            raise InputError(f"{output}: cannot be written ({error})") from None
        best = {label: min((line["val_loss"] for line in val), default=None) for label, _, val in runs}
        print(f"wrote {output}")
        print(json.dumps({"output": output, "best_val_loss": best}))
        return
    plt.show(block=False)
    while plt.fignum_exists(figure.number):
        plt.pause(REFRESH_SECONDS)
        draw(axes, read_logs(args.name), args.axis)


if __name__ == "__main__":
    run_script(main)
