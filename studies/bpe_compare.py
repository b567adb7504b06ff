"""Byte-level BPE against characters, at equal compute.

    python -m studies.bpe_compare                        on the text in dataset/
    python -m studies.bpe_compare --texts input.txt pretrain.txt
    python -m studies.bpe_compare --texts input.txt --vocabularies 512 2048 --flops 1e13

The last tenth of each text validates. Models of one shape and recipe are trained on it as characters and as
BPE tokens (studies/bpe.py, merges learnt from the training part), with the same number of floating-point
operations each; a larger vocabulary makes a step dearer, so it gets fewer steps. Bits per byte of UTF-8 are
what can be compared: bits per token cannot. Writes OUT.png; the last line on standard output is JSON.
"""

import math
import os
import statistics
import tempfile
import time
from dataclasses import replace

from config import ROOT, ModelConfig, TrainConfig, load_config
from flags import Parser
from script import InputError, before_imports, print_json, run_script

STUDY = dict(batch_size=4, gradient_accumulation_steps=4, warmup_iters=10, min_lr=0.0, lr_decay_iters=0,
             max_steps=1000000, max_minutes=0.0, save_interval=1000000, eval_iters=1, from_checkpoint="",
             learning_rate=6e-3, embedding_lr=1.0)
GENERATED = 200  # tokens, for the speed of generation


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("--texts", nargs="+", metavar="FILE",
                     help="UTF-8 texts (default: dataset/pretrain.txt, else dataset/sample_pretrain.txt)")
    cli.add_argument("--vocabularies", type=int, nargs="+", default=[1024], metavar="N",
                     help="sizes of the BPE vocabularies (default 1024)")
    cli.add_argument("--flops", type=float, default=3e12, help="of a run (default %(default)g)")
    cli.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each (default %(default)s)")
    cli.add_argument("--out", default="bpe", metavar="NAME", help="write NAME.png (default %(default)s)")
    cli.add_config(ModelConfig, ("vocab_size",), dict(n_layer=4, n_head=4, n_embd=128, n_prev=0))
    args = cli.parse_args()
    if min(args.vocabularies) <= 256 or args.flops <= 0 or args.seeds < 1:
        cli.error("--vocabularies must be above 256, --flops above 0, --seeds at least 1")
    small = dict(n_layer=4, n_head=4, n_embd=128, n_prev=0)
    args.model = load_config(ModelConfig, os.path.join(ROOT, "model_config.json"),
                             {**small, **cli.overrides(args, ModelConfig)})
    args.train = load_config(TrainConfig, os.path.join(ROOT, "config_pretrain.json"), STUDY)
    here = [os.path.join(ROOT, "dataset", name) for name in ("pretrain.txt", "sample_pretrain.txt")]
    args.texts = args.texts or list(filter(os.path.exists, here))[:1]
    if not args.texts:
        cli.error("the following arguments are required: --texts")
    for path in args.texts:
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file")
    return args


if __name__ == "__main__":
    before_imports(command_line)

import numpy as np
import torch

from generate import generate
from plan import PreparedText, on_meta
from studies import bpe
from studies.grid import progress, save_plot, train_run
from tokenizer import SPECIAL_TOKENS, Tokenizer

N_SPECIAL = len(SPECIAL_TOKENS)


