"""One step of decoding, compiled: on a CPU several times faster than the same step in PyTorch.

    library = usable_library(model)                # None where PyTorch has to decode
    step = CompiledStep(model, cache, library)
    logits = step(token)                           # (B,) → (B, V)

decode.c is the forward pass of model.py once more, in C, for one new token of each sequence; native.py
compiles it. PyTorch decodes instead while it is not compiled, where there is no compiler, on another device,
with another dtype than float32 or int8 weights, and where the two compute different logits, so that a change
to model.py alone is never ignored.
"""

import ctypes
import dataclasses
import sys
import weakref
from types import SimpleNamespace

import torch

from cpu import int8, native
from script import InputError

ACTIVATIONS = {"gelu": 0, "relu2": 1, "swiglu": 2}  # the enum of decode.c


class Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "bias")]


class Layer(ctypes.Structure):
    _fields_ = [
        ("ln_1", ctypes.c_void_p),
        ("ln_2", ctypes.c_void_p),
        ("attn", Linear),
        ("attn_proj", Linear),
        ("gate", Linear),
        ("fc", Linear),
        ("mlp_proj", Linear),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "n_layer", "n_head", "n_kv_head", "n_embd", "hidden", "vocab_size", "activation", "qk_norm",
            "layernorm", "n_threads")),
        ("norm_eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("wte", "wpe", "cos", "sin", "ln_f", "prev", "layers")),
        ("lm_head", Linear),
    ]


def library():
    """decode.c with the types of its functions, or None where it is not there, or not yet."""
    found = native.library("decode.c")
    if found and not found.decode.argtypes:
        pointer = ctypes.c_void_p
        number = ctypes.c_int
        found.work_size.argtypes = [pointer, number, number]
        found.work_size.restype = ctypes.c_size_t
        found.decode.argtypes = [pointer, pointer, pointer, number, number, number, pointer, number, pointer,
                                 pointer]
        found.decode.restype = None
    return found


