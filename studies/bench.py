"""Timings of training, generation, attention kernels and data preparation on this machine.

    python -m studies.bench train        tokens/s and TFLOPS of each way to train, beside plain float32
    python -m studies.bench train --n_layer 2 --n_head 4 --n_embd 512 --block_size 512 --vocab_size 2114 \\
        --batch_size 100
    python -m studies.bench generate     tokens/s with and without the KV cache, and time to the first token
    python -m studies.bench sdpa         the attention kernels, relative time and memory
    python -m studies.bench data --megabytes 500       data.py from file to file, its peak memory
    python -m studies.bench sft --rows dataset/sft_train.npy     trimmed batches beside full padding
    python -m studies.bench speedrun --text input.txt            seconds to loss 1.886 on tinyshakespeare
    python -m studies.bench speedrun --text input.txt --baseline      and those of nanoGPT's settings
    python -m studies.bench growth       speed and memory as width, block, batch and length grow; a plot

The ways are timed in turns, several times; the table shows medians. Machines are shared, so compare ratios
within one run. The last line on standard output is one JSON object.
"""

import time

START = time.perf_counter()  # `speedrun` counts the imports too

import argparse
import copy
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace

from config import IGNORE, ROOT, InputError, ModelConfig, Parser, TrainConfig, before_imports, run_script

SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65}


def command_line(words=None):
    cli = Parser(__doc__)
    cli.add_argument("what", choices=("train", "generate", "sdpa", "data", "sft", "speedrun", "growth"))
    cli.add_argument("--batch_size", type=int, default=16)
    cli.add_argument("--rows", default=os.path.join(ROOT, "dataset", "sft_train.npy"), metavar="FILE",
                     help="instruction data for `sft`, prepared by data.py (default dataset/sft_train.npy)")
    cli.add_argument("--text", metavar="FILE", help="tinyshakespeare's input.txt, for `speedrun`")
    cli.add_argument("--baseline", action="store_true", help="`speedrun` in turns with nanoGPT's settings")
    cli.add_argument("--recipe", choices=("ours", "nanogpt"), help="one `speedrun`, in this process")
    cli.add_argument("--random_seed", type=int, default=1337, help="of a --recipe")
    cli.add_argument("--plot", default="growth.png", metavar="FILE", help="for `growth` (default growth.png)")
    cli.add_argument("--repeats", type=int, default=3, help="turns (default 3)")
    cli.add_argument("--seconds", type=float, default=4.0, help="least time a turn of one way (default 4)")
    cli.add_argument("--megabytes", type=int, default=200, help="size of the text for `data` (default 200)")
    cli.add_argument("--device", default="auto")
    cli.add_config(ModelConfig, defaults=SMALL)
    args = cli.parse_args(words)
    if min(args.batch_size, args.repeats, args.megabytes) < 1 or not args.seconds > 0:
        raise InputError("--batch_size, --repeats, --megabytes and --seconds must be above 0")
    if args.what == "speedrun" and not args.text:
        raise InputError("speedrun needs --text FILE, tinyshakespeare's input.txt")
    args.model = ModelConfig(**{**SMALL, **cli.overrides(args, ModelConfig)}).validate()
    return args


if __name__ == "__main__":
    before_imports(command_line)

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint as ckpt
from cpu import native
from dataloader import DataLoader
from device import pick_device, pick_dtype
from generate import decode_one_token, generate, prefill, quantize
from model import GPT, KVCache
from optimizer import build_optimizer
from tokenizer import Tokenizer


def rate(work, seconds, device):
    """Units a second of `work()`, which returns the number of units it did; called for at least `seconds`."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return done / (time.perf_counter() - start)


def in_turns(ways, args, device):
    """The rate of each of the `ways` {name: work}, warmed up, one after another, `repeats` times: a list of
    {name: rate}."""
    for work in ways.values():
        work()
    return [{name: rate(work, args.seconds, device) for name, work in ways.items()}
            for _ in range(args.repeats)]


def medians(turns, against=None):
    """The median of each way's rate, or of its ratio to that of the way `against` in the same turn."""
    return {name: statistics.median(turn[name] / (turn[against] if against else 1) for turn in turns)
            for name in turns[0]}