def read(path):
    """The training and the validation part of a text. Raises InputError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 ({error})") from None
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def encoders(train_text, text, sizes):
    """{name: (Tokenizer, function from a text to its ids, seconds of learning the vocabulary)}.

    A BPE token is written down as the characters of its bytes in Latin-1, so that the pipeline's Tokenizer
    can hold it; its id is that of BPE after the special tokens."""
    start = time.perf_counter()
    characters = Tokenizer.build([text])
    found = {"characters": (characters, characters.encode, time.perf_counter() - start)}
    start = time.perf_counter()
    merges = bpe.train(train_text, max(sizes))
    seconds = time.perf_counter() - start
    for size in sorted(set(sizes)):
        encoder = bpe.BPE(merges[: size - 256])  # a smaller vocabulary is the beginning of a larger one
        itos = SPECIAL_TOKENS + [token.decode("latin-1") for token in encoder.vocab]
        found[f"BPE {size}"] = (Tokenizer(itos, SPECIAL_TOKENS),
                                lambda part, encoder=encoder: N_SPECIAL + np.array(encoder.encode(part)),
                                seconds)
    return found


def prepare(folder, tokenizer, encode, parts, args):
    """Write the prepared files of a text into `folder`; returns (PreparedText, n of validation tokens)."""
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    for name, part in zip(("train", "val"), parts, strict=True):
        ids = encode(part)
        np.save(os.path.join(folder, f"{name}.npy"), ids.astype(tokenizer.dtype))
    config = replace(args.train, dataset_path=[["train.npy", "val.npy"]])
    return PreparedText(config, folder, args.model.block_size), len(ids)


def tokens_per_second(model):
    """Of generating one text, the median of five times."""
    prompt = torch.full((1, 1), N_SPECIAL, device=model.device)
    n = min(GENERATED, model.config.block_size - 1)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in generate(model.eval(), prompt, n, generator=torch.Generator(model.device).manual_seed(0)):
            pass
        rates.append(n / (time.perf_counter() - start))
    return statistics.median(rates)


def compare(path, args, bar):
    """The results of one text: a list of dicts, one for each way to write it."""
    parts = read(path)
    n_characters = len(parts[1])
    n_bytes = len(parts[1].encode())
    results = []
    for name, (tokenizer, encode, seconds) in encoders(parts[0], "".join(parts), args.vocabularies).items():
        with tempfile.TemporaryDirectory() as folder:
            text, n_tokens = prepare(folder, tokenizer, encode, parts, args)
            model_config = replace(args.model, vocab_size=tokenizer.vocab_size)
            rows = args.train.batch_size * args.train.gradient_accumulation_steps
            step_flops = on_meta(model_config).flops_per_token() * rows * model_config.block_size
            steps = max(1, round(args.flops / step_flops))
            losses = []
            for seed in range(args.seeds):
                config = replace(args.train, max_steps=steps, eval_interval=steps, random_seed=seed,
                                 warmup_iters=min(args.train.warmup_iters, steps - 1))
                bar.set_description(f"{os.path.basename(path)}, {name}, seed {seed}")
                run = train_run(model_config, config, text, lambda _, flops=step_flops: bar.update(flops))
                if run["signal"]:
                    raise KeyboardInterrupt
                losses.append(run["loss"])
        per_token = n_characters / n_tokens  # characters
        bits = [loss / math.log(2) * n_tokens / n_bytes for loss in losses]
        results.append({
            "text": os.path.basename(path), "tokens": name, "vocab_size": tokenizer.vocab_size,
            "parameters": run["model"].n_params(), "steps": steps, "epochs": run["epochs"],
            "tokens_per_character": 1 / per_token, "bits_per_byte": statistics.mean(bits),
            "bits_per_byte_runs": bits, "vocabulary_seconds": seconds,
            "training_characters_per_second": run["tokens"] / run["seconds"] * per_token,
            "generated_characters_per_second": tokens_per_second(run["model"]) * per_token})
    return results


def plot(results, path):
    """Write a PNG: tokens per character, bits per byte and characters per second, a bar for each way."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = {"tokens_per_character": "tokens per character", "bits_per_byte": "bits per byte",
               "generated_characters_per_second": "characters generated a second"}
    figure, axes = plt.subplots(1, len(columns), figsize=(14, 4.2), layout="constrained")
    names = [f"{row['text']}\n{row['tokens']}" for row in results]
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        bars = axis.bar(names, [row[column] for row in results])
        axis.bar_label(bars, [f"{row[column]:,.0f}" if row[column] > 100 else f"{row[column]:.3f}"
                              for row in results], padding=6)  # above the marks of the single runs
        axis.margins(y=0.12)
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=30)
    for name, row in zip(names, results, strict=True):
        bits = row["bits_per_byte_runs"]
        axes[1].plot([name] * len(bits), bits, "k_")  # the single runs
    save_plot(figure, path)


def main():
    args = command_line()
    n_runs = len(args.texts) * (1 + len(set(args.vocabularies))) * args.seeds
    results = []
    with progress(args.flops * n_runs) as bar:
        for path in args.texts:
            results += compare(path, args, bar)
    print(f"{'text':20}{'tokens':12}{'steps':>7}{'tokens/char':>13}{'bits/byte':>11}{'spread':>8}"
          f"{'trained char/s':>16}{'generated char/s':>18}")
    for row in results:
        spread = max(row["bits_per_byte_runs"]) - min(row["bits_per_byte_runs"])
        print(f"{row['text'][:19]:20}{row['tokens']:12}{row['steps']:7}{row['tokens_per_character']:13.3f}"
              f"{row['bits_per_byte']:11.3f}{spread:8.3f}{row['training_characters_per_second']:16,.0f}"
              f"{row['generated_characters_per_second']:18,.0f}")
    plot(results, f"{args.out}.png")
    print_json({"flops": args.flops, "results": results})


if __name__ == "__main__":
    run_script(main)
