"""AdamW and Muon over parameter groups, and the learning-rate schedule."""

import copy
import math

import torch

from config import TrainConfig
from muon import Muon


def learning_rate(step, config: TrainConfig, seconds=0.0):
    """Learning rate at `step`, counted from 0: linear warm-up, then cosine or linear decay to min_lr.

    Where neither lr_decay_iters nor max_steps is set, the decay follows the clock: seconds of max_minutes."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)  # above 0 from the first step on
    end = config.lr_decay_iters or config.max_steps
    if end:
        progress = min(1.0, (step - config.warmup_iters) / (end - config.warmup_iters))
    else:
        progress = min(1.0, seconds / (60 * config.max_minutes))
    remaining = 1 - progress
    if config.lr_schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + remaining * (config.learning_rate - config.min_lr)


def set_lr(param_groups, lr):
    for group in param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


class Optimizers:
    """Several optimizers driven as one; every group follows the same learning rate, times its `lr_factor`."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_lr(self, lr):
        set_lr(self.param_groups, lr)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        """Restore `state_dict`, except which kernel computes the step ("fused"): that is up to the device."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            groups = []
            for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
                groups.append({**saved, "fused": own["fused"]} if "fused" in own else saved)
            # Copied: a checkpoint's tensors lie in its file, which may change while training goes on.
            moments = copy.deepcopy(state["state"])
            optimizer.load_state_dict({"state": moments, "param_groups": groups})


def build_optimizer(model, config: TrainConfig, fast_bfloat16=False, rank=0, world_size=1):
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

    Weight decay applies to matrices only, as in GPT-2 and nanoGPT. Muon's update is scaled to AdamW's size,
    so that both use one learning rate. The embeddings, of which a step reads a few rows, may have a higher
    one (`embedding_lr`; the tables of preceding tokens, which are summed with the token's, a share of it).
    The weight decay of a step stays that of the rest. fast_bfloat16: is bfloat16 faster than float32 on the
    model's device? rank, world_size: see Muon.

    The first step of a process imports torch's compiler, which torch's optimizers ask for: 1.0 s of CPU time,
    as much as importing torch."""
    # Muon is for matrices that map hidden states to hidden states. The embedding, which is also the output
    # layer, and the vectors stay with AdamW (Jordan et al. 2024).
    rest = []
    hidden = []
    for name, p in model.named_parameters():
        is_hidden_matrix = p.ndim == 2 and ".h." in name
        if config.optimizer == "muon" and is_hidden_matrix:
            hidden.append(p)
        else:
            rest.append(p)
    groups = []
    if config.embedding_lr != 1:
        prev_tables = [p for name, p in model.named_parameters() if ".prev." in name]
        prev_factor = max(1.0, config.embedding_lr / (1 + model.config.n_prev))
        # AdamW decays by rate × weight_decay, so a higher rate gets a smaller weight_decay.
        for params, factor in (([model.lm_head.weight], config.embedding_lr), (prev_tables, prev_factor)):
            groups.append({"params": params, "weight_decay": config.weight_decay / factor,
                           "lr_factor": factor})
        embeddings = {p for group in groups for p in group["params"]}
        rest = [p for p in rest if p not in embeddings]
    groups.append({"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay})
    groups.append({"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0})
    device_type = model.lm_head.weight.device.type
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate,
                              betas=(config.beta1, config.beta2), fused=device_type in ("cuda", "cpu"))
    if not hidden:
        return Optimizers([adamw])
    muon = Muon(hidden, rank, world_size, fast_bfloat16, lr=config.learning_rate,
                weight_decay=config.weight_decay)
    return Optimizers([adamw, muon])
