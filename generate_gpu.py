"""Generation on a GPU: a cache of fixed shape, the CUDA graph that needs it, weights in half precision.

generate.py chooses between these and what it uses on a CPU. Letters in the shapes: those of model.py.
"""

import torch

from device import has_fast_bfloat16
from model import KVCache
from script import InputError


class StaticKVCache(KVCache):
    """A cache whose tensors have the same shape and place at every step, as a CUDA graph needs.

    The number of tokens is on the device too, position (1,), and attention covers the whole length under a
    mask. padding: None or (B,), how many tokens on the left of each sequence are padding: nothing attends to
    them, and positions are counted from their end. length may then be above the model's block_size."""

    def __init__(self, config, batch_size, length, device="cpu", dtype=torch.float32, padding=None):
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        super().__init__(config, batch_size, length, device, dtype)
        self.block_size = config.block_size
        if padding is not None:
            self.first = padding[:, None]  # (B, 1)
            self.limit = length

    @property
    def n_tokens(self):
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, number):
        self._n_tokens = number
        self.position.fill_(number)

    def columns(self, n_new):
        return self.position + torch.arange(n_new, device=self.k.device)

    def update(self, layer, k, v):
        columns = self.columns(k.size(2))
        self.k[layer].index_copy_(2, columns, k.type_as(self.k))
        self.v[layer].index_copy_(2, columns, v.type_as(self.v))
        return self.k[layer], self.v[layer]

    def mask_and_positions(self, n_new):
        """Mask (T, S) and positions (T,), or (B, 1, T, S) and (B, T) with padding."""
        columns = self.columns(n_new)  # (T,)
        keys = torch.arange(self.length, device=self.k.device)  # (S,)
        visible = keys <= columns[:, None]  # (T, S)
        if isinstance(self.first, int):
            return visible, columns
        visible = visible & (keys >= self.first[:, :, None, None])
        visible = visible | (keys == columns[:, None])  # padding sees itself: a softmax over nothing is NaN
        # A row that has ended goes on, to no effect, and may run past the last position.
        return visible, (columns - self.first).clamp(0, self.block_size - 1)


class GraphStep:
    """Reads one token a sequence, (B,), by a step recorded once as a CUDA graph and then replayed: one launch
    instead of some 20 a layer.

    The logits (B, V) that it returns are overwritten by the next call."""

    def __init__(self, model, cache: StaticKVCache):
        self.model = model
        self.cache = cache
        self.token = torch.zeros(cache.k.size(1), dtype=torch.long, device=cache.k.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the libraries set themselves up, which cannot be recorded
            for _ in range(2):
                self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.forward()

    def forward(self):
        """Read self.token at the cache's position, as often as one likes: the next token overwrites it."""
        n_tokens = self.cache.n_tokens
        logits = self.model(self.token[:, None], cache=self.cache)[0][:, -1]  # (B, V)
        self.cache.n_tokens = n_tokens
        return logits

    def __call__(self, token):
        if self.cache.n_tokens >= self.cache.limit:
            raise InputError(f"the cache is full: it holds {self.cache.limit} tokens")
        self.token.copy_(token)
        self.graph.replay()
        self.cache.n_tokens += 1
        return self.logits


def use_half_precision(model):
    """Give a model on a GPU bfloat16 or float16 weights, which halves the bytes to read for each token.

    A model on a CPU or an old card stays as it is. The tables of RoPE stay float32. Returns the model."""
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (7, 0):
        return model
    return model.to(torch.bfloat16 if has_fast_bfloat16(model.device) else torch.float16)
