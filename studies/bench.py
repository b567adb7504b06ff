"""Timings of training, generation, attention kernels and data preparation on this machine.

    python -m studies.bench train        tokens/s and TFLOPS of each way to train, beside plain float32
    python -m studies.bench train --n_layer 12 --n_head 12 --n_embd 768 --block_size 1024 \\
        --vocab_size 50304 --batch_size 16 --nanogpt ../nanoGPT      and of nanoGPT itself, in a clone of it
    python -m studies.bench train --ways "float32 AdamW" "float32 Muon"      only these
    python -m studies.bench generate     tokens/s with and without the KV cache, and time to the first token
    python -m studies.bench sdpa         the attention kernels, relative time and memory
    python -m studies.bench data --megabytes 500       data.py from file to file, its peak memory
    python -m studies.bench sft --rows dataset/sft_train.npy     trimmed batches beside full padding
    python -m studies.bench speedrun --text input.txt            seconds to loss 1.886 on tinyshakespeare
    python -m studies.bench speedrun --text input.txt --baseline      and with nanoGPT's settings

On a CPU the ways are timed alternately, several times, because other processes slow all of them down; on
CUDA one after another, each model freed before the next. The table shows medians. Compare ratios within one
run. The last line on standard output is one JSON object.
"""

import time

START = time.perf_counter()  # `speedrun` counts the imports too

import copy
import itertools
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace

from config import IGNORE_INDEX, ROOT, ModelConfig, TrainConfig
from flags import Parser
from script import InputError, before_imports, print_json, run_script

SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65}


def command_line(words=None):
    cli = Parser(__doc__)
    cli.add_argument("what", choices=("train", "generate", "sdpa", "data", "sft", "speedrun"))
    cli.add_argument("--batch_size", type=int, default=16)
    cli.add_argument("--ways", nargs="+", metavar="NAME", help="for `train`: the rows of the table to time")
    cli.add_argument("--nanogpt", metavar="DIR", help="for `train`: a clone of nanoGPT, to time beside ours")
    cli.add_argument("--rows", default=os.path.join(ROOT, "dataset", "sft_train.npy"), metavar="FILE",
                     help="for `sft`: instruction data from data.py (default dataset/sft_train.npy)")
    cli.add_argument("--text", metavar="FILE", help="for `speedrun`: tinyshakespeare's input.txt")
    cli.add_argument("--baseline", action="store_true",
                     help="for `speedrun`: time nanoGPT's settings too, alternately")
    cli.add_argument("--recipe", choices=("ours", "nanogpt"), help="one `speedrun`, in this process")
    cli.add_argument("--random_seed", type=int, default=1337, help="seed of a --recipe")
    cli.add_argument("--repeats", type=int, default=3, help="measurements of each way (default 3)")
    cli.add_argument("--seconds", type=float, default=0.0,
                     help="shortest measurement (default 4; on CUDA 1)")
    cli.add_argument("--megabytes", type=int, default=200, help="for `data`: size of the text (default 200)")
    cli.add_argument("--device", default="auto")
    cli.add_config(ModelConfig, defaults=SMALL)
    args = cli.parse_args(words)
    if min(args.batch_size, args.repeats, args.megabytes) < 1 or args.seconds < 0:
        raise InputError("--batch_size, --repeats and --megabytes must be above 0, --seconds not below it")
    if args.what == "speedrun" and not args.text:
        raise InputError("speedrun needs --text FILE, tinyshakespeare's input.txt")
    if args.what == "speedrun" and not os.path.isfile(args.text):
        raise InputError(f"--text {args.text}: no such file")
    if args.what == "sft" and not os.path.isfile(args.rows):
        raise InputError(f"--rows {args.rows}: no such file; run python data.py first")
    if args.nanogpt and not os.path.isfile(os.path.join(args.nanogpt, "model.py")):
        raise InputError(f"--nanogpt {args.nanogpt}: has no model.py; git clone "
                         "https://github.com/karpathy/nanoGPT and name that folder")
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
from cpu.int8 import quantize
from dataloader import DataLoader
from device import has_fast_bfloat16, pick_device, pick_dtype, setup_device
from generate import generate, prefill
from generate_gpu import use_half_precision
from model import GPT, KVCache
from studies.speedrun import bench_speedrun
from studies.timing import measure, medians, table, tensors
from studies.train_speed import bench_train, our_step
from tokenizer import Tokenizer


