"""Training dynamics: one question a study, answered by a grid of short runs with three seeds.

    python -m studies.dynamics lr            range test, and the best learning rate against width
    python -m studies.dynamics batch         tokens and steps to a loss against the batch: the critical batch
    python -m studies.dynamics warmup        steps of warm-up, at a usual and at a high learning rate
    python -m studies.dynamics decay         weight decay and the schedule of the learning rate
    python -m studies.dynamics regularise    dropout, weight decay and averaged weights against passes
    python -m studies.dynamics depth         depth against width at equal compute
    python -m studies.dynamics positions     RoPE, learned positions, none, by length of the context
    python -m studies.dynamics attention     key/value heads and query/key norm: loss, entropy, logits
    python -m studies.dynamics optimizer     AdamW and Muon, each at its best learning rate

Each takes at most 20 minutes on two CPU cores, on the text that data.py prepared. A run that is done is a
line in dynamics_NAME.jsonl; started again, the script trains what is missing. Prints a table, writes a plot,
dynamics_NAME.png, and ends with one JSON object on standard output. docs/dynamics.md has the findings.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from config import ROOT, ModelConfig, TrainConfig, load_config
from flags import Parser, check_files
from script import InputError, before_imports, print_json, run_script

NAMES = ("lr", "batch", "warmup", "decay", "regularise", "depth", "positions", "attention", "optimizer")
SEEDS = (1, 2, 3)
TOKENS = 512_000  # in a run, where the study does not say otherwise
MODEL = dict(n_layer=2, n_head=2, n_embd=64, block_size=128, n_kv_head=0, activation="relu2", qk_norm=True,
             use_rope=True, n_prev=0, bias=False, dropout=0.0)
TRAIN = dict(batch_size=8, gradient_accumulation_steps=1, warmup_iters=10, min_lr=0.0, lr_decay_iters=0,
             optimizer="muon", lr_schedule="linear", decay_lr=True, weight_decay=0.1, dropout=0.0,
             embedding_lr=1.0, max_minutes=0.0, max_steps=1, save_interval=1_000_000, from_checkpoint="")
RUN_KEYS = {"series", "x", "seed", "loss", "curve", "settings"}
CURVE_TOKENS = 8192  # a point of a run's curve is the mean training loss over so many tokens


def command_line(argv=None, root=ROOT):
    cli = Parser(__doc__)
    cli.add_argument("name", choices=NAMES)
    cli.add_argument("--out", default="dynamics", metavar="NAME", help="write NAME_STUDY.jsonl and .png")
    cli.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens in a usual run (default {TOKENS})")
    cli.add_config(TrainConfig, [f for f in TrainConfig.__dataclass_fields__
                                 if f not in ("device", "dtype", "dataset_path")])
    args = cli.parse_args(argv)
    args.root = root
    path = os.path.join(root, "config_pretrain.json")
    overrides = {**TRAIN, "warmup_iters": 0, **cli.overrides(args, TrainConfig)}
    args.train = load_config(TrainConfig, path, overrides)
    args.model = ModelConfig(**MODEL).validate()
    check_files(args.train, path, root)
    least = 40 * args.model.block_size * args.train.batch_size
    if args.tokens < least:
        raise InputError(f"--tokens {args.tokens}: must be at least {least}, which is 40 steps")
    return args


if __name__ == "__main__":
    before_imports(command_line)

import numpy as np
import torch

from corpus.fingerprint import write_fingerprint
from plan import PreparedText
from scaling_law import learning_rate_at
from stats import activations
from strategy import SingleProcess
from studies.grid import append_run, progress, read_runs, save_plot, train_run


@dataclass
class Point:
    """One setting of a study, trained once a seed."""

    series: str  # the line of the plot that it belongs to
    x: float | str  # where on the line
    model: dict = field(default_factory=dict)  # overrides MODEL
    train: dict = field(default_factory=dict)  # overrides TRAIN
    tokens: float = 1.0  # in a run, as a multiple of --tokens
    is_range_test: bool = False  # the learning rate rises through four decades, from x / 100 to 100 x
    has_positions: bool = True  # False: learned positions that stay 0
    unique: int | None = None  # train on the first so many tokens of the text only


@dataclass
class Study:
    """A question, its points and how to read the answer."""

    question: str
    x_label: str
    points: list
    is_log: bool = True  # the axis of x
    measures: tuple = ("loss",)  # what is tabulated
    conclude: Callable | None = None  # (runs, finding) adds to the finding of `best_of_each_series`


def as_text(x):
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def study_lr():
    points = []
    for width in (32, 64, 128):
        shape = {"n_embd": width, "n_head": max(1, width // 32)}
        for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4):
            rate = learning_rate_at(width) * factor
            points.append(Point(f"{width} wide", rate, shape, {"learning_rate": rate}))
        points.append(Point(f"range test, {width} wide", learning_rate_at(width), shape, is_range_test=True,
                            tokens=0.5))
    return Study("Which learning rate is best, and how does it change with the width?", "learning rate",
                 points, conclude=rates_of_the_range_tests)


def study_batch():
    points = []
    for rows in (2, 4, 8, 16, 32, 64):
        rate = learning_rate_at(64) * (rows / 8) ** 0.5  # Malladi et al. 2022, for Adam
        points.append(Point("square-root rule", 128 * rows, train={
            "batch_size": rows, "learning_rate": rate, "decay_lr": False}, tokens=2))
    return Study("How many tokens and steps does a loss take, by batch size?", "tokens in a step", points,
                 conclude=critical_batch)


def study_warmup():
    points = [Point(f"{factor} x the rule's rate", steps, train={
        "warmup_iters": steps, "learning_rate": learning_rate_at(64) * factor})
        for factor in (1, 4) for steps in (0, 10, 50, 150)]
    return Study("What does a warm-up save?", "steps of warm-up", points, is_log=False)


def study_decay():
    schedules = {"constant": {"decay_lr": False}, "linear to 0": {},
                 "cosine to 0": {"lr_schedule": "cosine"},
                 "linear to a tenth": {"min_lr": learning_rate_at(64) / 10}}
    points = [Point(name, decay, train={**schedule, "weight_decay": decay})
              for name, schedule in schedules.items() for decay in (0.0, 0.1, 0.5)]
    return Study("Which schedule, and how much weight decay?", "weight decay", points, is_log=False)


def study_regularise():
    points = [Point(f"dropout {dropout}, decay {decay}", passes, {"n_layer": 3, "n_embd": 96, "n_head": 3}, {
        "dropout": dropout, "weight_decay": decay, "learning_rate": learning_rate_at(96)},
        tokens=passes / 8, unique=TOKENS // 8)
        for dropout in (0.0, 0.2) for decay in (0.1, 1.0) for passes in (2, 8, 16)]
    return Study("What helps when a small text is read many times?", "passes over the text", points,
                 measures=("loss", "loss_of_averaged_weights", "best_loss_on_the_way"))


def study_depth():
    shapes = {1: (128, 4), 2: (88, 2), 4: (64, 2), 8: (44, 2)}  # 12 layers width² is nearly the same
    points = [Point("about 190,000 parameters in blocks", layers,
                    {"n_layer": layers, "n_embd": width, "n_head": heads},
                    {"learning_rate": learning_rate_at(width)})
              for layers, (width, heads) in shapes.items()]
    return Study("Deep or wide, at equal compute?", "layers", points)


def study_positions():
    ways = {"RoPE": {}, "learned": {"use_rope": False}, "none": {"use_rope": False}}
    points = [Point(name, length, {**way, "block_size": length}, {"batch_size": 1024 // length},
                    has_positions=name != "none")
              for name, way in ways.items() for length in (32, 128, 512)]
    return Study("What do positions bring, by length of the context?", "block_size", points)


def study_attention():
    points = [Point(f"query/key norm {'on' if norm else 'off'}", f"{kv} of 4 kv heads",
                    {"n_head": 4, "n_kv_head": kv, "qk_norm": norm},
                    {"learning_rate": learning_rate_at(64) * factor})
              for norm, factor in ((True, 1), (False, 1)) for kv in (4, 2, 1)]
    return Study("What do shared key/value heads cost, and what does the norm do?", "key/value heads", points,
                 is_log=False, measures=("loss", "entropy", "max_logit"))


def study_optimizer():
    points = [Point(name, rate, train={"optimizer": name, "learning_rate": rate})
              for name in ("adamw", "muon") for rate in (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)]
    return Study("AdamW or Muon, each at its best rate?", "learning rate", points)


def run_point(point, seed, args, text, after_step):
    """Train a point with one seed. Returns the run, a dict for the .jsonl file, and the number of the signal
    that ended it, or 0."""
    model, config = configs(point, seed, args)
    steps = config.max_steps
    average = {}

    def observe(trained):
        after_step()
        with torch.no_grad():
            for name, p in trained.named_parameters():
                if name in average:
                    average[name].lerp_(p, 0.02)  # over the last 50 steps or so (EMA)
                else:
                    average[name] = p.detach().clone()

    def rising(step):
        return point.x * 10 ** (4 * step / steps - 2)

    result = train_run(model, config, text, observe, rising if point.is_range_test else None,
                       None if point.has_positions else remove_positions)
    losses = np.array(result["losses"])
    in_a_step = config.batch_size * model.block_size
    per_point = max(1, CURVE_TOKENS // in_a_step)
    curve = [float(losses[i : i + per_point].mean()) for i in range(0, len(losses), per_point)]
    trained = result["model"]
    run = {"series": point.series, "x": point.x, "seed": seed, "loss": result["loss"], "curve": curve,
           "tokens": result["tokens"], "tokens_per_point": per_point * in_a_step,
           "best_loss_on_the_way": min(result["best_val_loss"], result["val_loss"]),
           "seconds": result["seconds"], "settings": settings(point, seed, args, text)}
    if point.is_range_test:
        smooth = np.convolve(losses, np.ones(20) / 20, "valid")
        run["rate_of_lowest_loss"] = rising(int(np.nanargmin(smooth)) + 19)
    else:
        run |= attention_of(trained, text, model)
        trained.load_state_dict({**trained.state_dict(), **average})
        run["loss_of_averaged_weights"] = result["validate"]()
    return run, result["signal"]


def configs(point, seed, args):
    """ModelConfig and TrainConfig of a point."""
    model = replace(args.model, **point.model).validate()
    values = {"learning_rate": learning_rate_at(model.n_embd), "warmup_iters": TRAIN["warmup_iters"],
              **point.train}
    config = replace(args.train, **values, random_seed=seed)
    steps = round(args.tokens * point.tokens / (config.batch_size * model.block_size))
    config = replace(config, max_steps=steps, warmup_iters=min(config.warmup_iters, steps // 4),
                     eval_interval=max(1, steps // 10), eval_iters=2)
    return model, config.validate()


def settings(point, seed, args, text):
    """What must be the same for a run to count as done."""
    model, config = configs(point, seed, args)
    values = {**asdict(model), **asdict(config), "training_tokens": text.n_tokens,
              "range_test": point.is_range_test, "has_positions": point.has_positions}
    return {name: value for name, value in values.items() if name not in ("dataset_path", "device", "dtype")}


def remove_positions(model):
    """Make learned positions 0, and keep them there."""
    table = model.transformer["wpe"].weight
    torch.nn.init.zeros_(table)
    table.requires_grad_(False)


def attention_of(model, text, model_config):
    """Mean entropy of attention in nats and its largest logit, over the layers, on validation text."""
    x, _ = next(iter(text.loaders(model_config.block_size, 1, 4)[1].fixed_batches(1)))
    layers = activations(model, torch.from_numpy(np.ascontiguousarray(x)).to(model.device))
    return {"entropy": statistics.mean(layer["entropy"] for layer in layers),
            "max_logit": max(layer["max_logit"] for layer in layers)}


def train_study(study, args, path, folder):
    """Train what `path` lacks and append it there. Returns the study's runs, a list of dicts, and the number
    of the signal that ended the work, or 0."""
    whole = PreparedText(args.train, args.root, args.model.block_size)
    texts = {None: whole}
    for unique in {point.unique for point in study.points} - {None}:
        texts[unique] = shortened(whole, unique, args, folder)
    found = read_runs(path, RUN_KEYS)
    runs = []
    todo = []
    for point in study.points:
        for seed in SEEDS:
            wanted = settings(point, seed, args, texts[point.unique])
            done = [run for run in found if (run["series"], run["x"]) == (point.series, point.x)
                    and run["settings"] == wanted]
            runs += done[:1]
            if not done:
                todo.append((point, seed))
    if todo:
        append_run(path, None)  # can it be written? better known before the work
        SingleProcess().setup(args.train)  # says what the device lacks, once; the runs are silent
    with progress(sum(configs(*item, args)[1].max_steps for item in todo), "step") as bar:
        for point, seed in todo:
            bar.set_description(f"{point.series}, {as_text(point.x)}")
            run, signalled = run_point(point, seed, args, texts[point.unique], bar.update)
            if signalled:
                return runs, signalled
            append_run(path, run)
            runs.append(run)
    return runs, 0


def shortened(text, n_tokens, args, folder):
    """A PreparedText of the first `n_tokens` tokens of `text`'s first file, written to `folder`."""
    path = os.path.join(folder, f"train_{n_tokens}.npy")
    np.save(path, text.loaders(args.model.block_size, 1)[0].sources[0].tokens[:n_tokens])
    text.tokenizer.save(os.path.join(folder, "tokenizer.json"))
    write_fingerprint(path, text.tokenizer)
    return PreparedText(replace(args.train, dataset_path=[[path, text.pairs[0][1]]]), args.root,
                        args.model.block_size)


