"""What several processes cost on this machine: speed, memory and traffic. Two processes, on the CPU.

    python -m studies.distributed speed          one process with 2 threads against two with 1 (DDP)
    python -m studies.distributed memory         memory a process, bytes exchanged a step: DDP, ZeRO 0 to 3

The runs take place in a copy of the scripts, in a folder that is removed. The last line on standard output is
one JSON object.
"""

import ctypes
import gc
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

import numpy as np

from config import ROOT, InputError, Parser, run_script
from metrics import parse_log
from tokenizer import Tokenizer

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SMALL_BUCKETS = {name: 5_000_000 for name in ("reduce_bucket_size", "stage3_prefetch_bucket_size",
                                              "stage3_max_live_parameters")}
WAYS = {"DDP": None, "stage 0": {"stage": 0}, "stage 1": {"stage": 1}, "stage 2": {"stage": 2},
        "stage 3": {"stage": 3}, "stage 3, small buckets": {"stage": 3, **SMALL_BUCKETS}}
SHAPE = ("--device cpu --n_layer 16 --n_embd 512 --n_head 8 --block_size 64 --batch_size 1 "  # 50 M
         "--gradient_accumulation_steps 4 --max_steps 3 --decay_lr false --optimizer adamw "
         "--eval_interval 100 --eval_iters 1").split()


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("what", choices=("speed", "memory"))
    cli.add_argument("--repeats", type=int, default=3, help="runs of each kind for `speed` (default 3)")
    cli.add_argument("--steps", type=int, default=24, help="steps of a run for `speed` (default 24)")
    args = cli.parse_args()
    if args.repeats < 1 or args.steps < 4:
        raise InputError("--repeats must be at least 1, --steps at least 4")
    return args


def copy_with_data(folder):
    """The scripts, and prepared text of random characters, in `folder`."""
    for path in glob.glob(os.path.join(ROOT, "*.py")) + glob.glob(os.path.join(ROOT, "*.json")):
        shutil.copy(path, folder)
    for name in ("cpu", "studies"):
        shutil.copytree(os.path.join(ROOT, name), os.path.join(folder, name))
    data = os.path.join(folder, "dataset")
    os.makedirs(data)
    tokenizer = Tokenizer.build(map(chr, range(0x4E00, 0x4E00 + 472)))
    tokenizer.save(os.path.join(data, "tokenizer.json"))
    ids = np.random.default_rng(0).integers(6, tokenizer.vocab_size, 200_000).astype(tokenizer.dtype)
    for side in ("train", "val"):
        np.save(os.path.join(data, f"pretrain_{side}.npy"), ids)