def bench_generate(args, device):
    model = GPT(args.model).to(device).eval()
    length = args.model.block_size
    prompt = torch.randint(args.model.vocab_size, (32, 8), device=device)

    @torch.inference_mode()
    def uncached():
        idx = prompt[:1]
        n = min(64, length - 8)
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

    first = "no cache, 1 sequence"
    ways = {first: lambda: uncached, "prefill": lambda: whole_prompt}
    half = use_half_precision(copy.deepcopy(model))
    compiled = device.type == "cpu" and native.wait("decode.c")
    if compiled:
        small = copy.deepcopy(model)
        quantize(small)
    for rows in (1, 32):
        sequences = f"{rows} sequence{'s' if rows > 1 else ''}"
        ways[f"KV cache, PyTorch, {sequences}"] = lambda rows=rows: lambda: cached_in_pytorch(rows)
        if device.type == "cuda":
            kind = str(half.lm_head.weight.dtype).removeprefix("torch.")
            ways[f"KV cache, graph, {kind}, {sequences}"] = lambda rows=rows: lambda: cached(rows, half)
        if compiled:
            ways[f"KV cache, decode.c, {sequences}"] = lambda rows=rows: lambda: cached(rows)
            ways[f"KV cache, decode.c, int8, {sequences}"] = lambda rows=rows: lambda: cached(rows, small)
    rounds = measure(ways, args, device)
    rates = medians(rounds)
    ratios = medians(rounds, first)
    table([(name, f"{r:,.0f}", f"{ratios[name]:.1f}") for name, r in rates.items()],
          ("way to generate", "tokens/s", "against first"))
    seconds = seconds_to_first_token(model, args)
    print(f"from the start of inference.py to its first token: {seconds:.2f} s")
    return {"parameters": model.n_params(), "tokens_per_second": rates, "against_first": ratios,
            "seconds_to_first_token": seconds}


