"""Draw the loss curves of one or more training logs, or the statistics per layer of one run.

    python plot_loss.py -n train_20260101_120000.log
    python plot_loss.py -n pretrain.log sft.log -o curves.png
    python plot_loss.py -n train_20260101_120000.log -x tokens
    python plot_loss.py --stats train_20260101_120000_stats.jsonl      of a run with --log_stats

With a display it opens a window and keeps it up to date while training runs; without one, or with -o, it
writes a PNG beside the log. Faint lines are the raw training loss, strong ones its mean over neighbouring
steps, dots the validation.
"""

import collections
import os
import sys

from config import find
from flags import Parser
from script import InputError, atomic_write, before_imports, note, print_json, run_script

REFRESH_SECONDS = 2


def command_line():
    cli = Parser(__doc__)
    what = cli.add_mutually_exclusive_group(required=True)
    what.add_argument("-n", "--name", nargs="+", metavar="LOG", help="training logs")
    what.add_argument("--stats", metavar="FILE", help="draw these statistics per layer")
    cli.add_argument("-o", "--output", metavar="FILE", help="write the picture here, open no window")
    cli.add_argument("-x", "--axis", choices=("step", "tokens", "time"), default="step",
                     help="horizontal axis")
    args = cli.parse_args()
    for path in args.name or [args.stats]:
        if not os.path.isfile(find(path)):
            raise InputError(f"{path}: no such file")
    return args


if __name__ == "__main__":
    before_imports(command_line)

import json

import matplotlib

HAS_DISPLAY = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
if not HAS_DISPLAY:
    matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.ticker import LogLocator

from metrics import log_task, parse_log

AXES = {"step": "steps", "tokens": "tokens", "time": "seconds"}
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei",
             "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC",
             "Heiti SC", "Arial Unicode MS")
QUANTITIES = ("weights", "gradients", "updates", "rms", "entropy", "max_logit", "dead")


