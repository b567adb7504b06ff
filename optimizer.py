"""AdamW and Muon over parameter groups, and the learning-rate schedule."""

import math

import torch

from config import TrainConfig


def learning_rate(step, config: TrainConfig, seconds=0.0):
    """Learning rate of a step (the first is 0): linear warm-up, then cosine or linear decay to min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)  # never 0, not even at first
    end = config.lr_decay_iters or config.max_steps
    if end:
        progress = min(1.0, (step - config.warmup_iters) / (end - config.warmup_iters))
    else:  # the decay follows the clock
        progress = min(1.0, seconds / (60 * config.max_minutes))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1 - progress
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def orthogonalize(matrix, coefficients, steps, eps):
    """The nearest (semi-)orthogonal matrix, roughly, by Newton-Schulz iteration (Jordan et al. 2024).

    The same iteration as torch.optim.Muon's, in the matrix's own type: torch's runs in bfloat16, which a
    CPU without bfloat16 instructions computes a hundred times slower than float32. A step multiplies X by
    p = a I + b G + c G², G = X Xᵀ. Since these commute, we multiply them among themselves, as squares of the
    short side, and X but once: a matrix four times as long as wide takes half the time."""
    a, b, c = coefficients
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=eps)  # spectral norm at most 1
    gram, product = x @ x.T, None
    for step in range(steps):
        p = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal().add_(a)
        product = p if product is None else p @ product
        if step < steps - 1:
            gram = p @ gram @ p
    x = product @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


class NotCompiled:
    """An optimizer's methods without what hides them from torch.compile: its first call imports the compiler,
    two seconds at the start of every training. No optimizer is compiled here."""

    add_param_group, zero_grad, state_dict, load_state_dict = (
        getattr(method, "__wrapped__", method) for method in (
            torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad,
            torch.optim.Optimizer.state_dict, torch.optim.Optimizer.load_state_dict))


class AdamW(NotCompiled, torch.optim.AdamW):
    step = torch.no_grad()(getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step))


class Muon(NotCompiled, torch.optim.Muon):
    """torch.optim.Muon; its iteration is in bfloat16."""


class Float32Muon(Muon):
    """torch.optim.Muon, same state and same update rule, with a float32 iteration (see `orthogonalize`)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


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
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def build_optimizer(model, config: TrainConfig, fast_bfloat16=False, rank=0, world_size=1):
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

    Weight decay goes to matrices alone, as in GPT-2 and nanoGPT. Muon's update is scaled to AdamW's size
    (Liu et al. 2025), so that both take one learning rate. The embeddings, of which a step sees a few
    rows, may take a higher one (`embedding_lr`; the tables of preceding tokens, which are summed with the
    token's, their share of it). The weight decay of a step stays that of the rest."""
    rest, muon = [], []
    for name, p in model.named_parameters():
        is_hidden_matrix = p.ndim == 2 and ".h." in name
        (muon if config.optimizer == "muon" and is_hidden_matrix else rest).append(p)
    groups = []
    if config.embedding_lr != 1:
        tables = [[model.lm_head.weight], [p for name, p in model.named_parameters() if ".prev." in name]]
        factors = config.embedding_lr, max(1.0, config.embedding_lr / (1 + model.config.n_prev))
        groups = [{"params": params, "weight_decay": config.weight_decay / factor, "lr_factor": factor}
                  for params, factor in zip(tables, factors, strict=True)]
        taken = {p for params in tables for p in params}
        rest = [p for p in rest if p not in taken]
    groups += [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
               {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    fused = model.lm_head.weight.device.type in ("cuda", "cpu")
    optimizers = [AdamW([group for group in groups if group["params"]], lr=config.learning_rate,
                        betas=(config.beta1, config.beta2), fused=fused)]
    if muon:
        kind = Muon if fast_bfloat16 else Float32Muon
        optimizers.append(kind(muon, lr=config.learning_rate, weight_decay=config.weight_decay,
                               adjust_lr_fn="match_rms_adamw"))
    return Optimizers(optimizers)