def tensors(batch, device):
    """A loader's batch, numpy arrays, on the device."""
    return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in batch]


def table(rows, columns):
    print("".join(f"{c:>16}" if i else f"{c:34}" for i, c in enumerate(columns)))
    for row in rows:
        print("".join(f"{c:>16}" if i else f"{c:34}" for i, c in enumerate(row)))


def training_step(args, device, dtype, optimizer="adamw", compile=False, next_batch=None):
    """A function that takes one training step, returning how many tokens it read; and its model.

    next_batch: gives inputs and targets (B, T); by default random tokens, batch_size × block_size."""
    torch.manual_seed(0)
    model = GPT(args.model).to(device)
    if compile:
        model.compile()
    optimizers = build_optimizer(model, TrainConfig(optimizer=optimizer))
    tokens = torch.randint(args.model.vocab_size, (args.batch_size, args.model.block_size + 1), device=device)

    def step():
        x, y = next_batch() if next_batch else (tokens[:, :-1], tokens[:, 1:])
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        optimizers.zero_grad()
        return x.numel()
    return step, model


def matrix_product(device, dtype, size=1024):
    """A function that multiplies two `size`² matrices and returns the floating-point operations that took."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product():
        torch.mm(a, b)
        return 2 * size**3
    return product


def bench_train(args, device):
    best = pick_dtype("bfloat16", device)
    types = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, best)}
    ways, products = {}, {}
    for name, dtype in types.items():
        products[name] = f"{name}, 1024² matrix product"
        ways[products[name]] = matrix_product(device, dtype)
        ways[f"{name}, AdamW"] = training_step(args, device, dtype)[0]
        ways[f"{name}, Muon"] = training_step(args, device, dtype, "muon")[0]
        ways[f"{name}, AdamW, compiled"] = training_step(args, device, dtype, compile=True)[0]
    turns, flops = in_turns(ways, args, device), GPT(args.model).flops_per_token()
    rates, ratios = medians(turns), medians(turns, "float32, AdamW")
    peak = {name: rates.pop(product) for name, product in products.items()}
    ratios = {name: ratios[name] for name in rates}
    shares = {name: flops * medians(turns, products[name.split(",")[0]])[name] for name in rates}
    table([(name, f"{r:,.0f}", f"{r * flops / 1e12:.3f}", f"{ratios[name]:.2f}", f"{shares[name]:.0%}")
           for name, r in rates.items()],
          ("way to train", "tokens/s", "TFLOPS", "against first", "of matmul rate"))
    print(", ".join(f"a 1024² matrix product in {name}: {p / 1e12:.3f} TFLOPS" for name, p in peak.items()))
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", np.zeros(4_000_000, np.uint16))
        loader = DataLoader([f"{folder}/x.npy"], "pretrain", args.model.block_size, args.batch_size)
        loading = 1 / rate(lambda: len([tensors(loader.next_batch(), device)]), args.seconds / 4, device)
    waiting = loading * max(rates.values()) / (args.batch_size * args.model.block_size)
    print(f"a batch is read in {1e3 * loading:.2f} ms: {waiting:.2%} of the fastest way's step spent waiting")
    return {"parameters": GPT(args.model).n_params(), "tokens_per_second": rates, "waiting_share": waiting,
            "tflops": {name: r * flops / 1e12 for name, r in rates.items()}, "against_first": ratios,
            "share_of_matmul_rate": shares, "matmul_tflops": {name: p / 1e12 for name, p in peak.items()}}


def bench_generate(args, device):
    model = GPT(args.model).to(device).eval()
    length = args.model.block_size
    prompt = torch.randint(args.model.vocab_size, (32, 8), device=device)

    @torch.inference_mode()
    def uncached():
        idx, n = prompt[:1], min(64, length - 8)
        for _ in range(n):
            idx = torch.cat([idx, model(idx, last_only=True)[0].argmax(-1)], dim=1)
        return n

    def cached(rows, model=model):
        return sum(len(token) for token in generate(model, prompt[:rows], length - 8, temperature=0))

    @torch.inference_mode()
    def cached_in_pytorch(rows):
        """As `generate` does where decode.c is not compiled."""
        cache = KVCache(model.config, rows, length, device)
        logits = prefill(model, prompt[:rows], cache)
        for _ in range(length - 9):
            logits = model(logits.argmax(-1)[:, None], cache=cache)[0][:, -1]
        return rows * (length - 8)

    @torch.inference_mode()
    def whole_prompt():
        return model(prompt[:1].repeat(1, length // 8), last_only=True)[0].size(0) * (length // 8 * 8)

    ways = {"no cache, 1 sequence": uncached, "prefill": whole_prompt}
    if compiled := device.type == "cpu" and native.wait("decode.c"):
        small = copy.deepcopy(model)
        quantize(small)
    for rows in (1, 32):
        sequences = f"{rows} sequence{'s' if rows > 1 else ''}"
        ways[f"KV cache, PyTorch, {sequences}"] = lambda rows=rows: cached_in_pytorch(rows)
        if compiled:
            ways[f"KV cache, decode.c, {sequences}"] = lambda rows=rows: cached(rows)
            ways[f"KV cache, decode.c, int8, {sequences}"] = lambda rows=rows: cached(rows, small)
    turns = in_turns(ways, args, device)
    rates, ratios = medians(turns), medians(turns, "no cache, 1 sequence")
    table([(name, f"{r:,.0f}", f"{ratios[name]:.1f}") for name, r in rates.items()],
          ("way to generate", "tokens/s", "against first"))
    start = start_seconds(model, args)
    table([(name, f"{seconds:.2f}") for name, seconds in start.items()], ("from the command on", "seconds"))
    return {"parameters": model.n_params(), "tokens_per_second": rates, "against_first": ratios,
            "start_seconds": start}


def start_seconds(model, args):
    """Seconds from starting inference.py to its first token, and of the slowest script's --help; medians."""
    tokenizer = Tokenizer.build([chr(0x4E00 + i) for i in range(model.config.vocab_size)])
    model.config.vocab_size = tokenizer.vocab_size
    content = {"format": ckpt.FORMAT, "task": "pretrain", "step": 0, "best_val_loss": 0.0, "optimizer": None,
               "scaler": None, "rng": [], "dataloader": {}, "model": GPT(model.config).state_dict(),
               "model_config": asdict(model.config), "train_config": asdict(TrainConfig()),
               "tokenizer_config": tokenizer.to_dict()}

    def seconds(*words):
        times = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pt")
        ckpt.save(path, content)
        first = seconds("inference.py", "-m", path, "-p", "一", "-l", "2")
    scripts = ("data.py", "train.py", "train_ddp.py", "train_deepspeed.py", "inference.py", "inference_ds.py",
               "evaluate.py", "problem.py", "plot_loss.py", "checkpoint.py", "bench.py", "scaling.py")
    return {"first token": first, "slowest --help": max(seconds(script, "--help") for script in scripts)}


