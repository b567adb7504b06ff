"""Scaling laws: how the loss falls with parameters and tokens, on the text that data.py prepared.

    python -m studies.scaling                            train a grid of models, fit the law, plot it
    python -m studies.scaling --shapes 1x64 2x128 3x192 --tokens 250000 500000 1000000
    python -m studies.scaling --learning_rate 2e-3       any setting, over the JSON files

Each shape (layers x width) is trained on each number of tokens, every time from the start and with a decay of
its own, as Hoffmann et al. 2022 do. --learning_rate is that of a model as wide as model_config.json says; the
others follow plan.py's rule, and their heads have about the same size. A run that is done is a line in
scaling.jsonl; started again, the script trains what is missing. To all runs it fits
loss = E + A / N^alpha + B / D^beta, writes the law to scaling.json (where plan.py finds it), and prints which
model, on how many tokens, is best for an hour of this machine. N counts the parameters that every token is
multiplied with, D the tokens read; tokens that are read again, and parameters above one for each token of the
text, count less (Muennighoff et al. 2023). The last line on standard output is one JSON object.
"""

import json
import math
import os
import re
import statistics
from dataclasses import asdict, replace

from config import ROOT, ModelConfig, TrainConfig, load_config
from flags import Parser
from script import InputError, atomic_write, before_imports, print_json, run_script

# Over config_pretrain.json: small steps, so that the shortest run has enough of them.
STUDY = dict(batch_size=4, gradient_accumulation_steps=1, warmup_iters=10, min_lr=0.0, lr_decay_iters=0,
             embedding_lr=1.0, max_steps=1000000, max_minutes=0.0, save_interval=1000000, eval_iters=1,
             from_checkpoint="")
# Fields that the study sets itself, or that mean nothing to it.
UNUSED_FIELDS = ("n_layer", "n_embd", "n_head", "vocab_size", "weight_decay", "max_steps", "eval_interval",
                 "eval_iters", "lr_decay_iters", "max_minutes", "save_interval", "log_interval",
                 "from_checkpoint", "backend", "timeout_minutes")
