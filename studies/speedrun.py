"""Seconds to a loss: `python -m studies.bench speedrun` (see studies/bench.py)."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np

from config import ROOT, ModelConfig, TrainConfig
from dataloader import DataLoader
from script import InputError
from studies.timing import table
from tokenizer import Tokenizer

# nanoGPT's documented run for a CPU, and ours: fields of ModelConfig and of TrainConfig.
RECIPES = {
    "nanogpt": (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, use_rope=False),
                dict(optimizer="adamw", learning_rate=1e-3, min_lr=1e-4, warmup_iters=100,
                     lr_schedule="cosine", batch_size=12, max_steps=2000)),
    "ours": (dict(n_layer=1, n_head=2, n_embd=128, block_size=64, activation="relu2", qk_norm=True, n_prev=3),
             dict(optimizer="muon", learning_rate=1.2e-2, min_lr=0.0, warmup_iters=8, lr_schedule="linear",
                  beta1=0.7, beta2=0.95, weight_decay=0.0, batch_size=24, max_steps=140)),
}
GOAL = 1.886  # the validation loss that nanoGPT's documentation gives for its run


def bench_speedrun(args, start):
    """From the start of Python to a trained and validated model: the first 90 % of a text are for training,
    all of the rest for validation. Without --recipe: whole processes, timed from outside, alternately.

    start: time.perf_counter() when this process began."""
    if args.recipe:
        return {"recipe": args.recipe, **run_recipe(args, *RECIPES[args.recipe], start)}
    runs = {"ours": [], "nanogpt": []} if args.baseline else {"ours": []}
    for _ in range(args.repeats):
        for recipe, results in runs.items():
            command = [sys.executable, "-m", "studies.bench", "speedrun", "--text", args.text,
                       "--recipe", recipe, "--device", args.device]
            began = time.perf_counter()
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            if child.returncode:
                raise InputError(f"{' '.join(command)}: ended with status {child.returncode}")
            result = json.loads(child.stdout.splitlines()[-1])
            results.append({**result, "wall_seconds": time.perf_counter() - began})
    seconds = {recipe: statistics.median(result["wall_seconds"] for result in results)
               for recipe, results in runs.items()}
    losses = {recipe: statistics.median(result["val_loss"] for result in results)
              for recipe, results in runs.items()}
    table([(recipe, results[0]["steps"], f"{results[0]['tokens']:,}", f"{losses[recipe]:.4f}",
            f"{seconds[recipe]:.1f}", f"{seconds[recipe] / seconds['nanogpt']:.3f}" if args.baseline else "–")
           for recipe, results in runs.items()],
          ("settings", "steps", "tokens", "val loss", "seconds", "of nanogpt's"))
    reached = losses["ours"] <= GOAL
    print(f"loss {GOAL}: {'reached' if reached else 'not reached'}")
    return {"reached": reached, "val_loss": losses, "wall_seconds": seconds, "runs": runs}


def run_recipe(args, model_settings, train_settings, start):
    """Train and validate with these fields of ModelConfig and TrainConfig. Returns a dict."""
    # Imported here, since the other benchmarks do not need the loop, and their start does not pay for it.
    import train
    from run import build_run
    from strategy import SingleProcess
    try:
        with open(args.text, encoding="utf-8") as f:
            text = f.read()
    except OSError as error:
        raise InputError(f"--text {args.text}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--text {args.text}: not UTF-8 at byte {error.start}") from None
    tokenizer = Tokenizer.build([text])
    ids = tokenizer.encode(text)
    config = TrainConfig(**{"device": args.device, "gradient_accumulation_steps": 1, "weight_decay": 0.1,
                            "random_seed": args.random_seed, "save_interval": 1000000, "lr_decay_iters": 0,
                            **train_settings})
    config = replace(config, eval_interval=config.max_steps).validate()
    strategy = SingleProcess()
    strategy.setup(config)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("train", ids[: int(0.9 * len(ids))]), ("val", ids[int(0.9 * len(ids)) :])):
            np.save(f"{folder}/{name}.npy", part)

        def make_loaders(model_config, _):
            return [DataLoader([f"{folder}/{name}.npy"], "pretrain", model_config.block_size, rows,
                               config.random_seed)
                    for name, rows in (("train", config.batch_size), ("val", 128))]

        setup = build_run(config, strategy, "pretrain", tokenizer, ModelConfig(**model_settings),
                          make_loaders, folder=None)
        result = train.fit(setup.model, tokenizer, setup.loader, setup.val_loader, config, strategy,
                           setup.run)
        # What fit validates, at the start too, is a sample: here every row.
        n_rows = sum(source.n_rows for source in setup.val_loader.sources)
        val_loss = train.validation_loss(setup.model, setup.val_loader, strategy, config, tokenizer, n_rows)
    return {"steps": result["step"], "tokens": result["tokens"], "val_loss": val_loss,
            "parameters": setup.model.n_params(), "seconds": round(time.perf_counter() - start, 2)}