def allocated(work, device):
    """The most bytes that tensors made by `work()` take at a time (0 where torch does not count them)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it announces its start on standard error
    with torch.profiler.profile(profile_memory=True) as profiler:
        work()
    # The public tables give what an operation leaves behind, not what it takes meanwhile.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def bench_sdpa(args, device):
    """Forward and backward of scaled_dot_product_attention alone, in the type that training would take."""
    c, dtype = args.model, pick_dtype("bfloat16", device)
    shape = (args.batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def attention(backend):
        def work():
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
            return 1
        return work

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
                "math": SDPBackend.MATH}
    ways, memory = {}, {}
    for name, backend in backends.items():
        try:
            attention(backend)()
        except RuntimeError:  # "No available kernel"
            continue
        ways[name] = attention(backend)
        memory[name] = allocated(ways[name], device)
    turns, rows = in_turns(ways, args, device), []
    rates, ratios = medians(turns), medians(turns, "math")
    for name in backends:
        if name not in rates:
            rows.append((name, "not here", "", ""))
            continue
        share = f"{memory[name] / memory['math']:.2f}" if memory["math"] else "–"
        rows.append((name, f"{1e3 / rates[name]:.1f}", f"{1 / ratios[name]:.2f}", share))
    table(rows, ("kernel", "ms", "relative time", "relative memory"))
    return {"milliseconds": {name: 1e3 / r for name, r in rates.items()}, "memory_bytes": memory}


def resident_megabytes(pid):
    """Peak resident memory of a running process so far (Linux; 0 elsewhere)."""
    # Not getrusage: after a fork it also counts what the parent, with torch in it, held.
    try:
        with open(f"/proc/{pid}/status") as f:
            return next((int(line.split()[1]) / 1e3 for line in f if line.startswith("VmHWM")), 0)
    except OSError:
        return 0


def bench_data(args, device):
    """The tokenizer on some 25 MB in memory, and data.py as a process of its own on a file of `megabytes`."""
    rng = random.Random(0)
    letters = [chr(0x4E00 + i) for i in range(3000)]
    lines = ["".join(rng.choices(letters, k=rng.randint(20, 400))) for _ in range(2000)]
    text = "\n".join(lines * 20)
    size = len(text.encode()) / 1e6
    tokenizer = Tokenizer.build([text])
    ids = tokenizer.encode(text)
    ways = {"encode": lambda: len(tokenizer.encode(text)) and size,
            "decode": lambda: tokenizer.decode(ids) and size}
    torch.set_num_threads(1)
    rates = medians(in_turns(ways, args, device))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "text.txt")
        with open(path, "w", encoding="utf-8") as f:
            while f.tell() < args.megabytes * 1e6:
                f.write("".join(f"<|bos|>{line}<|eos|>\n" for line in rng.sample(lines, 500)))
        megabytes, times, peak = os.path.getsize(path) / 1e6, [], 0
        command = [sys.executable, os.path.join(ROOT, "data.py"), "--pretrain", path, "--out", folder]
        for _ in range(args.repeats):
            start = time.perf_counter()
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while child.poll() is None:
                peak = max(peak, resident_megabytes(child.pid))
                time.sleep(0.02)
            times.append(time.perf_counter() - start)
            if child.returncode:
                raise InputError(f"data.py failed with status {child.returncode}")
    rates["data.py, file to file"] = megabytes / statistics.median(times)
    table([(name, f"{r:.0f}") for name, r in rates.items()], ("one core", "MB/s of UTF-8"))
    print(f"data.py on {megabytes:.0f} MB: peak memory {peak:.0f} MB")
    return {"megabytes_per_second": rates, "file_megabytes": megabytes, "peak_memory_megabytes": peak}


def bench_sft(args, device):
    """Training on instruction rows, in batches trimmed to their longest row and padded to block_size."""
    block_size, dtype = args.model.block_size, pick_dtype("bfloat16", device)
    loader = DataLoader([args.rows], "sft", block_size, args.batch_size)
    loader.require_full_batches()
    args.model.vocab_size = int(loader.sources[0].data[:, 0].max()) + 1

    def pad(batch):
        width = ((0, 0), (0, block_size - batch[0].shape[1]))
        return [np.pad(array, width, constant_values=fill)
                for array, fill in zip(batch, (0, IGNORE), strict=True)]

    widths = []

    def trimmed():
        batch = loader.next_batch()
        widths.append(batch[0].shape[1])
        return tensors(batch, device)

    def padded():
        return tensors(pad(loader.next_batch()), device)

    steps = {"trimmed": training_step(args, device, dtype, next_batch=trimmed),
             "padded": training_step(args, device, dtype, next_batch=padded)}
    model, losses = steps["trimmed"][1].eval(), {"trimmed": [], "padded": []}
    with torch.inference_mode():
        for batch in loader.fixed_batches(4):
            for way, some in zip(losses, (batch, pad(batch)), strict=True):
                losses[way].append(float(model(*tensors(some, device))[1]))
    model.train()
    turns = in_turns({way: lambda step=step: step() and args.batch_size for way, (step, _) in steps.items()},
                     args, device)
    rates, ratios = medians(turns), medians(turns, "padded")
    table([(way, f"{r:,.1f}", f"{ratios[way]:.2f}", f"{statistics.mean(losses[way]):.6f}")
           for way, r in rates.items()], ("batches", "pairs/s", "against padded", "loss at first"))
    print(f"{statistics.mean(widths):.0f} tokens to a trimmed row, {block_size} to a padded one")
    return {"pairs_per_second": rates, "ratio": ratios["trimmed"], "losses": losses,
            "mean_width": statistics.mean(widths)}


# nanoGPT's documented run for a CPU, and ours: settings over those of ModelConfig and TrainConfig.
RECIPES = {
    "nanogpt": (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, use_rope=False),
                dict(optimizer="adamw", learning_rate=1e-3, min_lr=1e-4, warmup_iters=100,
                     lr_schedule="cosine", batch_size=12, max_steps=2000)),
    "ours": (dict(n_layer=1, n_head=2, n_embd=128, block_size=64, activation="relu2", qk_norm=True, n_prev=3),
             dict(optimizer="muon", learning_rate=1.2e-2, min_lr=0.0, warmup_iters=8, lr_schedule="linear",
                  beta1=0.7, beta2=0.95, weight_decay=0.0, batch_size=24, max_steps=140)),
}
GOAL = 1.886  # the validation loss that nanoGPT's documentation gives for its run


def bench_speedrun(args, device):
    """From the start of Python to a trained and validated model: the first 90 % of a text train it, the rest
    validates it, all of it. Without --recipe: whole processes, timed from outside, in turns."""
    if args.recipe:
        return {"recipe": args.recipe, **run_recipe(args, *RECIPES[args.recipe])}
    turns = {"ours": [], "nanogpt": []} if args.baseline else {"ours": []}
    for _ in range(args.repeats):
        for recipe, results in turns.items():
            command = [sys.executable, "-m", "studies.bench", "speedrun", "--text", args.text,
                       "--recipe", recipe, "--device", args.device]
            start = time.perf_counter()
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            if child.returncode:
                raise InputError(f"{' '.join(command)}: ended with status {child.returncode}")
            result = json.loads(child.stdout.splitlines()[-1])
            results.append({**result, "wall_seconds": time.perf_counter() - start})
    seconds, losses = ({recipe: statistics.median(result[key] for result in results)
                        for recipe, results in turns.items()} for key in ("wall_seconds", "val_loss"))
    table([(recipe, results[0]["steps"], f"{results[0]['tokens']:,}", f"{losses[recipe]:.4f}",
            f"{seconds[recipe]:.1f}", f"{seconds[recipe] / seconds['nanogpt']:.3f}" if args.baseline else "–")
           for recipe, results in turns.items()],
          ("settings", "steps", "tokens", "val loss", "seconds", "of nanogpt's"))
    reached = losses["ours"] <= GOAL
    print(f"loss {GOAL}: {'reached' if reached else 'not reached'}")
    return {"reached": reached, "val_loss": losses, "wall_seconds": seconds, "runs": turns}


def run_recipe(args, model_settings, train_settings):
    import train  # here: the other benchmarks do not need it
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

        def make_loaders(model_config, start):
            return [DataLoader([f"{folder}/{name}.npy"], "pretrain", model_config.block_size, rows,
                               config.random_seed)
                    for name, rows in (("train", config.batch_size), ("val", 128))]

        setup = build_run(config, strategy, "pretrain", tokenizer, ModelConfig(**model_settings),
                          make_loaders, folder=None)
        loaders = setup.loader, setup.val_loader
        result = train.fit(setup.model, tokenizer, *loaders, config, strategy, setup.run)
        # What fit validates, at the start too, is a sample.
        val_loss = train.validation_loss(setup.model, setup.val_loader, strategy, config, tokenizer, math.inf)
    model = setup.model
    return {"steps": result["step"], "tokens": result["tokens"], "val_loss": val_loss,
            "parameters": model.n_params(), "seconds": round(time.perf_counter() - START, 2)}


def memory_of(work, device):
    """Peak memory in MB while `work()` runs: of the process on a CPU (Linux), of the allocator on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak counts from here
    except OSError:
        return 0
    work()
    return resident_megabytes("self")