# Runs with other values of these still belong to one study.
MAY_CHANGE = {"device", "dtype", "sdp_kernel", "compile", *UNUSED_FIELDS} - {"n_embd", "n_head"}
RUN_KEYS = {"shape", "steps", "n", "tokens", "epochs", "loss", "seconds", "settings"}
BUDGETS = {"1 minute": 60, "10 minutes": 600, "1 hour": 3600, "10 hours": 36000}


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("--shapes", nargs="+", metavar="LxW", help="layers x width of the models",
                     default=["1x32", "1x64", "2x96", "3x128", "4x192"])
    cli.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(17, 22)], metavar="N",
                     help="how many tokens the runs read (default 131072 to 2097152)")
    cli.add_argument("--out", default="scaling", metavar="NAME", help="write NAME.jsonl, .json, .png")
    cli.add_argument("--model_config", default=os.path.join(ROOT, "model_config.json"), metavar="FILE")
    cli.add_argument("--train_config", default=os.path.join(ROOT, "config_pretrain.json"), metavar="FILE")
    cli.add_config(TrainConfig, UNUSED_FIELDS, STUDY)
    cli.add_config(ModelConfig, UNUSED_FIELDS)
    args = cli.parse_args()
    train = load_config(TrainConfig, args.train_config, {**STUDY, **cli.overrides(args, TrainConfig)})
    model = load_config(ModelConfig, args.model_config, cli.overrides(args, ModelConfig))
    if not train.dataset_path:
        raise InputError(f'{args.train_config}: dataset_path is not set; give [["train.npy", "val.npy"]]')
    model.dropout = train.dropout
    args.train = train
    args.model = model
    args.shapes = [parse_shape(name) for name in dict.fromkeys(args.shapes)]
    for layers, width in args.shapes:
        heads = max(1, width * model.n_head // model.n_embd)
        replace(model, n_layer=layers, n_embd=width, n_head=heads).validate(f"--shapes {layers}x{width}")
    for tokens in args.tokens:
        rows, steps = split_tokens(tokens, train, model.block_size)
        in_a_step = rows * train.gradient_accumulation_steps * model.block_size
        replace(train, max_steps=steps).validate(f"--tokens, {steps} steps of {in_a_step}")
    return args


def split_tokens(tokens, config, block_size):
    """Rows in a pass and number of steps of a run of about `tokens`.

    A step has batch_size rows, doubled until there are fewer than 4,000 steps: plan.step_tokens begins at a
    fixed size instead, and needs torch, which the command line must not wait for."""
    in_a_row = config.gradient_accumulation_steps * block_size
    steps = tokens / (config.batch_size * in_a_row)
    rows = config.batch_size * 2 ** int(math.log2(max(1, steps / 2000)))
    return rows, max(1, round(tokens / (rows * in_a_row)))


def parse_shape(text):
    """(layers, width) of a shape such as 2x96."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise InputError(f"--shapes {text}: must be layers x width, such as 2x96")
    layers, width = map(int, text.split("x"))
    return layers, width


if __name__ == "__main__":
    before_imports(command_line)

import numpy as np

from plan import PreparedText, on_meta, with_shape
from scaling_law import effective, learning_rate_at, predict, weight_decay_for
from strategy import SingleProcess
from studies.grid import append_run, progress, read_runs, save_plot, train_run


def make_grid(args, text):
    """The runs of the study: (name of the shape, ModelConfig, TrainConfig, tokens), no two alike."""
    grid = []
    for layers, width in args.shapes:
        model = with_shape(replace(args.model, vocab_size=text.tokenizer.vocab_size), layers, width)
        n = on_meta(model).n_matmul_params()
        learning_rate = learning_rate_at(width, args.train.learning_rate, args.model.n_embd)
        for rows, steps in dict.fromkeys(split_tokens(tokens, args.train, model.block_size)
                                         for tokens in args.tokens):
            tokens = rows * args.train.gradient_accumulation_steps * model.block_size * steps
            decay = weight_decay_for(n, tokens, text.n_tokens, learning_rate, tokens / steps)
            config = replace(args.train, batch_size=rows, max_steps=steps, eval_interval=steps,
                             learning_rate=learning_rate, weight_decay=decay)
            grid.append((f"{layers}x{width}", model, config, tokens))
    return grid


def train_grid(args, path):
    """Train what `path` lacks, cheapest first, and append it there. Returns all runs with these settings, a
    list of dicts, and the number of the signal that ended the work, or 0."""
    text = PreparedText(args.train, ROOT, args.model.block_size)
    text.loaders(args.model.block_size, args.train.batch_size)[0].require_full_batches()
    settings = {**asdict(args.model), **asdict(args.train), "training_tokens": text.n_tokens}
    settings = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
    found = read_runs(path, RUN_KEYS)
    runs = [run for run in found if run["settings"] == settings]
    if len(found) > len(runs):
        print(f"{path}: {len(found) - len(runs)} runs with other settings or data are left out")
    grid = make_grid(args, text)
    done = {(run["shape"], run["tokens"]) for run in runs}
    planned = {*done, *((name, tokens) for name, _, _, tokens in grid)}
    if min(len(set(column)) for column in zip(*planned, strict=True)) < 3:
        raise InputError("a law needs three --shapes and three --tokens, those of earlier runs included")
    todo = [(name, model, config) for name, model, config, tokens in grid if (name, tokens) not in done]
    todo.sort(key=lambda item: flops_of_step(*item[1:]) * item[2].max_steps)
    if todo:
        append_run(path, None)  # can it be written? better known before the work
        SingleProcess().setup(args.train)  # says what the device lacks, once; the runs are silent
    with progress(sum(flops_of_step(model, config) * config.max_steps for _, model, config in todo)) as bar:
        for name, model, config in todo:
            bar.set_description(f"{name}, {config.max_steps} steps")
            flops = flops_of_step(model, config)
            result = train_run(model, config, text, lambda _, flops=flops: bar.update(flops))
            if result["signal"]:
                return runs, result["signal"]
            runs.append({"shape": name, "steps": result["step"], "n": on_meta(model).n_matmul_params(),
                         "tokens": result["tokens"], "loss": result["loss"], "epochs": result["epochs"],
                         "seconds": result["seconds"], "settings": settings})
            append_run(path, runs[-1])
    return runs, 0


def flops_of_step(model, config):
    rows = config.batch_size * config.gradient_accumulation_steps
    return on_meta(model).flops_per_token() * rows * model.block_size


def fit_law(n, d, loss, weight=1):
    """The least-squares law loss = E + A / n^alpha + B / d^beta, with E ≥ 0, as a dict; None if the loss does
    not fall with n and d.

    n, d, loss: arrays (runs,). weight: how often each run counts. With given exponents the law is linear in
    E, A and B; the exponents are sought on a grid that narrows (variable projection, Golub & Pereyra 1973).
    """
    n_unit = np.exp(np.log(n).mean())
    d_unit = np.exp(np.log(d).mean())
    middle = (0.75, 0.75)
    reach = 0.75
    law = None
    for _ in range(7):
        tried = np.meshgrid(*(np.clip(m + reach * np.linspace(-1, 1, 21), 0.01, 3) for m in middle))
        alpha, beta = (exponent.reshape(-1, 1) for exponent in tried)  # (grid, 1)
        terms = np.stack([np.ones((len(alpha), len(n))), (n / n_unit) ** -alpha, (d / d_unit) ** -beta], -1)
        weighted = np.swapaxes(terms, 1, 2) * weight  # (grid, 3, runs)
        gram = weighted @ terms + 1e-12 * np.eye(3)
        right = weighted @ loss[:, None]
        found = np.linalg.solve(gram, right)  # (grid, 3, 1)
        negative = found[:, 0, 0] < 0  # there the best E ≥ 0 is 0
        found[negative, 0] = 0
        found[negative, 1:] = np.linalg.solve(gram[:, 1:, 1:], right[:, 1:])[negative]
        error = (weight * ((terms @ found)[..., 0] - loss) ** 2).sum(-1)
        error[(found[:, 1:, 0] <= 0).any(-1)] = np.inf
        best = error.argmin()
        if np.isinf(error[best]):
            return law
        middle = float(alpha[best, 0]), float(beta[best, 0])
        reach = reach / 4
        E, A, B = found[best, :, 0].tolist()
        law = {"E": E, "A": A * n_unit ** middle[0], "B": B * d_unit ** middle[1],
               "alpha": middle[0], "beta": middle[1], "N_exponent": middle[1] / sum(middle)}
    return law


def intervals(n, d, loss, draws=200):
    """10th and 90th percentile of fits to runs sampled with replacement (bootstrap), {name: [low, high]}."""
    rng = np.random.default_rng(0)
    runs = len(n)
    laws = [fit_law(n, d, loss, rng.multinomial(runs, np.full(runs, 1 / runs))) for _ in range(draws)]
    return {name: np.quantile([law[name] for law in laws if law], (0.1, 0.9)).tolist()
            for name in ("E", "alpha", "beta", "N_exponent")}


def optimum(law, flops):
    """The n and d of least loss with 6 n d = flops (Hoffmann et al. 2022, equation 4)."""
    alpha = law["alpha"]
    beta = law["beta"]
    n = (alpha * law["A"] / (beta * law["B"]) * (flops / 6) ** beta) ** (1 / (alpha + beta))
    return n, flops / 6 / n


def best_in(law, runs, seconds):
    """The n and tokens of least loss after some seconds of training as fast as the runs were, a dict."""
    unique = runs[0]["settings"]["training_tokens"]
    sizes = sorted({run["n"] for run in runs})
    seconds_per_token = [statistics.median(run["seconds"] / run["tokens"] for run in runs if run["n"] == size)
                         for size in sizes]
    n = np.geomspace(sizes[0], sizes[-1] * 100, 1000)
    # Between the sizes of the runs along the lines in log-log; beyond, in proportion to n.
    cost = np.exp(np.interp(np.log(n), np.log(sizes), np.log(seconds_per_token)))
    tokens = seconds / (cost * np.maximum(1, n / sizes[-1]))
    loss = predict(law, *effective(n, tokens, unique))
    best = loss.argmin()
    return {"n": n[best], "tokens": tokens[best], "epochs": tokens[best] / unique, "loss": loss[best]}


def study(runs, path, picture):
    """Fit the law to the runs, test it, plot it, and print tables. Returns a dict for the JSON line."""
    runs = sorted(runs, key=lambda run: (run["n"], run["tokens"]))
    n, tokens, loss = (np.array([run[key] for run in runs], float) for key in ("n", "tokens", "loss"))
    n, d = effective(n, tokens, runs[0]["settings"]["training_tokens"])
    law = fit_law(n, d, loss)
    if law is None:
        raise InputError(f"{path}: its losses do not fall with parameters and tokens, so no law fits")
    predicted = predict_the_largest(n, d, loss)
    is_tested = not np.isnan(predicted).all()
    fitted = predict(law, n, d)
    result = {"runs": len(runs), "law": law, "intervals": intervals(n, d, loss),
              "residual": float(np.sqrt(np.mean((fitted - loss) ** 2))),
              "prediction_error": float(np.nanmean(abs(predicted - loss))) if is_tested else None}
    print(f"{'shape':>8}{'N':>12}{'D':>12}{'epochs':>8}{'loss':>8}{'fitted':>8}   from smaller runs")
    for run, y, z in zip(runs, fitted, predicted, strict=True):
        print(f"{run['shape']:>8}{run['n']:12,}{run['tokens']:12,}{run['epochs']:8.2f}{run['loss']:8.3f}"
              f"{y:8.3f}" + ("" if np.isnan(z) else f"{z:10.3f}"))
    print(f"loss = {law['E']:.3f} + {law['A']:.4g} / N^{law['alpha']:.3f} + {law['B']:.4g} / "
          f"D^{law['beta']:.3f}; the best N grows with the compute to the power {law['N_exponent']:.2f}")
    print("80 % intervals: " + ", ".join(f"{name} {low:.3f} to {high:.3f}"
                                         for name, (low, high) in result["intervals"].items()))
    print(f"root mean square error of the fit {result['residual']:.4f}" + (
        f", mean error of the predictions {result['prediction_error']:.4f}" if is_tested else ""))

    print(f"\n{'training for':>12}{'N':>12}{'D':>12}{'epochs':>8}{'loss':>8}   as fast as these runs")
    result["budgets"] = {}
    for name, seconds in BUDGETS.items():
        best = best_in(law, runs, seconds)
        result["budgets"][name] = best
        print(f"{name:>12}{best['n']:12,.2g}{best['tokens']:12,.2g}{best['epochs']:8.1f}{best['loss']:8.3f}")
    plot(n, d, loss, predicted, law, picture)
    print(picture)
    return result


def predict_the_largest(n, d, loss):
    """What a law fitted to the other runs says of the largest model and the longest runs, an array (runs,);
    NaN for the others, and everywhere if too few others are left."""
    predicted = np.full(len(n), np.nan)
    is_largest = (n == n.max()) | (d == d.max())
    if min(len(set(n)), len(set(d))) > 3:
        law = fit_law(n[~is_largest], d[~is_largest], loss[~is_largest])
        if law:
            predicted[is_largest] = predict(law, n[is_largest], d[is_largest])
    return predicted


def plot(n, d, loss, predicted, law, path):
    """Write a PNG: loss by tokens, loss by compute, the law against the runs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (by_tokens, by_compute, check) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    tokens = np.geomspace(d.min(), d.max() * 2)
    budget = np.geomspace(min(n * d) * 6, max(n * d) * 60)
    for size in sorted(set(n)):
        for axis, factor in ((by_tokens, 1), (by_compute, 6 * size)):
            dots, = axis.plot(d[n == size] * factor, loss[n == size], "o",
                              label=f"N = {size:,.0f}" if axis is by_tokens else None)
            axis.plot(tokens * factor, predict(law, size, tokens), color=dots.get_color(), linewidth=1)
    by_compute.plot(budget, predict(law, *optimum(law, budget)), "k--", linewidth=1, label="the best N")
    check.plot(loss, predict(law, n, d), "o", label="fitted to all runs")
    check.plot(loss, predicted, "s", markerfacecolor="none", label="predicted from the smaller runs")
    check.axline((loss.min(), loss.min()), slope=1, color="k", linewidth=0.8)
    for axis, title, x, y in ((by_tokens, "runs and law", "tokens D, repeats count less", "validation loss"),
                              (by_compute, "by compute", "FLOPs, 6 N D", "validation loss"),
                              (check, "the law against the runs", "measured loss", "loss by the law")):
        axis.set(title=title, xlabel=x, ylabel=y, xscale="linear" if axis is check else "log")
        axis.grid(alpha=0.3)
        axis.legend()
    by_tokens.set_xticks(sorted(set(d)), [f"{tokens / 1e6:.3g} M" for tokens in sorted(set(d))])
    by_tokens.minorticks_off()
    save_plot(figure, path)


def write_law(path, law, runs, model):
    """Write the law for plan.py, with the text and the kind of model that it holds for."""
    with atomic_write(path, "w") as f:
        json.dump({"law": law, "training_tokens": runs[0]["settings"]["training_tokens"],
                   "model": asdict(model)}, f, indent=4)


def main():
    args = command_line()
    path = f"{args.out}.jsonl"
    runs, signalled = train_grid(args, path)
    if signalled:
        return 128 + signalled
    result = study(runs, path, f"{args.out}.png")
    write_law(f"{args.out}.json", result["law"], runs, args.model)
    print_json({"study": path, **result})


if __name__ == "__main__":
    run_script(main)
