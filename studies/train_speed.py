"""The speed of training: `python -m studies.bench train` (see studies/bench.py)."""

import contextlib
import importlib.util
import io
import os
import sys
import tempfile

import numpy as np
import torch

from config import TrainConfig
from dataloader import DataLoader
from device import compile_model, has_fast_bfloat16, pick_dtype
from model import GPT
from optimizer import build_optimizer
from script import InputError
from studies.timing import measure, medians, random_batches, rate, table, tensors, training_step


def our_step(args, device, dtype, optimizer="adamw", compile=False, next_batch=None):
    """A training step of this project, and its model. next_batch: default: random tokens."""
    torch.manual_seed(0)
    model = GPT(args.model).to(device)
    optimizers = build_optimizer(model, TrainConfig(optimizer=optimizer), has_fast_bfloat16(device))
    trained = compile_model(model, device, one_pass=True) if compile else model
    return training_step(trained, optimizers, dtype, next_batch or random_batches(args, device)), model


def nanogpt_step(args, device, dtype, compile=False):
    """The same with nanoGPT's own model and optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(args.nanogpt, "model.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    c = args.model
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd,
                                            dropout=c.dropout, bias=c.bias)).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    if compile:
        model = torch.compile(model)
    return training_step(model, optimizer, dtype, random_batches(args, device)), model


def matrix_product(device, dtype, size):
    """A function that multiplies two `size`² matrices and returns the number of floating-point operations."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)

    def product():
        torch.mm(a, b)
        return 2 * size**3
    return product


def ways_to_train(args, device, types):
    """{name: build} of all rows of the table. types: {name: torch.dtype}."""
    ways = {}
    for name, dtype in types.items():
        for optimizer in ("AdamW", "Muon"):
            def ours(compile, dtype=dtype, optimizer=optimizer):
                return our_step(args, device, dtype, optimizer.lower(), compile)[0]
            ways[f"{name} {optimizer}"] = lambda ours=ours: ours(False)
            ways[f"{name} {optimizer} compiled"] = lambda ours=ours: ours(True)
    if args.nanogpt:  # in the last type, the fastest
        ways[f"{name} nanoGPT"] = lambda: nanogpt_step(args, device, dtype, False)[0]
        ways[f"{name} nanoGPT compiled"] = lambda: nanogpt_step(args, device, dtype, True)[0]
    return ways


def runs_by_default(way, best, on_cuda):
    """Compiling takes half a minute on CUDA, so only the best type is compiled there, with one optimizer."""
    if way.endswith("Muon compiled"):
        return False
    return not on_cuda or way.startswith(best) or way.endswith("AdamW")


def bench_train(args, device):
    best = pick_dtype("bfloat16", device, has_fast_bfloat16(device))
    on_cuda = device.type == "cuda"
    float32 = "TF32" if on_cuda and torch.backends.cuda.matmul.allow_tf32 else "float32"
    types = {float32: torch.float32}
    if best is not torch.float32:
        types[str(best).removeprefix("torch.")] = best
    ways = ways_to_train(args, device, types)
    for way in args.ways or ():
        if way not in ways:
            raise InputError(f"--ways {way!r}: there are {', '.join(map(repr, ways))}")
    chosen = [way for way in ways
              if (way in args.ways if args.ways else runs_by_default(way, list(types)[-1], on_cuda))]
    size = 8192 if on_cuda else 1024  # large enough to reach the device's best rate
    products = {name: f"{name} {size}² matrix product" for name in types
                if any(way.startswith(name) for way in chosen)}
    selected = {products[name]: lambda d=types[name]: matrix_product(device, d, size) for name in products}
    selected |= {way: ways[way] for way in chosen}
    rounds = measure(selected, args, device)

    with torch.device("meta"):
        model = GPT(args.model)
    flops = model.flops_per_token()
    rates = medians(rounds)
    ratios = medians(rounds, chosen[0])
    peak = {name: rates.pop(product) for name, product in products.items()}
    shares = {way: flops * medians(rounds, products[way.split()[0]])[way] for way in chosen}
    table([(way, f"{rates[way]:,.0f}", f"{rates[way] * flops / 1e12:.3f}", f"{ratios[way]:.2f}",
            f"{shares[way]:.0%}") for way in chosen],
          ("way to train", "tokens/s", "TFLOPS", "against first", "of matmul rate"))
    print(", ".join(f"a {size}² matrix product in {name}: {p / 1e12:.3f} TFLOPS" for name, p in peak.items()))
    waiting = seconds_to_load(args, device) * max(rates.values()) / (args.batch_size * args.model.block_size)
    print(f"reading a batch takes {waiting:.2%} of a step of the fastest way")
    result = {"parameters": model.n_params(), "tokens_per_second": rates, "waiting_share": waiting,
              "tflops": {way: rate * flops / 1e12 for way, rate in rates.items()},
              "against_first": {way: ratios[way] for way in chosen}, "share_of_matmul_rate": shares,
              "matmul_tflops": {name: p / 1e12 for name, p in peak.items()}}
    if args.nanogpt:
        result["against_nanogpt"] = against_nanogpt(rounds, chosen)
    return result


def against_nanogpt(rounds, chosen):
    """{way: ratio to nanoGPT's rate}, compiled against compiled and eager against eager; printed too."""
    result = {}
    for theirs in (way for way in chosen if "nanoGPT" in way):
        ratios = medians(rounds, theirs)
        compiled = theirs.endswith("compiled")
        for way in chosen:
            if "nanoGPT" not in way and way.endswith("compiled") == compiled \
                    and way.split()[0] == theirs.split()[0]:
                result[way] = ratios[way]
                print(f"{way}: {ratios[way]:.2f} times {theirs}")
    return result


def seconds_to_load(args, device):
    """Seconds to read one batch from a prepared file and copy it to the device."""
    with tempfile.TemporaryDirectory() as folder:
        length = max(4_000_000, 2 * args.batch_size * args.model.block_size)
        np.save(f"{folder}/x.npy", np.zeros(length, np.uint16))
        loader = DataLoader([f"{folder}/x.npy"], "pretrain", args.model.block_size, args.batch_size)
        return 1 / rate(lambda: len([tensors(loader.next_batch(), device)]), args.seconds / 4, device)
