"""RMSNorm and the making of queries, keys and values on a CPU, in few passes over memory.

In PyTorch each operation writes its result to memory for the next one to read, and backward reads it again.
After matrix products, a model on a CPU spends most of its time on that. model.py has both as their papers
write them, for GPUs and for the compiler, which fuses them; on a CPU it uses the functions here.

A training step without RMSNorm takes 1.04 times as long in CPU time, and without Heads 1.08 times, both at
6 layers of 384 and in the shipped model (medians of alternating steps, batch 4, block 256).

Letters in the shapes: those of model.py.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def can_fuse(x, *dtypes):
    """Is x on a CPU and of one of these dtypes, and is nothing being compiled?"""
    return x.device.type == "cpu" and x.dtype in dtypes and not torch.compiler.is_compiling()


def inverse_rms(x, eps):
    """1 / √(mean of x² + eps) over the last dimension, which stays, with size 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()


def as_complex(x):
    """Adjacent pairs of the last dimension as complex numbers; a view where they are adjacent in memory."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class RMSNorm(Function):
    """x (…, C) over its root mean square, times weight (C,), in float32 (Zhang & Sennrich 2019)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        factor = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, factor = ctx.saved_tensors
        # torch's backward of LayerNorm makes two passes. With a mean of 0 for x it computes RMSNorm's, except
        # that it subtracts the mean from its result; we add that back.
        x_grad, weight_grad, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(factor), factor, weight, None, [True, True, False])
        mean = (grad @ weight).unsqueeze(-1).mul_(factor).div_(x.size(-1))
        return x_grad.add_(mean), weight_grad, None


class Heads(Function):
    """qkv (B, T, nh + 2 nkv, hs) → queries (B, nh, T, hs), keys and values (B, nkv, T, hs).

    angles: complex numbers ([B,] T, 1, hs/2) that rotate queries and keys; None: no rotation. eps: queries
    and keys are then divided by their root mean square; None: they are not. Both in float32 whatever the type
    of qkv. Backward writes the gradient of qkv into one tensor, instead of joining three afterwards."""

    @staticmethod
    def forward(ctx, qkv, angles, n_head, n_kv_head, eps):
        qk = qkv[:, :, : n_head + n_kv_head].float()
        factor = None
        if angles is not None:
            qk = torch.view_as_real(as_complex(qk) * angles).flatten(-2)
        if eps is not None:
            factor = inverse_rms(qk, eps)
            qk = qk * factor
        qk = qk.type_as(qkv)
        ctx.save_for_backward(angles, factor, None if factor is None else qk)
        q = qk[:, :, :n_head]  # (B, T, nh, hs)
        k = qk[:, :, n_head:]  # (B, T, nkv, hs)
        v = qkv[:, :, n_head + n_kv_head :]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        angles, factor, normed = ctx.saved_tensors
        grads = [grad.transpose(1, 2) for grad in grads]  # (B, T, heads, hs)
        B, T, _, hs = grads[0].shape
        n_heads = sum(grad.size(2) for grad in grads)
        qkv_grad = grads[0].new_empty(B, T, n_heads, hs)  # (B, T, nh + 2 nkv, hs)
        *qk_parts, v_part = qkv_grad.split([grad.size(2) for grad in grads], dim=2)
        v_part.copy_(grads[2])
        first = 0
        for part, grad in zip(qk_parts, grads[:2], strict=True):
            grad = grad.float()
            if factor is not None:
                heads = slice(first, first + grad.size(2))
                y = normed[:, :, heads].float()
                r = factor[:, :, heads].float()
                along = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(grad.size(3))
                grad = torch.addcmul(grad, y, along, value=-1).mul_(r)
            if angles is None:
                part.copy_(grad)
            elif part.dtype is torch.float32:  # written in place, without a copy
                torch.mul(as_complex(grad), angles.conj(), out=as_complex(part))
            else:
                part.copy_(torch.view_as_real(as_complex(grad) * angles.conj()).flatten(-2))
            first += grad.size(2)
        return qkv_grad, None, None, None, None
