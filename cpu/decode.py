"""One step of decoding, compiled: on a CPU several times faster than the same step in PyTorch.

    step = step_of(model, cache)      # None until decode.c is compiled, and where it does not fit
    logits = step(token)              # (B,) -> (B, V), like decode_one_token of generate.py, which calls this

`decode.c` is model.py's forward pass once more, in C, for one new token of each sequence. native.py compiles
it. Until that is done, and where it cannot serve (no compiler, another device, another type than float32 or
int8 weights), generation takes PyTorch's step. So it does where the two compute different logits.
"""

import ctypes
import sys

import torch

from cpu import native
from model import KVCache

ACTIVATIONS = {"gelu": 0, "relu2": 1, "swiglu": 2}  # the enum of decode.c


class Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "bias")]


class Layer(ctypes.Structure):
    _fields_ = [("ln_1", ctypes.c_void_p), ("ln_2", ctypes.c_void_p),
                *((name, Linear) for name in ("attn", "attn_proj", "gate", "fc", "mlp_proj"))]


class Model(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int32) for name in (
                    "n_layer", "n_head", "n_kv_head", "n_embd", "hidden", "vocab_size", "activation",
                    "qk_norm", "layernorm", "n_threads")),
                ("norm_eps", ctypes.c_float),
                *((name, ctypes.c_void_p) for name in ("wte", "wpe", "cos", "sin", "ln_f", "prev", "layers")),
                ("lm_head", Linear)]


def library():
    """decode.c with the types of its functions, or None where it is not there, or not yet."""
    found = native.library("decode.c")
    if found and not found.decode.argtypes:
        p, i = ctypes.c_void_p, ctypes.c_int
        found.work_size.argtypes, found.work_size.restype = [p, i, i], ctypes.c_size_t
        found.decode.argtypes, found.decode.restype = [p, p, p, i, i, i, p, i, p, p], None
    return found


