"""Training on several processes and machines: the loop of train.py under DistributedDataParallel.

    CUDA_VISIBLE_DEVICES=0,1,2,3 OMP_NUM_THREADS=1 \\
        python -m torch.distributed.run --nproc_per_node 4 train_ddp.py
    OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc_per_node 2 train_ddp.py -t sft
    python -m torch.distributed.run --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d \\
        --rdzv_endpoint FIRST_MACHINE:29500 train_ddp.py      on each of two machines

Flags, settings, checkpoints and log are those of train.py; gradient_accumulation_steps and the order of the
data are for all processes together. Every machine reads dataset/ and the checkpoint to start from; only the
first process writes.
"""

import contextlib
import gc
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta

from flags import command_line
from script import InputError, before_imports, run_script

if __name__ == "__main__":
    before_imports(lambda: command_line(__doc__))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import device
import train
from strategy import SingleProcess


class DataParallel(SingleProcess):
    """Every process holds the whole model; gradients are averaged over them (Li et al. 2020)."""

    launch_command = "python -m torch.distributed.run --nproc_per_node 2 train_ddp.py"

    def __init__(self):
        try:
            self.rank = int(os.environ["RANK"])
            self.local_rank = int(os.environ["LOCAL_RANK"])
            self.world_size = int(os.environ["WORLD_SIZE"])
        except KeyError:
            raise InputError(f"start it with: {self.launch_command}") from None
        self.is_main = self.rank == 0

    def setup(self, config, widths=1):
        own = device.pick_device(config.device, self.local_rank)
        if own.type == "mps" or ":" in config.device:
            raise InputError(f'device "{config.device}" cannot be shared by processes; use cuda or cpu')
        backend = config.backend if own.type == "cuda" else "gloo"
        if not dist.is_backend_available(backend):
            raise InputError(f'backend "{backend}" is not in this torch; use nccl (CUDA) or gloo')
        if backend != config.backend:
            self.say(f"backend: {config.backend} needs CUDA, so gloo is used on this {own.type}")
        self.own_card = own if own.type == "cuda" else None
        timeout = timedelta(minutes=config.timeout_minutes)
        self.init_process_group(backend, timeout)
        # Counts and stop flags travel between the CPUs, so that they do not wait for the cards.
        self.control = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
        super().setup(config, widths)

    def init_process_group(self, backend, timeout):
        dist.init_process_group(backend, timeout=timeout, device_id=self.own_card)

    def broadcast(self, value):
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def wrap(self, model, optimizer):
        cards = [self.device.index] if self.device.type == "cuda" else None
        # torch 2.13 asks for forward_sync_buffers, a name that torch 2.12 does not know.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        self.ddp = DistributedDataParallel(super().wrap(model, optimizer), cards, broadcast_buffers=False,
                                           gradient_as_bucket_view=True)
        return self.ddp

    def micro_step(self, last):
        return contextlib.nullcontext() if last else self.ddp.no_sync()

    def read(self, loss, norm):
        values = torch.stack([loss.detach().float(), norm.float() / self.world_size])
        dist.all_reduce(values)
        return values.tolist()

    def all_reduce(self, *values):
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals, group=self.control)
        return [type(value)(total) for value, total in zip(values, totals.tolist(), strict=True)]

    def all_gather_rng(self):
        """The random states of all processes, in order; every process must call it."""
        rng = [None] * self.world_size
        dist.all_gather_object(rng, device.rng_state(self.device), group=self.control)
        return rng

    def state(self):
        return {**super().state(), "rng": self.all_gather_rng()}

    def close(self):
        """Leave the process group together. What holds its gradients must be gone first: gloo's threads
        abort at exit in a share of runs otherwise."""
        self.model = self.ddp = self.optimizer = self.scaler = None
        gc.collect()
        dist.barrier(group=self.control)
        dist.destroy_process_group()


def run_rank(main):
    """script.run_script for one process of several: an error that all of them meet is reported once, and they
    leave without Python's clean-up, in which gloo's threads abort in a share of runs."""
    status = 1
    try:
        run_script(lambda: report_once(main))
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def report_once(main):
    """Call `main`; a process that fails only because another did says so in a line and has status 1."""
    rank = int(os.environ.get("RANK", 0))
    try:
        return main()
    except InputError:
        if rank:
            time.sleep(3)  # most often the first process says the same, and the launcher then ends this one
        raise
    except RuntimeError as error:  # gloo has no class of its own for it
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        print(f"error: rank {rank}: another process has ended or does not answer ({reason})",
              file=sys.stderr)
        return 1


def main():
    return train.train_and_close(command_line(__doc__), DataParallel())


if __name__ == "__main__":
    run_rank(main)
