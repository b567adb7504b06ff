"""Muon (Jordan et al. 2024) for matrices, on CPUs, GPUs and several processes."""

import math

import torch


def orthogonalize(matrices, coefficients, steps, eps):
    """The nearest (semi-)orthogonal matrices, roughly, by Newton-Schulz iteration (Jordan et al. 2024).

    matrices: one matrix (m, n) or several (G, m, n), of float32; the result has that shape. It is the
    iteration of torch.optim.Muon, X ← p X with p = a I + b G + c G² and G = X Xᵀ. Since all these p commute,
    they are multiplied among themselves, as squares of the short side, and X once, which halves the time for
    a matrix four times as long as wide."""
    a, b, c = coefficients
    is_tall = matrices.size(-2) > matrices.size(-1)
    multiply_add = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # spectral norm at most 1
    gram = x @ x.mT
    product = None
    for step in range(steps):
        p = multiply_add(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else p @ product
        if step < steps - 1:
            gram = p @ gram @ p
    x = product @ x
    return x.mT if is_tall else x


def orthogonalize_bfloat16(matrices, coefficients, steps, eps):
    """`orthogonalize` of float32 matrices in bfloat16, as torch.optim.Muon computes it: X changes every step.

    The product of all p, which orthogonalize uses, has entries too large for bfloat16's 8 bits to hold the
    small ones beside them."""
    a, b, c = coefficients
    is_tall = matrices.size(-2) > matrices.size(-1)
    multiply_add = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    x = matrices.bfloat16()
    x = x.mT if is_tall else x
    x.div_(x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.mT
        p = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, p, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon, with its state and its rule, in groups of matrices of one shape.

    On a GPU the matrices of a group are stacked and orthogonalised together, in a few large products instead
    of many small ones. On a CPU, where that is slower (1.07 to 1.15 times), they go one by one.
    rank, world_size: this process, and how many of the default process group hold the same model. Each
    orthogonalises its share of a group and gets the rest from the others.
    in_bfloat16: where bfloat16 is fast; elsewhere a CPU computes it a hundred times slower than float32."""

    def __init__(self, params, rank=0, world_size=1, in_bfloat16=False, **settings):
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **settings)
        self.rank = rank
        self.world_size = world_size
        self.iterate = orthogonalize_bfloat16 if in_bfloat16 else orthogonalize
        self.recorded = {}  # CUDA graphs of the iteration, by shape

    @torch.no_grad()
    def step(self, closure=None):
        pending = []
        for group in self.param_groups:
            for params in self._batches(group["params"]):
                share = self._orthogonal_share(params, group)
                if self.world_size == 1:
                    self._apply(params, share, group)
                else:
                    # Sent while the next group is computed. NCCL takes contiguous tensors only.
                    share = share.contiguous()
                    shares = [torch.empty_like(share) for _ in range(self.world_size)]
                    work = torch.distributed.all_gather(shares, share, async_op=True)
                    pending.append((params, shares, group, work))
        for params, shares, group, work in pending:
            work.wait()
            self._apply(params, torch.cat(shares), group)

    def _batches(self, params):
        """Lists of the params whose updates are computed together."""
        batches = {}
        for i, p in enumerate(params):
            one_by_one = p.device.type == "cpu" and self.world_size == 1
            if p.grad is not None:
                batches.setdefault(i if one_by_one else p.shape, []).append(p)
        return batches.values()

    def _orthogonal_share(self, params, group):
        """Update the momentum of G params, all (m, n); return the orthogonal updates of this process's share
        of them, (ceil(G / world_size), m, n), the last of which may be zeros for lack of params."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momentum = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(momentum, grads, 1 - group["momentum"])
        n_own = math.ceil(len(params) / self.world_size)
        own = slice(self.rank * n_own, (self.rank + 1) * n_own)
        updates = momentum[own]
        if group["nesterov"] and updates:
            updates = list(torch._foreach_lerp(grads[own], updates, group["momentum"]))
        updates += [torch.zeros_like(params[0])] * (n_own - len(updates))
        settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
        if params[0].device.type != "cpu":
            return self._iterate_together(torch.stack(updates), settings)
        results = [self.iterate(update, *settings) for update in updates]
        return torch.stack(results) if n_own > 1 else results[0][None]

    def _iterate_together(self, matrices, settings):
        """The orthogonal matrices for those of one shape, (G, m, n), on a GPU.

        Launching the some 30 operations takes a small model's CPU longer than the GPU needs to compute them,
        so they are recorded once as a CUDA graph and replayed: 1.3 times the speed of a step at 10.6 M
        parameters (docs/log.md). Not with several processes: NCCL works beside the recording."""
        if matrices.device.type != "cuda" or self.world_size > 1:
            return self.iterate(matrices, *settings)
        if matrices.shape not in self.recorded:
            self.recorded[matrices.shape] = torch.cuda.make_graphed_callables(
                lambda x: self.iterate(x, *settings), (matrices.clone(),))
        return self.recorded[matrices.shape](matrices)  # overwritten by the next call for this shape

    def _apply(self, params, updates, group):
        """Decay the params and subtract their updates, scaled to the size of AdamW's (Liu et al. 2025)."""
        if updates.device.type != "cpu":  # else each is added by a launch of its own
            updates = updates.to(params[0].dtype, memory_format=torch.contiguous_format)
        scale = 0.2 * math.sqrt(max(params[0].shape))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates[: len(params)].unbind(), alpha=-group["lr"] * scale)
