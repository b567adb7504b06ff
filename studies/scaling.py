"""Scaling laws: how the loss falls with parameters and tokens, on the text that data.py prepared.

    python -m studies.scaling                            train a grid of models, fit the law, draw it
    python -m studies.scaling --shapes 1x64 2x128 3x192 --tokens 250000 500000 1000000
    python -m studies.scaling --learning_rate 2e-3       any setting, over the JSON files

Each shape (layers x width) is trained on each number of tokens, every time from the start and with a decay of
its own, as Hoffmann et al. 2022 do. The learning rate is that of a model as wide as model_config.json says;
others have it in inverse proportion to their width, and heads of about the same size. A run that is done is a
line in scaling.jsonl; started again, the script trains what is missing. To all runs it fits
loss = E + A / N^alpha + B / D^beta, and prints which model, on how many tokens, is best for an hour of this
machine. N counts the parameters that every token is multiplied with, D the tokens read. The last line on
standard output is one JSON object.
"""

import json
import os
import re
import statistics
import sys
from dataclasses import asdict, replace

from config import ROOT, ModelConfig, Parser, TrainConfig, load_config
from script import InputError, before_imports, run_script

# Over config_pretrain.json: small steps, so that the shortest run has enough of them.
STUDY = dict(batch_size=4, gradient_accumulation_steps=1, warmup_iters=10, min_lr=0.0, lr_decay_iters=0,
             max_steps=1000000, max_minutes=0.0, save_interval=1000000, eval_iters=1, from_checkpoint="")
NOT_HERE = ("n_layer", "n_embd", "n_head", "vocab_size", "max_steps", "eval_interval", "eval_iters",
            "lr_decay_iters", "max_minutes", "save_interval", "log_interval", "from_checkpoint", "backend",
            "timeout_minutes")
MAY_CHANGE = {"device", "dtype", "sdp_kernel", "compile", *NOT_HERE} - {"n_embd", "n_head"}  # within a study
RUN_KEYS = {"shape", "steps", "n", "tokens", "epochs", "loss", "seconds", "settings"}
BUDGETS = {"1 minute": 60, "10 minutes": 600, "1 hour": 3600, "10 hours": 36000}


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("--shapes", nargs="+", metavar="LxW", help="layers x width of the models",
                     default=["1x32", "1x64", "2x96", "3x128", "4x192"])
    cli.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(17, 22)], metavar="N",
                     help="how many tokens the runs read (default 131072 to 2097152)")
    cli.add_argument("--out", default="scaling", metavar="NAME", help="write NAME.jsonl and NAME.png")
    cli.add_argument("--model_config", default=os.path.join(ROOT, "model_config.json"), metavar="FILE")
    cli.add_argument("--train_config", default=os.path.join(ROOT, "config_pretrain.json"), metavar="FILE")
    cli.add_config(TrainConfig, NOT_HERE, STUDY).add_config(ModelConfig, NOT_HERE)
    args = cli.parse_args()
    train = load_config(TrainConfig, args.train_config, {**STUDY, **cli.overrides(args, TrainConfig)})
    model = load_config(ModelConfig, args.model_config, cli.overrides(args, ModelConfig))
    if not train.dataset_path:
        raise InputError(f'{args.train_config}: dataset_path is not set; give [["train.npy", "val.npy"]]')
    step = train.batch_size * train.gradient_accumulation_steps * model.block_size
    model.dropout = train.dropout
    args.train, args.model, args.grid = train, model, []
    for name in dict.fromkeys(args.shapes):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", name):
            raise InputError(f"--shapes {name}: must be layers x width, such as 2x96")
        layers, width = map(int, name.split("x"))
        heads = max(1, width * model.n_head // model.n_embd)
        of_shape = replace(model, n_layer=layers, n_embd=width, n_head=heads).validate(f"--shapes {name}")
        for steps in dict.fromkeys(max(1, round(tokens / step)) for tokens in args.tokens):
            config = replace(train, max_steps=steps, eval_interval=steps,
                             learning_rate=train.learning_rate * model.n_embd / width)
            args.grid.append((name, of_shape, config.validate(f"--tokens, {steps} steps of {step}")))
    return args


if __name__ == "__main__":
    before_imports(command_line)

import numpy as np
import torch
from tqdm import tqdm

from dataloader import DataLoader
from model import GPT
from run import build_run
from strategy import SingleProcess
from tokenizer import Tokenizer
from train import fit, validation_loss


class CountedSteps(SingleProcess):
    """A process whose steps move the bar of all runs."""

    def __init__(self, bar, flops):
        self.bar = bar
        self.flops = flops  # of one step

    def take_step(self, lr, norm):
        self.bar.update(self.flops)
        return super().take_step(lr, norm)

    def say(self, text):
        pass


def read_runs(path):
    """The runs in a .jsonl file, a list of dicts (empty if there is none)."""
    runs = []
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                done = json.loads(line)
                if not RUN_KEYS <= done.keys():
                    raise ValueError
                runs.append(done)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError):
        raise InputError(f"{path}, line {len(runs) + 1}: not a run of scaling.py; delete that line") from None
    return runs