def summary(runs, study):
    """[(series, x, {measure: values of the seeds})] in the order of the study."""
    rows = []
    for point in study.points:
        own = [run for run in runs if (run["series"], run["x"]) == (point.series, point.x)]
        if own and not point.is_range_test:
            rows.append((point.series, point.x, {m: [run[m] for run in own] for m in study.measures}))
    return rows


def best_of_each_series(rows):
    """{series: the x of the lowest mean loss, that loss, and the spread over the seeds}."""
    best = {}
    for series, x, values in rows:
        mean = statistics.mean(values["loss"])
        if series not in best or mean < best[series]["loss"]:
            best[series] = {"x": x, "loss": mean, "spread": max(values["loss"]) - min(values["loss"])}
    return best


def rates_of_the_range_tests(runs, finding):
    for run in runs:
        if "rate_of_lowest_loss" in run:
            finding.setdefault(run["series"], []).append(run["rate_of_lowest_loss"])


def critical_batch(runs, finding):
    """Tokens to the loss that every run reaches, by batch, and the critical batch B* of the line
    tokens = least tokens (1 + B / B*), McCandlish et al. 2018, equation 2.11."""
    goal = max(min(run["curve"]) for run in runs)
    tokens = {}
    for run in runs:
        reached = next(i for i, loss in enumerate(run["curve"]) if loss <= goal)
        tokens.setdefault(run["x"], []).append((reached + 1) * run["tokens_per_point"])
    means = {batch: statistics.mean(values) for batch, values in tokens.items()}
    slope, least = np.polyfit(list(means), list(means.values()), 1)
    finding |= {"goal": goal, "tokens_to_goal": means,
                "steps_to_goal": {batch: n / batch for batch, n in means.items()},
                "critical_batch": float(least / slope) if slope > 0 else None}