class CompiledStep:
    """One token a sequence for one model and one cache, into whose tensors it points."""

    def __init__(self, model, cache, library):
        c, parts, blocks = model.config, model.transformer, model.transformer["h"]
        self.config, self.cache, self.library, self.batch_size = c, cache, library, cache.k.size(1)
        self.kept = []  # what the structs point to stays in memory
        hs, hidden = c.n_embd // c.n_head, blocks[0].mlp.c_proj.weight.size(1)
        n_kv_head = c.n_kv_head or c.n_head
        widths = c.n_embd, (c.n_head + 2 * n_kv_head) * hs, hidden
        self.layers = (Layer * c.n_layer)(*(self.layer_of(block, *widths) for block in blocks))
        table = c.vocab_size, c.n_embd
        prev = [self.address(each.weight, *table) for each in parts["prev"]] if c.n_prev else []
        self.prev = (ctypes.c_void_p * len(prev))(*prev)
        wpe = cos = sin = None
        if c.use_rope:
            cos, sin = (self.address(t, c.block_size, hs // 2) for t in (model.rope_cos, model.rope_sin))
        else:
            wpe = self.address(parts["wpe"].weight, c.block_size, c.n_embd)
        wte, ln_f = self.address(parts["wte"].weight, *table), self.address(parts["ln_f"].weight, c.n_embd)
        self.struct = Model(
            c.n_layer, c.n_head, n_kv_head, c.n_embd, hidden, c.vocab_size, ACTIVATIONS[c.activation],
            c.qk_norm, c.final_norm == "layernorm", torch.get_num_threads(), c.norm_eps,
            wte, wpe, cos, sin, ln_f, ctypes.addressof(self.prev), ctypes.addressof(self.layers),
            self.linear_of(model.lm_head, *table))
        for each in (cache.k, cache.v):
            self.address(each, c.n_layer, self.batch_size, n_kv_head, cache.length, hs)
        self.work = torch.zeros(library.work_size(ctypes.byref(self.struct), self.batch_size, cache.length))

    def address(self, tensor, *shape):
        """Raises ValueError where the tensor is not what decode.c will read."""
        if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where {shape} is expected")
        self.kept.append(tensor.detach())
        return tensor.data_ptr()

    def linear_of(self, layer, n_out, n_in, rows=slice(None)):
        """The struct of some output rows of an nn.Linear, or of an Int8Linear."""
        scale, bias = getattr(layer, "scale", None), layer.bias
        return Linear(self.address(layer.weight[rows], n_out, n_in),
                      None if scale is None else self.address(scale[rows], n_out),
                      None if bias is None else self.address(bias[rows], n_out))

    def layer_of(self, block, n_embd, qkv, hidden):
        attn, mlp = block.attn, block.mlp
        gate = self.linear_of(mlp.c_fc, hidden, n_embd, slice(hidden)) if mlp.gated else Linear()
        fc = self.linear_of(mlp.c_fc, hidden, n_embd, slice(hidden, None) if mlp.gated else slice(None))
        return Layer(self.address(block.ln_1.weight, n_embd), self.address(block.ln_2.weight, n_embd),
                     self.linear_of(attn.c_attn, qkv, n_embd), self.linear_of(attn.c_proj, n_embd, n_embd),
                     gate, fc, self.linear_of(mlp.c_proj, n_embd, hidden))

    def __call__(self, token):
        """The logits (B, V) after one more token a sequence, (B,)."""
        cache, n_prev, ids = self.cache, self.config.n_prev, token[:, None]
        if len(token) != self.batch_size:
            raise ValueError(f"{len(token)} tokens for {self.batch_size} sequences")
        for each in token.tolist():
            if not 0 <= each < self.config.vocab_size:  # C would read whatever lies there
                raise IndexError(f"token id {each} is out of range, vocab_size is {self.config.vocab_size}")
        if n_prev:
            ids = torch.cat([cache.last_ids, ids], dim=1)
            cache.last_ids = ids[:, -n_prev:]
        ids, logits = ids.contiguous(), torch.empty(self.batch_size, self.config.vocab_size)
        self.library.decode(
            ctypes.byref(self.struct), cache.k.data_ptr(), cache.v.data_ptr(), cache.length, cache.n_tokens,
            self.batch_size, ids.data_ptr(), ids.size(1), self.work.data_ptr(), logits.data_ptr())
        cache.n_tokens += 1
        return logits


AGREES = {}  # (model's settings, int8 weights?) -> does decode.c compute what model.py does?


def agrees(model, library):
    """Hold the two against each other on a few tokens, once for each kind of model; a difference is printed.

    Who changes model.py alone is thus told, and gets the changed model."""
    int8 = not isinstance(model.lm_head, torch.nn.Linear)
    kind = str(model.config), int8
    if kind in AGREES:
        return AGREES[kind]
    idx = torch.arange(min(3, model.config.block_size))[None] % model.config.vocab_size
    expected = model(idx, cache=KVCache(model.config, 1, idx.size(1)), last_only=True)[0][:, -1]
    try:
        compiled = CompiledStep(model, KVCache(model.config, 1, idx.size(1)), library)
        got = [compiled(token) for token in idx.unbind(1)][-1]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fault = f"does not fit model.py ({error})"
    else:
        error, size = float((expected - got).abs().max()), float(expected.abs().max())
        limit = (0.1 if int8 else 1e-3) * size  # PyTorch's int8 products round their inputs to bfloat16
        fault = "" if error <= limit else f"gives other logits than model.py (by {error:.2g} of {size:.2g})"
    if fault:
        print(f"note: decode.c {fault}; generating with model.py, more slowly", file=sys.stderr)
    AGREES[kind] = not fault
    return AGREES[kind]


def step_of(model, cache):
    """The CompiledStep of a model and a cache, or None where PyTorch has to do it."""
    full = cache.n_tokens >= min(cache.length, model.config.block_size)  # PyTorch then says what is wrong
    if full or model.training or torch.is_grad_enabled():
        return None
    if cache.step is None:
        used = cache.k, *model.parameters()
        if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in used):
            cache.step = False
        elif found := library():
            cache.step = agrees(model, found) and CompiledStep(model, cache, found)
    return cache.step or None
