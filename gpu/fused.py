"""The making of queries, keys and values, and the cross-entropy, on a GPU: each one pass over memory.

Both only move bytes. PyTorch moves them several times, with a kernel for each operation; torch.compile moves
them about twice as often as needed, since it keeps the rotation apart from the joining of three gradients,
and computes two exponentials for each logit. model.py has both as their papers write them, for CPUs, for
Macs, and for GPUs without Triton. What they gain is in docs/log.md.

The kernels are written in Triton, whose programs each compute one tile of a tensor. This file needs Triton.
Letters in the shapes: those of model.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

TILE = 4096  # logits that a program computes at a time


@triton.jit
def rotate(x, cos, sin, N_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Rotate the adjacent pairs (2i, 2i + 1) of x (N_HEADS, HEAD_SIZE); cos, sin: (1, HEAD_SIZE / 2)."""
    even, odd = tl.split(tl.reshape(x, [N_HEADS, HEAD_SIZE // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [N_HEADS, HEAD_SIZE])


@triton.jit
def inverse_rms(x, eps, HEAD_SIZE: tl.constexpr):
    """1 / √(mean of x² + eps) of each row of x, with shape (rows, 1)."""
    return tl.rsqrt(tl.sum(x * x, 1) / HEAD_SIZE + eps)[:, None]


@triton.jit
def heads_kernel(qkv, cos, sin, out, n_heads, width, n_angles, eps, N_HEADS: tl.constexpr,
                 HEAD_SIZE: tl.constexpr, ROTATES: tl.constexpr, NORMALISES: tl.constexpr):
    """Queries and keys of one token: the first n_heads of the `width` heads of its row in qkv.

    N_HEADS: n_heads rounded up to a power of two, as Triton wants its tiles."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, N_HEADS)[:, None]
    column = tl.arange(0, HEAD_SIZE)[None, :]
    at = head * HEAD_SIZE + column
    x = tl.load(qkv + token * width * HEAD_SIZE + at, mask=head < n_heads, other=0.0).to(tl.float32)
    if NORMALISES:  # a rotation keeps the length, so the norm may come first
        x *= inverse_rms(x, eps, HEAD_SIZE)
    if ROTATES:
        angle = (token % n_angles) * (HEAD_SIZE // 2) + tl.arange(0, HEAD_SIZE // 2)[None, :]
        x = rotate(x, tl.load(cos + angle), tl.load(sin + angle), N_HEADS, HEAD_SIZE)
    tl.store(out + token * n_heads * HEAD_SIZE + at, x, mask=head < n_heads)


@triton.jit
def gradient_of_part(grad, stride_b, stride_h, stride_t, qkv, out, token, T, n_heads, cos, sin, eps,
                     N_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, ROTATES: tl.constexpr,
                     NORMALISES: tl.constexpr):
    """The part of one token's gradient that comes from its queries, its keys or its values.

    grad (B, heads, T, hs), with any strides. qkv, out: pointers to the part of the token's row."""
    head = tl.arange(0, N_HEADS)[:, None]
    column = tl.arange(0, HEAD_SIZE)[None, :]
    there = head < n_heads
    place = (token // T) * stride_b + (token % T) * stride_t + head * stride_h + column
    g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
    if ROTATES:
        g = rotate(g, cos, -sin, N_HEADS, HEAD_SIZE)
    at = head * HEAD_SIZE + column
    if NORMALISES:
        x = tl.load(qkv + at, mask=there, other=0.0).to(tl.float32)
        factor = inverse_rms(x, eps, HEAD_SIZE)
        x *= factor
        g = (g - x * (tl.sum(g * x, 1) / HEAD_SIZE)[:, None]) * factor
    tl.store(out + at, g, mask=there)


@triton.jit
def heads_gradient_kernel(dq, q_b, q_h, q_t, dk, k_b, k_h, k_t, dv, v_b, v_h, v_t, qkv, cos, sin, out, T,
                          n_head, n_kv_head, n_angles, eps, N_HEAD: tl.constexpr, N_KV_HEAD: tl.constexpr,
                          HEAD_SIZE: tl.constexpr, ROTATES: tl.constexpr, NORMALISES: tl.constexpr):
    """The whole gradient of one token's row of qkv. The numbers after dq, dk and dv are their strides."""
    token = tl.program_id(0).to(tl.int64)
    c = 1.0
    s = 0.0
    if ROTATES:
        angle = (token % n_angles) * (HEAD_SIZE // 2) + tl.arange(0, HEAD_SIZE // 2)[None, :]
        c = tl.load(cos + angle)
        s = tl.load(sin + angle)
    at = token * (n_head + 2 * n_kv_head) * HEAD_SIZE
    gradient_of_part(dq, q_b, q_h, q_t, qkv + at, out + at, token, T, n_head, c, s, eps,
                     N_HEAD, HEAD_SIZE, ROTATES, NORMALISES)
    at += n_head * HEAD_SIZE
    gradient_of_part(dk, k_b, k_h, k_t, qkv + at, out + at, token, T, n_kv_head, c, s, eps,
                     N_KV_HEAD, HEAD_SIZE, ROTATES, NORMALISES)
    at += n_kv_head * HEAD_SIZE
    gradient_of_part(dv, v_b, v_h, v_t, qkv + at, out + at, token, T, n_kv_head, c, s, eps,
                     N_KV_HEAD, HEAD_SIZE, False, False)


@triton.jit
def cross_entropy_kernel(logits, targets, losses, log_sums, V: tl.constexpr, IGNORE: tl.constexpr,
                         TILE: tl.constexpr):
    """Loss of one token and the logarithm of the sum of its exponentials, from its V logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    largest = -float("inf")
    total = 0.0  # of exp(logit - largest)
    for first in range(0, V, TILE):
        column = first + tl.arange(0, TILE)
        x = tl.load(logits + column, mask=column < V, other=-float("inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(x, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
    log_sum = largest + tl.log(total)
    target = tl.load(targets + row)
    counts = target != IGNORE
    chosen = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(counts, log_sum - chosen, 0.0))
    tl.store(log_sums + row, log_sum)


@triton.jit
def cross_entropy_gradient_kernel(logits, targets, log_sums, grad, out, V: tl.constexpr, IGNORE: tl.constexpr,
                                  TILE: tl.constexpr):
    """Gradient of TILE logits of one token: probability - 1 of the target, probability of all others."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    target = tl.load(targets + row)
    x = tl.load(logits + row * V + column, mask=column < V, other=0.0).to(tl.float32)
    g = tl.exp(x - tl.load(log_sums + row)) - tl.where(column == target, 1.0, 0.0)
    g *= tl.where(target != IGNORE, tl.load(grad), 0.0)
    tl.store(out + row * V + column, g, mask=column < V)


# PyTorch's compiler takes these four as they are; it needs the shape of what they return.


@torch.library.custom_op("nano::heads", mutates_args=())
def heads_forward(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, n_heads: int,
                  eps: float | None) -> Tensor:
    """The first n_heads heads of qkv (B, T, heads, hs), rotated and normalised, (B, T, n_heads, hs)."""
    B, T, width, hs = qkv.shape
    out = qkv.new_empty(B, T, n_heads, hs)
    heads_kernel[B * T,](qkv, cos, sin, out, n_heads, width, n_angles(cos), eps or 0.0,
                         N_HEADS=triton.next_power_of_2(n_heads), HEAD_SIZE=hs, ROTATES=cos is not None,
                         NORMALISES=eps is not None)
    return out


@heads_forward.register_fake
def _(qkv, cos, sin, n_heads, eps):
    B, T, _, hs = qkv.shape
    return qkv.new_empty(B, T, n_heads, hs)


@torch.library.custom_op("nano::heads_backward", mutates_args=())
def heads_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None,
                   eps: float | None) -> Tensor:
    """The gradient of qkv, from those of the queries (B, nh, T, hs), keys and values (B, nkv, T, hs)."""
    B, T, _, hs = qkv.shape
    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv)]
    out = torch.empty_like(qkv)
    heads_gradient_kernel[B * T,](
        *(item for g in grads for item in (g, *g.stride()[:3])), qkv, cos, sin, out, T, dq.size(1),
        dk.size(1), n_angles(cos), eps or 0.0, N_HEAD=triton.next_power_of_2(dq.size(1)),
        N_KV_HEAD=triton.next_power_of_2(dk.size(1)), HEAD_SIZE=hs, ROTATES=cos is not None,
        NORMALISES=eps is not None)
    return out


@heads_backward.register_fake
def _(dq, dk, dv, qkv, cos, sin, eps):
    return torch.empty_like(qkv)


@torch.library.custom_op("nano::cross_entropy", mutates_args=())
def cross_entropy_forward(logits: Tensor, targets: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Losses and logarithms of the sums of exponentials, each float32 (N,), of logits (N, V)."""
    N, V = logits.shape
    losses = logits.new_empty(N, dtype=torch.float32)
    log_sums = torch.empty_like(losses)
    cross_entropy_kernel[N,](logits, targets, losses, log_sums, V, IGNORE=ignore, TILE=tile(V), num_warps=8)
    return losses, log_sums


@cross_entropy_forward.register_fake
def _(logits, targets, ignore):
    return [logits.new_empty(logits.size(0), dtype=torch.float32) for _ in range(2)]


@torch.library.custom_op("nano::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(logits: Tensor, targets: Tensor, log_sums: Tensor, grad: Tensor,
                           ignore: int) -> Tensor:
    """The gradient of the sum of the losses, times grad, a scalar tensor: (N, V) like logits."""
    N, V = logits.shape
    out = torch.empty_like(logits)
    cross_entropy_gradient_kernel[N, triton.cdiv(V, tile(V))](logits, targets, log_sums, grad, out, V,
                                                              IGNORE=ignore, TILE=tile(V), num_warps=8)
    return out


@cross_entropy_backward.register_fake
def _(logits, targets, log_sums, grad, ignore):
    return torch.empty_like(logits)


def n_angles(cos):
    """Number of positions in a table (…, hs / 2) of angles."""
    return 1 if cos is None else cos.numel() // cos.size(-1)


def tile(V):
    return min(TILE, triton.next_power_of_2(V))


class Heads(Function):
    """qkv (B, T, nh + 2 nkv, hs) → queries (B, nh, T, hs), keys and values (B, nkv, T, hs).

    cos, sin: ([B,] T, …, hs/2), the rotation of queries and keys; None: none. eps: queries and keys are
    divided by their root mean square; None: they are not. Both in float32 whatever the type of qkv. hs must
    be a power of two."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_head, n_kv_head, eps):
        qkv = qkv.contiguous()
        ctx.save_for_backward(qkv, cos, sin)
        ctx.eps = eps
        qk = heads_forward(qkv, cos, sin, n_head + n_kv_head, eps)
        q = qk[:, :, :n_head]  # (B, T, nh, hs)
        k = qk[:, :, n_head:]  # (B, T, nkv, hs)
        v = qkv[:, :, n_head + n_kv_head :]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        return heads_backward(dq, dk, dv, *ctx.saved_tensors, ctx.eps), None, None, None, None, None


class CrossEntropy(Function):
    """Sum of the cross-entropies of logits (N, V) and targets (N,), float32; `ignore` marks a target that
    carries no loss."""

    @staticmethod
    def forward(ctx, logits, targets, ignore):
        logits = logits.contiguous()
        losses, log_sums = cross_entropy_forward(logits, targets, ignore)
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.ignore = ignore
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return cross_entropy_backward(*ctx.saved_tensors, grad, ctx.ignore), None, None
