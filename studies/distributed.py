"""What a second process costs and brings on this machine: the speed of DDP on the CPU.

    python -m studies.distributed speed          one process with 2 threads against two with 1 (DDP)

The runs take place in a copy of the scripts, in a folder that is removed. The last line on standard output is
one JSON object.
"""

import glob
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

import numpy as np

from config import ROOT
from flags import Parser
from metrics import parse_log
from script import InputError, print_json, run_script
from tokenizer import Tokenizer

ONE = [sys.executable, "train.py"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_ddp.py"]


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("what", choices=("speed",))
    cli.add_argument("--repeats", type=int, default=3, help="runs of each kind (default 3)")
    cli.add_argument("--steps", type=int, default=24, help="steps of a run (default 24)")
    args = cli.parse_args()
    if args.repeats < 1 or args.steps < 5:
        raise InputError("--repeats must be at least 1, --steps at least 5")
    return args


def copy_with_data(folder):
    """Put the scripts, and prepared text of random characters, into `folder`."""
    for path in glob.glob(os.path.join(ROOT, "*.py")) + glob.glob(os.path.join(ROOT, "*.json")):
        shutil.copy(path, folder)
    for path in glob.glob(os.path.join(ROOT, "*", "__init__.py")):
        package = os.path.dirname(path)
        shutil.copytree(package, os.path.join(folder, os.path.basename(package)))
    data = os.path.join(folder, "dataset")
    os.makedirs(data)
    tokenizer = Tokenizer.build(map(chr, range(0x4E00, 0x4E00 + 472)))
    tokenizer.save(os.path.join(data, "tokenizer.json"))
    ids = np.random.default_rng(0).integers(6, tokenizer.vocab_size, 200_000).astype(tokenizer.dtype)
    for part in ("train", "val"):
        np.save(os.path.join(data, f"pretrain_{part}.npy"), ids)


def tokens_per_second(words, folder, threads):
    """Run a training command in `folder`; returns the median speed of its steps, without the first three."""
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise InputError(f"{' '.join(words[1:])}: failed: {lines[-1] if lines else 'no message'}")
    log = max(glob.glob(os.path.join(folder, "train_*.log")), key=os.path.getmtime)
    steps = parse_log(log)[0]
    os.remove(log)
    return statistics.median(step["tokens/s"] for step in steps[3:])


def speed(args, folder):
    """Median tokens/s of the shipped configs with one and two processes and each optimizer, and the ratio."""
    result = {}
    print(f"{'':8}{'one process, 2 threads':>26}{'two processes, 1 thread':>26}{'ratio':>8}")
    for optimizer in ("adamw", "muon"):
        flags = ["--device", "cpu", "--optimizer", optimizer, "--max_steps", str(args.steps),
                 "--warmup_iters", "2", "--eval_interval", "1000", "--eval_iters", "1"]
        one = []
        two = []
        for _ in range(args.repeats):  # alternately, since other processes slow both down
            one.append(tokens_per_second([*ONE, *flags], folder, threads=2))
            two.append(tokens_per_second([*TWO, *flags], folder, threads=1))
        rates = {"one": statistics.median(one), "two": statistics.median(two)}
        ratio = rates["two"] / rates["one"]
        result[optimizer] = {**rates, "ratio": ratio}
        print(f"{optimizer:8}{rates['one']:17,.0f} tokens/s{rates['two']:17,.0f} tokens/s{ratio:8.2f}",
              flush=True)
    return result


def main():
    args = command_line()
    with tempfile.TemporaryDirectory() as folder:
        copy_with_data(folder)
        result = speed(args, folder)
    print_json({"bench": args.what, **result})


if __name__ == "__main__":
    run_script(main)