class CompiledStep:
    """Reads one token a sequence, for one model and one cache, to whose tensors it points.

    cache: a KVCache, or any object with its k, v, ids, n_tokens and limit.
    Raises ValueError where a tensor is not what decode.c reads."""

    def __init__(self, model, cache, library):
        c = model.config
        parts = model.transformer
        self.config = c
        self.cache = cache
        self.library = library
        self.batch_size = cache.k.size(1)
        self.length = cache.k.size(3)
        self.tensors = []  # the structs point to them, so they must live as long
        hs = c.n_embd // c.n_head
        n_kv_head = c.n_kv_head or c.n_head
        qkv = (c.n_head + 2 * n_kv_head) * hs
        hidden = parts["h"][0].mlp.c_proj.weight.size(1)
        self.layers = (Layer * c.n_layer)(*(self.layer_of(block, qkv, hidden) for block in parts["h"]))
        table = (c.vocab_size, c.n_embd)
        prev = [self.address(each.weight, *table) for each in parts["prev"]] if c.n_prev else []
        self.prev = (ctypes.c_void_p * len(prev))(*prev)
        wpe = cos = sin = None
        if c.use_rope:
            cos = self.address(model.rope_cos, c.block_size, hs // 2)
            sin = self.address(model.rope_sin, c.block_size, hs // 2)
        else:
            wpe = self.address(parts["wpe"].weight, c.block_size, c.n_embd)
        self.struct = Model(
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_kv_head=n_kv_head,
            n_embd=c.n_embd,
            hidden=hidden,
            vocab_size=c.vocab_size,
            activation=ACTIVATIONS[c.activation],
            qk_norm=c.qk_norm,
            layernorm=c.final_norm == "layernorm",
            n_threads=torch.get_num_threads(),
            norm_eps=c.norm_eps,
            wte=self.address(parts["wte"].weight, *table),
            wpe=wpe,
            cos=cos,
            sin=sin,
            ln_f=self.address(parts["ln_f"].weight, c.n_embd),
            prev=ctypes.addressof(self.prev),
            layers=ctypes.addressof(self.layers),
            lm_head=self.linear_of(model.lm_head, *table))
        for each in (cache.k, cache.v):
            self.address(each, c.n_layer, self.batch_size, n_kv_head, self.length, hs)
        self.work = torch.zeros(library.work_size(ctypes.byref(self.struct), self.batch_size, self.length))

    def address(self, tensor, *shape):
        """The address of a tensor in memory. Raises ValueError for another shape, device or layout."""
        if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where {shape} is expected")
        self.tensors.append(tensor.detach())
        return tensor.data_ptr()

    def linear_of(self, layer, n_out, n_in, rows=slice(None)):
        """The struct of some output rows of an nn.Linear, or of an Int8Linear."""
        scale = getattr(layer, "scale", None)
        return Linear(
            weight=self.address(layer.weight[rows], n_out, n_in),
            scale=None if scale is None else self.address(scale[rows], n_out),
            bias=None if layer.bias is None else self.address(layer.bias[rows], n_out))

    def layer_of(self, block, qkv, hidden):
        """The struct of a Block. qkv: rows of c_attn; hidden: width of the MLP's hidden layer."""
        attn = block.attn
        mlp = block.mlp
        n_embd = self.config.n_embd
        gate = Linear()
        fc_rows = slice(None)
        if mlp.gated:  # c_fc holds the gates and then the values
            gate = self.linear_of(mlp.c_fc, hidden, n_embd, slice(hidden))
            fc_rows = slice(hidden, None)
        return Layer(
            ln_1=self.address(block.ln_1.weight, n_embd),
            ln_2=self.address(block.ln_2.weight, n_embd),
            attn=self.linear_of(attn.c_attn, qkv, n_embd),
            attn_proj=self.linear_of(attn.c_proj, n_embd, n_embd),
            gate=gate,
            fc=self.linear_of(mlp.c_fc, hidden, n_embd, fc_rows),
            mlp_proj=self.linear_of(mlp.c_proj, n_embd, hidden))

    def __call__(self, token):
        """The logits (B, V) after one more token a sequence, (B,), which the cache then holds.

        Raises IndexError for a token outside the vocabulary, InputError where the context is full."""
        cache = self.cache
        vocab_size = self.config.vocab_size
        if len(token) != self.batch_size:
            raise ValueError(f"{len(token)} tokens for {self.batch_size} sequences")
        for each in token.tolist():
            if not 0 <= each < vocab_size:  # C would read whatever lies there
                raise IndexError(f"token id {each} is out of range, vocab_size is {vocab_size}")
        end = cache.n_tokens + 1
        if end > cache.limit:
            raise InputError(f"{end} tokens do not fit into the model's block_size {self.config.block_size}")
        cache.ids[:, cache.n_tokens] = token
        ids = cache.ids[:, max(0, cache.n_tokens - self.config.n_prev) : end].contiguous()
        logits = torch.empty(self.batch_size, vocab_size)
        self.library.decode(
            ctypes.byref(self.struct), cache.k.data_ptr(), cache.v.data_ptr(), self.length, cache.n_tokens,
            self.batch_size, ids.data_ptr(), ids.size(1), self.work.data_ptr(), logits.data_ptr())
        cache.n_tokens = end
        return logits


def empty_cache(config, batch_size, length):
    """What CompiledStep needs of a KVCache, without a token in it."""
    n_kv_head = config.n_kv_head or config.n_head
    shape = (config.n_layer, batch_size, n_kv_head, length, config.n_embd // config.n_head)
    return SimpleNamespace(
        k=torch.zeros(shape),
        v=torch.zeros(shape),
        ids=torch.zeros(batch_size, length, dtype=torch.long),
        n_tokens=0,
        limit=length)


@torch.inference_mode()
def difference(model, library):
    """How decode.c differs from `model` on a few tokens of one and of two sequences; "" where it does not.

    There are enough tokens for the first to be beyond the reach of n_prev. PyTorch has to multiply by the
    dequantised int8 weights, which it does for more than a few rows: it reads each sequence many times."""
    c = model.config
    length = min(c.n_prev + 3, c.block_size)
    idx = torch.arange(2 * length).view(2, length) * 7 % c.vocab_size
    copies = int8.FEW + 1
    expected = model(idx.repeat_interleave(copies, dim=0))[0][::copies]  # (2, length, V)
    size = float(expected.abs().max())
    # decode.c rounds the inputs of int8 products: 2e-4 at 384 wide, 8e-4 at 768. Floats differ by 3e-6.
    limit = 1e-4 if isinstance(model.lm_head, torch.nn.Linear) else 1e-2
    for n_sequences in (1, 2):
        try:
            step = CompiledStep(model, empty_cache(c, n_sequences, length), library)
            logits = [step(token) for token in idx[:n_sequences].unbind(1)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return f"does not fit model.py ({error})"
        error = float((expected[:n_sequences] - torch.stack(logits, dim=1)).abs().max())
        if not error <= limit * size:
            return f"gives other logits than model.py (by {error:.2g} of {size:.2g})"
    return ""


CHECKED = weakref.WeakKeyDictionary()  # model -> its config and types when it was checked, and the verdict


def agrees(model, library):
    """Does decode.c compute what `model` does? Checked once for each model, config and types of its weights.

    A difference is printed, since it makes generation slower."""
    layers = [module for module in model.modules() if hasattr(module, "weight")]
    kind = (dataclasses.astuple(model.config), [(type(layer), layer.weight.dtype) for layer in layers])
    if model not in CHECKED or CHECKED[model][0] != kind:
        found = difference(model, library)
        if found:
            print(f"note: decode.c {found}; generating with model.py, more slowly", file=sys.stderr)
        CHECKED[model] = (kind, not found)
    return CHECKED[model][1]


def usable_library(model):
    """decode.c, where it can decode for this model; None where PyTorch has to."""
    if model.training:
        return None
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        return None
    found = library()
    return found if found and agrees(model, found) else None