def read_logs(paths):
    """Label, training lines and validation lines of each log. Raises InputError naming a bad one."""
    runs = []
    for path in map(find, paths):
        try:
            train, val = parse_log(path)
            label = log_task(path) or os.path.basename(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        if not train and not val:
            raise InputError(f"{path}: holds no training lines")
        runs.append((label, train, val))
    labels = unique_labels(runs, paths)
    return [(label, train, val) for label, (_, train, val) in zip(labels, runs, strict=True)]


def unique_labels(runs, paths):
    """The labels of some runs; where two are the same, the path of the log is added."""
    labels = [label for label, _, _ in runs]
    times = collections.Counter(labels)
    labels = [label if times[label] == 1 else path if label == os.path.basename(path) else f"{label} ({path})"
              for label, path in zip(labels, paths, strict=True)]
    # Matplotlib hides labels that begin with an underscore; bytes that are not UTF-8 it cannot draw.
    return [f" {label}".encode("utf-8", "replace").decode().removeprefix(" " if label[0] != "_" else "")
            for label in labels]


def use_font_for(text):
    """Let matplotlib draw Chinese, Japanese and Korean characters, where `text` has some."""
    if not any("\u2e80" <= character <= "\uffef" for character in text):
        return
    installed = {font.name for font in font_manager.fontManager.ttflist}
    font = next((name for name in CJK_FONTS if name in installed), None)
    if font:
        matplotlib.rcParams["font.family"] = ["DejaVu Sans", font]
    else:
        note("no font with Chinese characters is installed, so labels show boxes; install Noto Sans CJK")


def running_mean(values):
    """The mean of each value and its neighbours, as many on both sides, so that it does not lag.

    values: array (n,). The window grows with the step, up to 51 values. NaN is left out."""
    values = np.asarray(values, float)
    n = len(values)
    smooth = np.full(n, np.nan)
    for i in range(n):
        reach = min(25, 1 + i // 10, i, n - 1 - i)
        window = values[i - reach : i + reach + 1]
        finite = window[np.isfinite(window)]
        if len(finite):
            smooth[i] = finite.mean()
    return smooth


def draw(axes, runs, axis):
    axes.clear()
    for i, (label, train, val) in enumerate(runs):
        color = f"C{i}"
        prefix = f"{label} " if len(runs) > 1 else ""
        train = [line for line in train if axis in line]
        val = [line for line in val if axis in line]
        x = [line[axis] for line in train]
        y = np.array([line["loss"] for line in train])
        axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(x, running_mean(y), color=color, linewidth=1.6, label=f"{prefix}training")
        axes.plot([line[axis] for line in val], [line["val_loss"] for line in val], "o-", color=color,
                  markersize=4, linewidth=1, markeredgecolor="black", label=f"{prefix}validation")
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


def read_stats(path):
    """The records of stats.py, a list of dicts. Raises InputError naming the line."""
    records = []
    try:
        with open(find(path), encoding="utf-8") as f:
            for line in f:
                record = json.loads(line)
                records.append((record["step"], record["layers"]))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}, line {len(records) + 1}: not a record of --log_stats") from None
    if not records:
        raise InputError(f"{path}: holds no records")
    return records


def draw_stats(records):
    """A figure with a panel for each quantity and a line for each layer."""
    figure, panels = plt.subplots(2, 4, figsize=(15, 6.5), layout="constrained")
    steps = [step for step, _ in records]
    n_layer = len(records[0][1])
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, n_layer))
    for axes, name in zip(panels.flat, QUANTITIES, strict=False):
        for layer in range(n_layer):
            values = [layers[layer][name] for _, layers in records]
            if isinstance(values[0], dict):  # one norm for each matrix: their common norm
                values = [np.sqrt(sum(norm**2 for norm in value.values())) for value in values]
            axes.plot(steps, values, color=colors[layer], label=f"layer {layer}")
        axes.set_title({"weights": "norm of weights", "gradients": "norm of gradients",
                        "updates": "norm of updates", "rms": "RMS of the residual stream",
                        "entropy": "attention entropy (nats)", "max_logit": "largest attention logit",
                        "dead": "share of dead MLP units"}[name])
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    panels.flat[-1].axis("off")
    panels.flat[-1].legend(*panels.flat[0].get_legend_handles_labels(), loc="center", ncols=2)
    return figure


def save(figure, output):
    """Write the picture whole or not at all. Raises InputError."""
    kind = os.path.splitext(output)[1].removeprefix(".") or "png"
    try:
        with atomic_write(output) as file:
            figure.savefig(file, dpi=130, format=kind)
    except ValueError as error:  # a format that matplotlib does not know
        raise InputError(f"{output}: cannot be written ({str(error).splitlines()[0]})") from None
    print(f"wrote {output}")


def main():
    args = command_line()
    if args.stats:
        records = read_stats(args.stats)
        output = args.output or os.path.splitext(find(args.stats))[0] + ".png"
        save(draw_stats(records), output)
        print_json({"output": output, "records": len(records), "layers": len(records[0][1])})
        return
    runs = read_logs(args.name)
    use_font_for("".join(label for label, _, _ in runs))
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    draw(axes, runs, args.axis)
    if args.output or matplotlib.get_backend().lower() == "agg":
        output = args.output or os.path.splitext(find(args.name[0]))[0] + ".png"
        save(figure, output)
        finite = {label: [line["val_loss"] for line in val if np.isfinite(line["val_loss"])]
                  for label, _, val in runs}
        print_json({"output": output, "best_val_loss": {label: min(losses, default=None)
                                                        for label, losses in finite.items()}})
        return
    plt.show(block=False)
    while plt.fignum_exists(figure.number):
        plt.pause(REFRESH_SECONDS)
        draw(axes, read_logs(args.name), args.axis)


if __name__ == "__main__":
    run_script(main)
