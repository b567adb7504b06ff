"""How one process trains, and how the micro-batches of a step reach its device.

`SingleProcess` is what the loop of train.py calls for everything that differs between one process, DDP
(train_ddp.py) and DeepSpeed (train_deepspeed.py). Letters in shapes: B rows in a batch, T tokens in a row.
"""

import contextlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

import checkpoint as ckpt
from config import IGNORE_INDEX, TrainConfig
from device import (
    can_compile,
    compile_model,
    has_fast_bfloat16,
    pick_device,
    pick_dtype,
    rng_state,
    set_rng_state,
    set_sdp_kernel,
    setup_device,
)
from gpu import usable_kernels
from script import InputError

WIDTHS = 8  # different widths of batches, at most; each is compiled on its own
# A width takes 20 s or more to compile, which shorter runs do not earn back (docs/log.md).
COMPILED_STEPS = 1000
COMPILED_MINUTES = 2.0
FOLDED_TOKENS = 65536  # at most so many in one pass on CUDA; more gain nothing there and take memory


class SingleProcess:
    """How one process trains. DDP and DeepSpeed differ from it in these methods and attributes alone."""

    rank = 0
    local_rank = 0
    world_size = 1
    is_main = True
    saved_as = "checkpoint/{}.pt"

    def setup(self, config: TrainConfig, widths=1):
        """Prepare the device. widths: how many different widths the batches may have, 1 or WIDTHS.

        Raises InputError for a device that is missing."""
        self.config = config
        self.device = pick_device(config.device, self.local_rank)
        setup_device(self.device)
        # Measured, so the processes of one run could differ: they follow the first.
        self.fast_bfloat16 = self.broadcast(has_fast_bfloat16(self.device))
        self.dtype = pick_dtype(config.dtype, self.device, self.fast_bfloat16, self.say)
        set_sdp_kernel(config.sdp_kernel)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        is_long = (config.max_steps or math.inf) >= widths * COMPILED_STEPS and \
            (config.max_minutes or math.inf) >= widths * COMPILED_MINUTES
        self.compiles = config.compile == "true" or (
            config.compile == "auto" and is_long and can_compile(self.device)
            and usable_kernels(self.device) is not None)

    @property
    def accumulation(self):
        """Number of micro-batches that this process reads in a step."""
        return self.config.gradient_accumulation_steps // self.world_size

    def say(self, text):
        if self.is_main:
            tqdm.write(text)

    def broadcast(self, value):
        """The first process's value."""
        return value

    def wrap(self, model, optimizer):
        """Take the model (already on the device) and its optimizer; return what training calls.

        The model itself stays uncompiled: validation and generation meet many shapes."""
        self.model = model
        self.optimizer = optimizer
        self.fold = 1  # micro-batches in a pass
        if self.device.type == "cuda" and self.world_size == 1:
            # A GPU needs large passes to be busy; a CPU is fastest where a pass fits into its caches. Several
            # processes could not agree on smaller passes when one runs out of memory.
            most = FOLDED_TOKENS // (self.config.batch_size * model.config.block_size)
            self.fold = max(n for n in range(1, self.accumulation + 1)
                            if self.accumulation % n == 0 and n <= max(1, most))
        return self.compiled()

    def compiled(self):
        """The model as training calls it, compiled where that pays, for the number of passes in a step."""
        if not self.compiles:
            return self.model
        # A CUDA graph uses the same memory each time: a second pass would overwrite the first.
        one_pass = self.fold == self.accumulation and self.world_size == 1 and not self.config.document_mask
        return compile_model(self.model, self.device, one_pass)

    def validated(self, trained):
        """The model that validation calls, given what `wrap` returned."""
        return self.model

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def to_device(self, batch):
        """A numpy array (B, T) as an int64 tensor on the device; CUDA does not wait for the copy."""
        tensor = torch.from_numpy(np.ascontiguousarray(batch))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def micro_step(self, last):
        """A context for the forward and backward pass of one micro-step; only in the `last` one of a step do
        processes have to exchange gradients."""
        return contextlib.nullcontext()

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def clip_gradients(self):
        """Scale the gradients down to norm grad_clip. Returns their norm before, a tensor, not read yet."""
        for optimizer in self.optimizer.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.config.grad_clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def read(self, loss, norm):
        """Two scalar tensors as floats: the one read of device values in a step, which waits for the device.
        The loss is summed over all processes; the norm is the same on each."""
        return torch.stack([loss.detach().float(), norm.float()]).tolist()

    def optimizer_step(self, lr, norm):
        """Step and clear the gradients, unless their `norm` is not finite. Returns the norm.

        Under float16 an overflow only means that the loss scale is too high: the scaler lowers it, norm 0."""
        self.optimizer.set_lr(lr)
        if math.isfinite(norm):
            self.optimizer.step()  # scaler.step() would ask the device again whether they are
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm if math.isfinite(norm) or not self.scaler.is_enabled() else 0.0

    def skip_step(self):
        """Clear the gradients of a loss that is not finite. Returns NaN in place of their norm."""
        self.scaler.update()
        self.model.zero_grad()
        return math.nan

    def all_reduce(self, *values):
        """The sums of some numbers over all processes; for booleans, whether any is true."""
        return values

    def state(self):
        """What a checkpoint needs of model, optimizer and random state."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "rng": [rng_state(self.device)]}

    def load(self, state):
        """Undo `state`, except for the model's weights, which are loaded before it is wrapped."""
        if state["optimizer"] is None:
            raise InputError(f"{self.config.from_checkpoint}: was written by DeepSpeed, and only "
                             "train_deepspeed.py can continue its optimizer's state")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == self.world_size:
            set_rng_state(state["rng"][self.rank], self.device)
        else:  # another number of processes: dropout cannot continue as it was
            torch.manual_seed(self.config.random_seed + 1000 * self.rank + 1)

    def save(self, run, kind, content):
        """Write a checkpoint of `kind` ("best", "last", "step_<n>"): the loop's `content`, and `state`."""
        state = self.state()
        if run.writes:
            ckpt.save(run.path(kind), {**content, **state})
            if run.fixed_name(kind):
                ckpt.alias(run.path(kind), run.fixed_name(kind))

    def close(self):
        pass


