"""Does a run that is cut and continued give the same bits as one that is not? `train.py --verify_resume`."""

import os
import signal
import tempfile
from dataclasses import replace

import torch

import checkpoint as ckpt
from script import print_json
from strategy import SingleProcess


class CutAt(SingleProcess):
    """A process that gets Ctrl-C in the middle of step `cut`."""

    def __init__(self, cut):
        self.steps_left = cut

    def optimizer_step(self, lr, norm):
        self.steps_left -= 1
        if self.steps_left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().optimizer_step(lr, norm)


def differences(a, b, name):
    """Names of the values in which two checkpoints differ in a single bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True))
                for found in differences(*pair, f"{name}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [name]


def verify_resume(args, train, steps=6, cut=3):
    """Train `steps` steps; train again, cut after `cut`, and continue; compare all that was saved.

    train(args, strategy): train.py's. Works in a temporary folder. Returns the exit status, 1 if anything
    differs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # else CUDA sums in an order left to chance
    schedule_end = args.train.lr_decay_iters or args.train.max_steps
    args.train = replace(args.train, max_steps=steps, max_minutes=0.0, from_checkpoint="",
                         lr_decay_iters=schedule_end)
    args.train.dataset_path = [[os.path.join(args.root, path) for path in pair]
                               for pair in args.train.dataset_path]
    saved = []
    with tempfile.TemporaryDirectory() as folder:
        for name, strategy, start in (("whole", SingleProcess(), ""), ("cut", CutAt(cut), ""),
                                      ("cut", SingleProcess(), f"{args.task}_last.pt")):
            args.root = os.path.join(folder, name)
            checkpoints = os.path.join(args.root, "checkpoint")
            os.makedirs(checkpoints, exist_ok=True)
            args.train.from_checkpoint = start and os.path.join(checkpoints, start)
            train(args, strategy)
            saved.append(ckpt.load(os.path.join(checkpoints, f"{args.task}_last.pt")))
    whole, _, continued = saved
    whole["train_config"] = continued["train_config"]  # their paths of from_checkpoint differ
    for name in ("stamp", "seconds"):  # when the runs took place, and how fast
        whole["dataloader"][name] = continued["dataloader"][name]
    found = differences(whole, continued, "checkpoint")
    print(f"{steps} steps, and {cut} + {steps - cut}: " + (
        f"different in {len(found)} values, {', '.join(found[:5])}" if found else
        "the same weights, optimizer, data position, random state and losses, bit for bit"))
    print_json({"steps": steps, "cut_after": cut, "identical": not found, "different": found})
    return 1 if found else 0