WIDTHS, LENGTHS = (128, 256, 384, 512, 768, 1024), (64, 128, 256, 512, 1024, 2048)


def bench_growth(args, device):
    """How speed and memory grow with one quantity at a time, the others as in the arguments."""
    dtype, base, tokens = pick_dtype("bfloat16", device), vars(args.model), 2048
    native.wait("decode.c")  # decoding on a CPU takes it from the first token on

    def step(batch_size, **shape):
        model = ModelConfig(**{**base, **shape}).validate()
        return training_step(argparse.Namespace(model=model, batch_size=batch_size), device, dtype)

    def gigaflops(batch_size, **shape):
        work, model = step(batch_size, **shape)
        return medians(in_turns({0: work}, args, device))[0] * model.flops_per_token() / 1e9

    def decoding(length):
        """Tokens a second with `length` - 1 tokens before them: with the cache, and reading all again."""
        model = GPT(ModelConfig(**{**base, "block_size": length})).to(device).eval()
        idx = torch.randint(args.model.vocab_size, (1, length), device=device)
        cache = KVCache(model.config, 1, length, device)

        def cached():
            cache.n_tokens = length - 1
            return len(decode_one_token(model, idx[:, -1], cache))

        with torch.inference_mode():
            return medians(in_turns({"cached": cached,
                                     "uncached": lambda: len(model(idx, last_only=True)[0])}, args, device))

    result = {
        # First, and from small to large: what a process on a CPU has freed it may keep.
        "megabytes_by_batch": {n: memory_of(step(n)[0], device) for n in (1, 2, 4, 8, 16, 32)},
        "gflops_by_width": {n: gigaflops(8, n_embd=n, n_head=n // 64) for n in WIDTHS},
        "gflops_by_block": {n: gigaflops(tokens // n, block_size=n) for n in LENGTHS},
        "tokens_per_second_by_length": {n: decoding(n) for n in LENGTHS}}
    table([(f"width {n}", f"{r:,.0f}") for n, r in result["gflops_by_width"].items()],
          ("training, 8 rows", "GFLOPS"))
    table([(f"block {n}", f"{r:,.0f}") for n, r in result["gflops_by_block"].items()],
          (f"training, {tokens} tokens a step", "GFLOPS"))
    table([(f"batch {n}", f"{m:,.0f}") for n, m in result["megabytes_by_batch"].items()],
          ("training", "peak MB"))
    table([(f"token {n}", f"{r['cached']:,.0f}", f"{r['uncached']:,.1f}")
           for n, r in result["tokens_per_second_by_length"].items()],
          ("generation, tokens/s", "cached", "uncached"))
    plot_growth(result, args.plot)
    print(args.plot)
    return result


def plot_growth(result, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    decoding = result["tokens_per_second_by_length"]
    panels = (("training by width", "n_embd", "GFLOPS", {"": result["gflops_by_width"]}),
              ("training by block", "block_size", "GFLOPS", {"": result["gflops_by_block"]}),
              ("memory of a training step", "batch_size", "peak MB", {"": result["megabytes_by_batch"]}),
              ("generation by length", "tokens before", "tokens/s",
               {way: {n: rates[way] for n, rates in decoding.items()} for way in ("cached", "uncached")}))
    for axis, (title, x, y, lines) in zip(axes, panels, strict=True):
        for label, points in lines.items():
            axis.plot(list(points), list(points.values()), "o-", label=label)
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log")
        axis.set_xticks(list(points), map(str, points), rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[3].set_yscale("log")
    axes[3].legend()
    for axis in axes[:3]:
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def main(args):
    device = pick_device(args.device)
    benches = {"train": bench_train, "generate": bench_generate, "sdpa": bench_sdpa, "data": bench_data,
               "sft": bench_sft, "speedrun": bench_speedrun, "growth": bench_growth}
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}, "
          f"torch {torch.__version__}, numpy {np.__version__}")
    result = benches[args.what](args, device)
    threads = torch.get_num_threads()
    print(json.dumps({"bench": args.what, "device": str(device), "threads": threads, **result}))


if __name__ == "__main__":
    run_script(lambda: main(command_line()))
