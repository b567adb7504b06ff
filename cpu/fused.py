"""RMSNorm and the making of queries, keys and values on a CPU, in few passes over memory.

In PyTorch each operation writes its result to memory for the next one to read, and backward reads it again.
Beside matrix products, a model on a CPU spends most of its time on that. model.py has both as their papers
write them, for GPUs and for the compiler, which fuses them; on a CPU it takes them from here.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def fits(x, *types):
    """Is x on a CPU, of one of these types, and nothing being compiled?"""
    return x.device.type == "cpu" and x.dtype in types and not torch.compiler.is_compiling()


def inverse_rms(x, eps):
    """1 / √(mean of x² + eps) over the last dimension, which stays, with size 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()


def as_complex(x):
    """Adjacent pairs of the last dimension as complex numbers, in the same memory where they lie together."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class RMSNorm(Function):
    """x (…, C) over its root mean square, times weight (C,) (Zhang & Sennrich 2019); float32."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        factor = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, factor = ctx.saved_tensors
        # torch has LayerNorm's backward in two passes. Told that the mean of x is 0, it is RMSNorm's, except
        # that it takes the mean off its result, which is put back here.
        x_grad, weight_grad, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(factor), factor, weight, None, [True, True, False])
        mean = (grad @ weight).unsqueeze(-1).mul_(factor).div_(x.size(-1))
        return x_grad.add_(mean), weight_grad, None


class Heads(Function):
    """qkv (B, T, nh + 2 nkv, hs) → queries (B, nh, T, hs), keys and values (B, nkv, T, hs).

    Queries and keys are rotated by `angles`, complex numbers ([B,] T, 1, hs/2) (None: they are not), and then
    divided by their root mean square (eps None: they are not), in float32 whatever the type of qkv. Backward
    writes the gradient of qkv in one go, instead of three that are joined afterwards."""

    @staticmethod
    def forward(ctx, qkv, angles, n_head, n_kv_head, eps):
        qk, factor = qkv[:, :, : n_head + n_kv_head].float(), None
        if angles is not None:
            qk = torch.view_as_real(as_complex(qk) * angles).flatten(-2)
        if eps is not None:
            factor = inverse_rms(qk, eps)
            qk = qk * factor
        qk = qk.type_as(qkv)
        ctx.save_for_backward(angles, factor, None if factor is None else qk)
        parts = qk[:, :, :n_head], qk[:, :, n_head:], qkv[:, :, n_head + n_kv_head :]
        return tuple(part.transpose(1, 2) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        angles, factor, normed = ctx.saved_tensors
        grads = [grad.transpose(1, 2) for grad in grads]  # (B, T, heads, hs)
        qkv_grad = grads[0].new_empty(*grads[0].shape[:2], sum(grad.size(2) for grad in grads),
                                      grads[0].size(3))
        *qk_parts, v_part = qkv_grad.split([grad.size(2) for grad in grads], dim=2)
        v_part.copy_(grads[2])
        first = 0
        for part, grad in zip(qk_parts, grads[:2], strict=True):
            grad = grad.float()
            if factor is not None:
                y, r = (t[:, :, first : first + grad.size(2)].float() for t in (normed, factor))
                along = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(grad.size(3))
                grad = torch.addcmul(grad, y, along, value=-1).mul_(r)
            if angles is None:
                part.copy_(grad)
            elif part.dtype is torch.float32:  # straight to its place
                torch.mul(as_complex(grad), angles.conj(), out=as_complex(part))
            else:
                part.copy_(torch.view_as_real(as_complex(grad) * angles.conj()).flatten(-2))
            first += grad.size(2)
        return qkv_grad, None, None, None, None