def plot(rows, study, path):
    """A line a series: the mean loss over the seeds, and their range as a bar."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for series in dict.fromkeys(row[0] for row in rows):
        points = [(x, values["loss"]) for name, x, values in rows if name == series]
        means = np.array([statistics.mean(losses) for _, losses in points])
        lowest = np.array([min(losses) for _, losses in points])
        highest = np.array([max(losses) for _, losses in points])
        axis.errorbar([x for x, _ in points], means, [means - lowest, highest - means], fmt="o-", capsize=3,
                      label=series)
    if study.is_log:
        axis.set_xscale("log")
        places = sorted({x for _, x, _ in rows})
        if len(places) <= 8:  # name the settings; of more, powers of ten are enough
            axis.set_xticks(places, map(as_text, places))
            axis.minorticks_off()
    axis.set(title=study.question, xlabel=study.x_label, ylabel=f"validation loss, {len(SEEDS)} seeds")
    axis.grid(alpha=0.3)
    axis.legend()
    save_plot(figure, path)
    plt.close(figure)


STUDIES = {"lr": study_lr, "batch": study_batch, "warmup": study_warmup, "decay": study_decay,
           "regularise": study_regularise, "depth": study_depth, "positions": study_positions,
           "attention": study_attention, "optimizer": study_optimizer}


def main(args):
    study = STUDIES[args.name]()
    out = f"{args.out}_{args.name}"
    with tempfile.TemporaryDirectory() as folder:
        runs, signalled = train_study(study, args, f"{out}.jsonl", folder)
    if signalled:
        return 128 + signalled
    rows = summary(runs, study)
    print(study.question)
    print(f"{'':36}{study.x_label:>20}" + "".join(f"{m.replace('_', ' '):>28}" for m in study.measures))
    for series, x, values in rows:
        cells = [f"{statistics.mean(v):16.4f} ± {(max(v) - min(v)) / 2:<9.4f}" for v in values.values()]
        print(f"{series:36}{as_text(x):>20}" + "".join(cells))
    finding = best_of_each_series(rows)
    if study.conclude:
        study.conclude(runs, finding)
    plot(rows, study, f"{out}.png")
    print(f"{out}.png")
    print_json({"study": args.name, "runs": len(runs), "seconds": sum(run["seconds"] for run in runs),
                "finding": finding,
                "rows": [{"series": series, "x": x, **values} for series, x, values in rows]})


if __name__ == "__main__":
    run_script(lambda: main(command_line()))
