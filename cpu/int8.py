"""Int8 weights for generation on a CPU: a token has a quarter of the bytes to read.

    quantize(model)      # in place; `inference.py --int8` calls it
"""

import torch
import torch.nn as nn

from script import InputError

FEW = 8  # rows, up to which torch's int8 product is used


class Int8Linear(nn.Module):
    """A linear layer (…, in) → (…, out) with int8 weights (out, in) and one scale an output, (out,).

    Weights are rounded to the nearest 1/127 of each output's largest one (after Dettmers et al. 2022). Up to
    `FEW` rows go through torch's int8 product, which rounds them to bfloat16. More rows, as a prompt has, are
    multiplied in float32 by the dequantised weights."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
        self.weight = (weight / self.scale[:, None]).round().to(torch.int8)  # (out, in)
        self.bias = linear.bias

    def forward(self, x):
        rows = x.flatten(0, -2)  # (rows, in)
        # torch's product reads past the end of rows whose length is not a multiple of 16.
        if len(rows) <= FEW and self.weight.size(1) % 16 == 0:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale.bfloat16()).float()
        else:
            y = rows @ (self.weight * self.scale[:, None]).T
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])


def quantize(model):
    """Give a GPT on the CPU int8 weights, in place, for generation only; the embeddings stay as they are.

    Raises InputError for a model on another device."""
    if model.device.type != "cpu":
        raise InputError(f"int8: for a CPU, but the model is on {model.device}; add --device cpu")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