def seconds_to_first_token(model, args):
    """Seconds from starting inference.py to its first token, the median of `repeats` processes."""
    tokenizer = Tokenizer.build([chr(0x4E00 + i) for i in range(model.config.vocab_size)])
    config = replace(model.config, vocab_size=tokenizer.vocab_size)
    content = {"format": ckpt.FORMAT, "task": "pretrain", "step": 0, "best_val_loss": 0.0, "optimizer": None,
               "scaler": None, "rng": [], "dataloader": {}, "model": GPT(config).state_dict(),
               "model_config": asdict(config), "train_config": asdict(TrainConfig()),
               "tokenizer_config": tokenizer.to_dict()}
    times = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pt")
        ckpt.save(path, content)
        for _ in range(args.repeats):
            start = time.perf_counter()
            subprocess.run([sys.executable, "inference.py", "-m", path, "-p", "一", "-l", "2"], cwd=ROOT,
                           stdout=subprocess.DEVNULL, check=True)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(work, device):
    """The most bytes that tensors made by `work()` hold at a time (0 where torch does not count them)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it announces its start on standard error
    with torch.profiler.profile(profile_memory=True) as profiler:
        work()
    # The public tables show what an operation leaves behind, not what it uses meanwhile.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
           "mem_efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def bench_sdpa(args, device):
    """Forward and backward pass of scaled_dot_product_attention alone, in the type that training uses."""
    c = args.model
    dtype = pick_dtype("bfloat16", device, has_fast_bfloat16(device))
    shape = (args.batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def attention(kernel):
        def work():
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
            return 1
        return work

    ways = {}
    memory = {}
    for name, kernel in KERNELS.items():
        try:
            attention(kernel)()
        except RuntimeError:  # no kernel for this device, type or shape
            continue
        ways[name] = lambda kernel=kernel: attention(kernel)
        memory[name] = peak_bytes(attention(kernel), device)
    rounds = measure(ways, args, device)
    rates = medians(rounds)
    ratios = medians(rounds, "math")
    rows = []
    for name in KERNELS:
        if name not in rates:
            rows.append((name, "not here", "", ""))
            continue
        share = f"{memory[name] / memory['math']:.2f}" if memory["math"] else "–"
        rows.append((name, f"{1e3 / rates[name]:.3f}", f"{1 / ratios[name]:.2f}", share))
    table(rows, (f"kernel, {str(dtype).removeprefix('torch.')}", "ms", "relative time", "relative memory"))
    return {"milliseconds": {name: 1e3 / r for name, r in rates.items()},
            "relative_time": {name: 1 / ratio for name, ratio in ratios.items()}, "memory_bytes": memory}


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
    def encode():
        tokenizer.encode(text)
        return size

    def decode():
        tokenizer.decode(ids)
        return size

    torch.set_num_threads(1)
    rates = medians(measure({"encode": lambda: encode, "decode": lambda: decode}, args, device))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "text.txt")
        with open(path, "w", encoding="utf-8") as f:
            while f.tell() < args.megabytes * 1e6:
                f.write("".join(f"<|bos|>{line}<|eos|>\n" for line in rng.sample(lines, 500)))
        megabytes = os.path.getsize(path) / 1e6
        times = []
        peak = 0
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
    block_size = args.model.block_size
    dtype = pick_dtype("bfloat16", device, has_fast_bfloat16(device))
    loader = DataLoader([args.rows], "sft", block_size, args.batch_size)
    loader.require_full_batches()
    args.model.vocab_size = int(loader.sources[0].data[:, 0].max()) + 1
    widths = []

    def pad(batch):
        width = ((0, 0), (0, block_size - batch[0].shape[1]))
        return [np.pad(array, width, constant_values=fill)
                for array, fill in zip(batch, (0, IGNORE_INDEX), strict=True)]

    def trimmed():
        batch = loader.next_batch()
        widths.append(batch[0].shape[1])
        return tensors(batch, device)

    def padded():
        return tensors(pad(loader.next_batch()), device)

    model = our_step(args, device, dtype)[1].eval()
    losses = {"trimmed": [], "padded": []}
    with torch.inference_mode():
        for batch in loader.fixed_batches(4):
            for way, arrays in (("trimmed", batch), ("padded", pad(batch))):
                losses[way].append(float(model(*tensors(arrays, device))[1]))

    def pairs(next_batch):
        step, _ = our_step(args, device, dtype, next_batch=next_batch)

        def work():
            step()
            return args.batch_size
        return work

    rounds = measure({"trimmed": lambda: pairs(trimmed), "padded": lambda: pairs(padded)}, args, device)
    rates = medians(rounds)
    ratios = medians(rounds, "padded")
    table([(way, f"{r:,.1f}", f"{ratios[way]:.2f}", f"{statistics.mean(losses[way]):.6f}")
           for way, r in rates.items()], ("batches", "pairs/s", "against padded", "loss at first"))
    print(f"a trimmed row has {statistics.mean(widths):.0f} tokens, a padded one {block_size}")
    return {"pairs_per_second": rates, "ratio": ratios["trimmed"], "losses": losses,
            "mean_width": statistics.mean(widths)}


def main(args):
    device = pick_device(args.device)
    setup_device(device)
    args.seconds = args.seconds or (1.0 if device.type == "cuda" else 4.0)
    benches = {"train": bench_train, "generate": bench_generate, "sdpa": bench_sdpa, "data": bench_data,
               "sft": bench_sft, "speedrun": lambda args, device: bench_speedrun(args, START)}
    machine = f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    print(f"{device}: {machine}, torch {torch.__version__}, numpy {np.__version__}")
    result = benches[args.what](args, device)
    print_json({"bench": args.what, "device": str(device), "machine": machine, "torch": torch.__version__,
                "threads": torch.get_num_threads(), **result})


if __name__ == "__main__":
    run_script(lambda: main(command_line()))
