"""How the benchmarks measure: rates of several ways to do one thing, alternately or one after another.

Letters: B rows in a batch, T tokens in a row.
"""

import gc
import statistics
import time

import numpy as np
import torch
from tqdm import tqdm


def rate(work, seconds, device):
    """Units per second of `work()`, which returns the number of units it did; measured for `seconds` or more.

    On CUDA a burst of calls is queued between two synchronisations, as many as take half a second."""
    calls = 1
    done = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(calls):
            done += work()
        if device.type == "cuda":
            torch.cuda.synchronize()
            if time.perf_counter() - start - elapsed < 0.25:
                calls = min(2 * calls, 20)
    return done / elapsed


def warm_up(work, device):
    for _ in range(3 if device.type == "cuda" else 1):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(ways, args, device):
    """The rate of each of the `ways` {name: build}, `repeats` times: a list of {name: rate}.

    build(): sets a way up and returns the `work` of `rate`. A progress bar shows the time left, on a terminal
    only."""
    rounds = [{} for _ in range(args.repeats)]
    with tqdm(total=len(ways) * (1 + args.repeats), unit="measurement", leave=False, dynamic_ncols=True,
              disable=None) as bar:
        def warmed_up(name):
            bar.set_description(f"{name}, warm-up")
            work = ways[name]()
            warm_up(work, device)
            bar.update()
            return work

        def measured(name, work):
            bar.set_description(name)
            result = rate(work, args.seconds, device)
            bar.update()
            return result

        if device.type != "cuda":
            works = {name: warmed_up(name) for name in ways}
            for rates in rounds:
                for name, work in works.items():
                    rates[name] = measured(name, work)
            return rounds
        for name in ways:
            work = warmed_up(name)
            for rates in rounds:
                rates[name] = measured(name, work)
            del work
            free_memory()
    return rounds


def free_memory():
    """Give the memory of a CUDA model that is no longer used back, compiled code included."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def medians(rounds, against=None):
    """The median of each way's rate, or of its ratio to the rate of the way `against` in the same round."""
    return {name: statistics.median(rates[name] / (rates[against] if against else 1) for rates in rounds)
            for name in rounds[0]}


def tensors(batch, device):
    """A loader's batch, numpy arrays, on the device."""
    return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in batch]


def table(rows, columns):
    print("".join(f"{c:>16}" if i else f"{c:34}" for i, c in enumerate(columns)))
    for row in rows:
        print("".join(f"{c:>16}" if i else f"{c:34}" for i, c in enumerate(row)))


def random_batches(args, device):
    """A function that returns inputs and targets (B, T), random ids, the same at every call."""
    shape = (args.batch_size, args.model.block_size + 1)
    tokens = torch.randint(args.model.vocab_size, shape, device=device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return lambda: batch


def training_step(model, optimizer, dtype, next_batch):
    """A function that takes one training step on next_batch(), tensors (B, T), and returns how many tokens
    it read."""
    def step():
        x, y = next_batch()
        with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return x.numel()
    return step