def append(path, text):
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def train_grid(args, path):
    """Train what `path` lacks, cheapest first, and append it there. Returns all runs with these settings, a
    list of dicts, and the number of the signal that ended the work, or 0."""
    pairs = [[os.path.join(ROOT, file) for file in pair] for pair in args.train.dataset_path]
    tokenizer = Tokenizer.load(os.path.join(os.path.dirname(pairs[0][0]), "tokenizer.json"))

    def loader(which, rows):
        return DataLoader([pair[which] for pair in pairs], "pretrain", args.model.block_size, rows,
                          args.train.random_seed, vocab_size=tokenizer.vocab_size)

    loader(0, args.train.batch_size).require_full_batches()
    tokens = sum(len(source.tokens) for source in loader(0, 1).sources)
    settings = {**asdict(args.model), **asdict(args.train), "training_tokens": tokens}
    settings = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
    found = read_runs(path)
    runs = [done for done in found if done["settings"] == settings]
    if len(found) > len(runs):
        print(f"{path}: {len(found) - len(runs)} runs with other settings or data are left out")
    planned = [(name, config.max_steps) for name, _, config in args.grid]
    planned += [(done["shape"], done["steps"]) for done in runs]
    if min(len(set(column)) for column in zip(*planned, strict=True)) < 3:
        raise InputError("a law needs three --shapes and three --tokens, those of earlier runs included")
    todo = []
    for name, model_config, config in args.grid:
        model_config.vocab_size = tokenizer.vocab_size
        with torch.device("meta"):
            flops = GPT(model_config).flops_per_token() * config.batch_size \
                * config.gradient_accumulation_steps * model_config.block_size  # of a step
        if not any((done["shape"], done["steps"]) == (name, config.max_steps) for done in runs):
            todo.append((flops * config.max_steps, flops, name, model_config, config))
    if todo:
        append(path, "")  # can it be written? better known before the work
        SingleProcess().setup(args.train)  # says what the device lacks, once; the runs are silent
    with tqdm(total=sum(item[0] for item in todo), unit="FLOP", unit_scale=True, dynamic_ncols=True,
              disable=not todo, mininterval=0.2 if sys.stderr.isatty() else 15) as bar:
        for _, flops, name, model_config, config in sorted(todo, key=lambda item: item[0]):
            bar.set_description(f"{name}, {config.max_steps} steps")
            strategy = CountedSteps(bar, flops)
            strategy.setup(config)
            loaders = loader(0, config.batch_size), loader(1, max(1, 8192 // model_config.block_size))
            setup = build_run(config, strategy, "pretrain", tokenizer, model_config,
                              lambda *_, loaders=loaders: loaders, folder=None, quiet=True)
            result = fit(setup.model, tokenizer, *loaders, config, strategy, setup.run)
            if result["signal"]:
                return runs, result["signal"]
            # What fit validates is a sample: here every row.
            sources = loaders[1].sources
            n_rows = len(sources) * max(source.n_rows for source in sources)
            loss = validation_loss(setup.model, loaders[1], strategy, config, tokenizer, n_rows)
            runs.append({"shape": name, "steps": result["step"], "n": setup.model.n_multiplied(),
                         "tokens": result["tokens"], "loss": loss,
                         "epochs": result["step"] * config.gradient_accumulation_steps
                         / loaders[0].batches_per_epoch,
                         "seconds": result["seconds"], "settings": settings})
            append(path, json.dumps(runs[-1]) + "\n")
    return runs, 0


def predict(law, n, d):
    """The law's loss of n parameters after d tokens."""
    return law["E"] + law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"]


def fit_law(n, d, loss, weight=1):
    """The law loss = E + A / n^alpha + B / d^beta of least squares, with E ≥ 0, as a dict; None where the
    loss does not fall with n and d.

    n, d, loss: arrays (runs,). weight: how often each run counts. With given exponents the law is linear in
    E, A and B; the exponents are sought on a grid that narrows (variable projection, Golub & Pereyra 1973).
    """
    n_unit, d_unit = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    middle, reach, law = (0.75, 0.75), 0.75, None
    for _ in range(7):
        tried = np.meshgrid(*(np.clip(m + reach * np.linspace(-1, 1, 21), 0.01, 3) for m in middle))
        alpha, beta = (exponent.reshape(-1, 1) for exponent in tried)  # (grid, 1)
        terms = np.stack([np.ones((len(alpha), len(n))), (n / n_unit) ** -alpha, (d / d_unit) ** -beta], -1)
        weighted = np.swapaxes(terms, 1, 2) * weight  # (grid, 3, runs)
        gram, right = weighted @ terms + 1e-12 * np.eye(3), weighted @ loss[:, None]
        found = np.linalg.solve(gram, right)  # (grid, 3, 1)
        negative = found[:, 0, 0] < 0  # the best E ≥ 0 is 0 there
        found[negative, 0], found[negative, 1:] = 0, np.linalg.solve(gram[:, 1:, 1:], right[:, 1:])[negative]
        error = (weight * ((terms @ found)[..., 0] - loss) ** 2).sum(-1)
        error[(found[:, 1:, 0] <= 0).any(-1)] = np.inf
        best = error.argmin()
        if np.isinf(error[best]):
            return law
        middle, reach = (float(alpha[best, 0]), float(beta[best, 0])), reach / 4
        E, A, B = found[best, :, 0].tolist()
        law = {"E": E, "A": A * n_unit ** middle[0], "B": B * d_unit ** middle[1],
               "alpha": middle[0], "beta": middle[1], "N_exponent": middle[1] / sum(middle)}
    return law


def intervals(n, d, loss, draws=200):
    """10th and 90th percentile of fits to runs drawn with replacement (bootstrap), {name: [low, high]}."""
    rng, runs = np.random.default_rng(0), len(n)
    laws = [fit_law(n, d, loss, rng.multinomial(runs, np.full(runs, 1 / runs))) for _ in range(draws)]
    return {name: np.quantile([law[name] for law in laws if law], (0.1, 0.9)).tolist()
            for name in ("E", "alpha", "beta", "N_exponent")}


def optimum(law, flops):
    """The n and d of least loss with 6 n d = flops (Hoffmann et al. 2022, equation 4)."""
    alpha, beta, half = law["alpha"], law["beta"], flops / 6
    n = (alpha * law["A"] / (beta * law["B"]) * half**beta) ** (1 / (alpha + beta))
    return n, half / n


def best_in(law, runs, seconds):
    """The n and tokens of least loss after some seconds of training as fast as the runs were, a dict."""
    sizes = sorted({done["n"] for done in runs})
    cost = [statistics.median(done["seconds"] / done["tokens"] for done in runs if done["n"] == size)
            for size in sizes]  # seconds a token
    n = np.geomspace(sizes[0], sizes[-1] * 100, 1000)
    d = seconds / np.exp(np.interp(np.log(n), np.log(sizes), np.log(cost))) / np.maximum(1, n / sizes[-1])
    best = predict(law, n, d).argmin()
    return {"n": n[best], "tokens": d[best], "epochs": d[best] / runs[0]["settings"]["training_tokens"],
            "loss": predict(law, n[best], d[best])}


def study(runs, path, picture):
    """Fit the law to the runs, test and draw it, and print tables. Returns a dict for the JSON line."""
    runs = sorted(runs, key=lambda done: (done["n"], done["tokens"]))
    n, d, loss = (np.array([done[key] for done in runs], float) for key in ("n", "tokens", "loss"))
    fewest = min(len(set(n)), len(set(d)))
    law = fit_law(n, d, loss)
    if law is None:
        raise InputError(f"{path}: its losses do not fall with parameters and tokens, so no law fits")
    # Does it hold beyond the runs that it was fitted to? The largest model and the longest runs, foretold.
    beyond, foretold = (n == n.max()) | (d == d.max()), np.full(len(n), np.nan)
    if fewest > 3 and (smaller := fit_law(n[~beyond], d[~beyond], loss[~beyond])):
        foretold[beyond] = predict(smaller, n[beyond], d[beyond])
    fitted, tested = predict(law, n, d), not np.isnan(foretold).all()
    result = {"runs": len(runs), "law": law, "intervals": intervals(n, d, loss),
              "residual": float(np.sqrt(np.mean((fitted - loss) ** 2))),
              "foretold_error": float(np.nanmean(abs(foretold - loss))) if tested else None}
    print(f"{'shape':>8}{'N':>12}{'D':>12}{'epochs':>8}{'loss':>8}{'fitted':>8}   foretold from the smaller")
    for done, y, z in zip(runs, fitted, foretold, strict=True):
        print(f"{done['shape']:>8}{done['n']:12,}{done['tokens']:12,}{done['epochs']:8.2f}{done['loss']:8.3f}"
              f"{y:8.3f}" + ("" if np.isnan(z) else f"{z:10.3f}"))
    print(f"loss = {law['E']:.3f} + {law['A']:.4g} / N^{law['alpha']:.3f} + {law['B']:.4g} / "
          f"D^{law['beta']:.3f}; the best N grows with the compute to the power {law['N_exponent']:.2f}")
    print("80 % intervals: " + ", ".join(f"{name} {low:.3f} to {high:.3f}"
                                         for name, (low, high) in result["intervals"].items()))
    print(f"the law is off by {result['residual']:.4f} (root mean square)" + (
        f", what was foretold by {result['foretold_error']:.4f} (mean)" if tested else ""))

    print(f"\n{'training for':>12}{'N':>12}{'D':>12}{'epochs':>8}{'loss':>8}   as fast as these runs")
    result["budgets"] = {}
    for name, seconds in BUDGETS.items():
        best = result["budgets"][name] = best_in(law, runs, seconds)
        print(f"{name:>12}{best['n']:12,.2g}{best['tokens']:12,.2g}{best['epochs']:8.1f}{best['loss']:8.3f}")
    if best["epochs"] > 4:
        print("beyond 4 epochs the law is too hopeful: there a token read again is worth less than a new one "
              "(Muennighoff et al. 2023)")
    draw(n, d, loss, foretold, law, picture)
    print(picture)
    return result


def draw(n, d, loss, foretold, law, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (by_tokens, by_compute, check) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    tokens, budget = np.geomspace(d.min(), d.max() * 2), np.geomspace(min(n * d) * 6, max(n * d) * 60)
    for size in sorted(set(n)):
        for axis, factor in ((by_tokens, 1), (by_compute, 6 * size)):
            dots, = axis.plot(d[n == size] * factor, loss[n == size], "o",
                              label=f"N = {size:,.0f}" if axis is by_tokens else None)
            axis.plot(tokens * factor, predict(law, size, tokens), color=dots.get_color(), linewidth=1)
    by_compute.plot(budget, predict(law, *optimum(law, budget)), "k--", linewidth=1, label="the best N")
    check.plot(loss, predict(law, n, d), "o", label="fitted to all runs")
    check.plot(loss, foretold, "s", markerfacecolor="none", label="foretold from the smaller runs")
    check.axline((loss.min(), loss.min()), slope=1, color="k", linewidth=0.8)
    for axis, title, x, y in ((by_tokens, "runs and law", "tokens D", "validation loss"),
                              (by_compute, "by compute", "FLOPs, 6 N D", "validation loss"),
                              (check, "the law against the runs", "measured loss", "loss by the law")):
        axis.set(title=title, xlabel=x, ylabel=y, xscale="linear" if axis is check else "log")
        axis.grid(alpha=0.3)
        axis.legend()
    by_tokens.set_xticks(sorted(set(d)), [f"{tokens / 1e6:.3g} M" for tokens in sorted(set(d))])
    by_tokens.minorticks_off()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error})") from None


def main():
    args = command_line()
    path = f"{args.out}.jsonl"
    runs, signalled = train_grid(args, path)
    if signalled:
        return 128 + signalled
    print(json.dumps({"study": path, **study(runs, path, f"{args.out}.png")}))


if __name__ == "__main__":
    run_script(main)