def call(words, folder, threads):
    """Run a command in `folder`; returns its standard output."""
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if result.returncode:
        raise InputError(f"{' '.join(words[1:])}: failed: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout


def speed(args, folder):
    """Median tokens/s of the shipped configs, each way and with each optimizer, and their ratio."""
    result = {}
    print(f"{'':8}{'one process, 2 threads':>26}{'two processes, 1 thread':>26}{'ratio':>8}")
    for optimizer in ("adamw", "muon"):
        flags = ["--device", "cpu", "--optimizer", optimizer, "--max_steps", str(args.steps),
                 "--warmup_iters", "2", "--eval_interval", "1000", "--eval_iters", "1"]
        rates = {"one": [], "two": []}
        for _ in range(args.repeats):
            for name, words, threads in (("one", [sys.executable, "train.py"], 2),
                                         ("two", [*LAUNCH, "train_ddp.py"], 1)):
                call([*words, *flags], folder, threads)
                log = max(glob.glob(os.path.join(folder, "train_*.log")), key=os.path.getmtime)
                rates[name].append(statistics.median(line["tokens/s"] for line in parse_log(log)[0][3:]))
                os.remove(log)
        one, two = (statistics.median(rates[name]) for name in ("one", "two"))
        result[optimizer] = {"one": one, "two": two, "ratio": two / one}
        print(f"{optimizer:8}{one:18,.0f} tokens/s{two:17,.0f} tokens/s{two / one:8.2f}")
    return result


def memory(args, folder):
    """Growth of a process's resident memory, and bytes handed to collectives, a parameter."""
    result = {}
    for name, zero in WAYS.items():
        words = [*LAUNCH, "-m", "studies.distributed", "--process", json.dumps(zero), *SHAPE]
        result[name] = json.loads(call(words, folder, 1).splitlines()[-1])
        sent = ", ".join(f"{b:.1f} {what}" for what, b in result[name]["bytes_sent_a_parameter"].items())
        print(f"{name:24}{result[name]['megabytes']:7.0f} MB{result[name]['bytes_a_parameter']:7.1f} bytes "
              f"a parameter; sent a step: {sent}", flush=True)
    return result


def resident_bytes():
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed but not given back is not counted
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmRSS"))


def n_bytes(value):
    """Bytes of the tensors in an argument."""
    if isinstance(value, (list, tuple)):
        return sum(map(n_bytes, value))
    return value.numel() * value.element_size() if hasattr(value, "element_size") else 0


def one_process(zero):
    """One of the two processes of `memory`: trains three steps, counts in the second, measures at the end."""
    sent, counting, inside = {}, [False], []

    def count(what, size):
        if counting[0] and size > 4096:  # not the loop's own sums of a few numbers
            sent[what] = sent.get(what, 0) + size

    def counted(backend, name):
        """Replace a collective by itself with a count of the largest thing that it is given: the whole."""
        call_it = getattr(backend, name)

        def collective(*args, **kwargs):
            if not inside:  # one may be built on another
                count(name, max(map(n_bytes, [*args, *kwargs.values()]), default=0))
            inside.append(name)
            try:
                return call_it(*args, **kwargs)
            finally:
                inside.pop()
        setattr(backend, name, collective)

    import torch.distributed as dist

    import train
    import train_ddp
    import train_deepspeed

    class Measured(train_ddp.DataParallel if zero is None else train_deepspeed.Zero):
        steps = 0

        def setup(self, config):
            super().setup(config)
            if zero is not None:
                from deepspeed.comm import comm
                for name in ("all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "all_gather",
                             "all_gather_coalesced", "all_gather_into_tensor", "reduce_scatter",
                             "reduce_scatter_tensor"):
                    counted(comm.cdb, name)
            self.before = resident_bytes()

        def wrap(self, model, optimizer):
            self.n_params = model.n_params()
            wrapped = super().wrap(model, optimizer)
            if zero is None:
                def hook(state, bucket):
                    count("all_reduce", bucket.buffer().nbytes)
                    return allreduce_hook(state, bucket)
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
                self.ddp.register_comm_hook(None, hook)
            return wrapped

        def step(self, lr):
            norm = super().step(lr)
            self.steps += 1
            counting[0] = self.steps == 1
            if self.steps == 3:
                self.grown = resident_bytes() - self.before
            return norm

        def save(self, *_):
            pass  # nothing to keep

    args = train.command_line(__doc__)
    strategy = Measured() if zero is None else Measured(
        {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}, "WAYS")
    train.train(args, strategy)
    dist.barrier()
    if strategy.is_main:
        print(json.dumps({"megabytes": strategy.grown / 1e6, "parameters": strategy.n_params,
                          "bytes_a_parameter": strategy.grown / strategy.n_params,
                          "bytes_sent_a_parameter": {k: v / strategy.n_params for k, v in sent.items()}}),
              flush=True)
    os._exit(0)


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        copy_with_data(folder)
        result = {"speed": speed, "memory": memory}[args.what](args, folder)
    print(json.dumps({"bench": args.what, **result}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        ZERO = json.loads(sys.argv[2])
        del sys.argv[1:3]
        one_process(ZERO)
    else:
        run_script(lambda: main(command_line()))