@dataclass
class StepData:
    """The micro-batches of one step on the device, folded into as many passes as the strategy asks for."""

    passes: list  # of pairs (x, y), int64 tensors (B, T)
    n_loss_tokens: list  # tokens with a loss in each of them
    n_tokens: int  # tokens in all of them, padding included
    position: dict  # loader.state_dict() before they were read
    epoch: float  # loader.epoch before they were read


def load_step(loader, strategy, block_size):
    """Read the micro-batches of the next step and start copying them to the device."""
    position = loader.state_dict()
    epoch = loader.epoch
    micro_batches = [loader.next_batch() for _ in range(strategy.accumulation)]
    if strategy.compiles:
        micro_batches = [round_up_width(x, y, block_size) for x, y in micro_batches]
    fold = strategy.fold
    batches = [join(micro_batches[i : i + fold]) for i in range(0, len(micro_batches), fold)]
    n_loss_tokens = [int((y != IGNORE_INDEX).sum()) for _, y in batches]  # waits for no device
    n_tokens = sum(x.size for x, _ in batches)
    passes = [(strategy.to_device(x), strategy.to_device(y)) for x, y in batches]
    return StepData(passes, n_loss_tokens, n_tokens, position, epoch)


def pad_width(x, y, width):
    """Pad a batch x, y (B, T) to T = width; what is added carries no loss."""
    padding = ((0, 0), (0, width - x.shape[1]))
    return np.pad(x, padding), np.pad(y, padding, constant_values=IGNORE_INDEX)


def round_up_width(x, y, block_size):
    """Pad a batch x, y (B, T) to one of at most WIDTHS widths."""
    unit = math.ceil(block_size / WIDTHS)
    return pad_width(x, y, min(block_size, unit * math.ceil(x.shape[1] / unit)))


def join(batches):
    """Several batches as one: the same rows, padded to the widest. The loss of a step is a mean over its
    tokens, so nothing but the speed changes."""
    if len(batches) == 1:
        return batches[0]
    width = max(x.shape[1] for x, _ in batches)
    padded = [pad_width(x, y, width) for x, y in batches]
    return np.concatenate([x for x, _ in padded]), np.concatenate([y for _, y in padded])


def shrink_passes(data, strategy):
    """After the device ran out of memory: the same step in smaller passes, from now on.

    Raises InputError where a pass is a single micro-batch already, or other processes wait for this one."""
    if strategy.fold == 1 or strategy.world_size > 1:
        raise InputError(f"out of memory on {strategy.device}; lower batch_size (and raise "
                         "gradient_accumulation_steps by the same factor, which gives the same step)")
    smaller = max(n for n in range(1, strategy.fold) if strategy.fold % n == 0)
    strategy.say(f"out of memory on {strategy.device}: {smaller} instead of {strategy.fold} micro-batches in "
                 "a pass")
    parts = strategy.fold // smaller
    strategy.fold = smaller
    strategy.model.zero_grad()
    if strategy.compiles:
        torch.compiler.reset()  # frees the memory of CUDA graphs
    passes = [half for x, y in data.passes for half in zip(x.chunk(parts), y.chunk(parts), strict=True)]
    return replace(data, passes=passes, n_loss_tokens=[int((y != IGNORE_INDEX).sum()) for _, y in passes])
