"""The GPT: token embedding, blocks of attention and MLP, a norm, and the embedding again as output layer.

GPT-2's structure and parameter names (Radford et al. 2019, after nanoGPT), with RMSNorm (Zhang & Sennrich
2019), rotary positions (RoPE; Su et al. 2021), grouped key/value heads (GQA; Ainslie et al. 2023), and the
choice of activation, of a query/key norm (Henry et al. 2020) and of causal or full attention.

Letters in the shapes: B batch, T tokens, C n_embd, nh heads, nkv key/value heads, hs head size,
V vocab_size, S tokens attended to (those in the cache and the new ones).
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import IGNORE, InputError, ModelConfig
from cpu import fused
from device import has_flex_attention


class KVCache:
    """Keys and values of the tokens read so far: two tensors (n_layer, B, nkv, length, hs)."""

    def __init__(self, config: ModelConfig, batch_size, length, device="cpu", dtype=torch.float32):
        if not config.is_causal:
            raise InputError("a KV cache needs causal attention, but this model has is_causal false")
        n_kv_head = config.n_kv_head or config.n_head
        shape = (config.n_layer, batch_size, n_kv_head, length, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.n_tokens = 0  # filled so far
        self.last_ids = torch.empty(batch_size, 0, dtype=torch.long, device=device)  # for n_prev
        self.step = None  # decode.py's, once it is compiled

    @property
    def length(self):
        return self.k.size(3)

    def update(self, layer, k, v):
        """Append k, v (B, nkv, T, hs) of one layer; return all so far (B, nkv, S, hs)."""
        end = self.n_tokens + k.size(2)
        self.k[layer, :, :, self.n_tokens : end] = k
        self.v[layer, :, :, self.n_tokens : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def rope_table(length, head_size, theta):
    """cos and sin of the rotation angles, two tensors (length, hs / 2)."""
    frequencies = theta ** (-torch.arange(0, head_size, 2).double() / head_size)
    angles = torch.arange(length).double()[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def apply_rope(x, cos, sin):
    """Rotate the adjacent pairs (2i, 2i + 1) of x (B, T, nh, hs); cos, sin: ([B,] T, 1, hs/2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).type_as(x)


def documents_of(idx, bos_id, eos_id):
    """Number the documents of a window: (B, T) ids → (B, T); a new one begins at bos and after eos."""
    after_eos = F.pad(idx[:, :-1] == eos_id, (1, 0))
    return ((idx == bos_id) | after_eos).cumsum(1)


def positions_in(documents):
    """Positions counted from each document's first token, (B, T)."""
    at = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return at - torch.where(starts, at, 0).cummax(1).values


def block_mask_of(documents, is_causal):
    """The mask of documents (B, T) for FlexAttention (Dong et al. 2024), which skips what is hidden whole."""
    from torch.nn.attention.flex_attention import create_block_mask  # here: its import takes a second

    def visible(b, h, q, kv):
        same = documents[b, q] == documents[b, kv]
        return same & (q >= kv) if is_causal else same
    B, T = documents.shape
    return create_block_mask(visible, B, None, T, T, device=documents.device)


@functools.cache
def flex_attention(device_type):
    """torch's flex_attention, compiled where it is used for its speed."""
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        if fused.fits(x, torch.float32):
            return fused.RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer):
        super().__init__()
        self.layer, self.dropout, self.is_causal = layer, config.dropout, config.is_causal
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_size = config.n_embd // config.n_head
        self.qk_norm, self.norm_eps = config.qk_norm, config.norm_eps
        width = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def heads(self, qkv, rope):
        """qkv (B, T, nh + 2 nkv, hs) → queries (B, nh, T, hs), keys and values (B, nkv, T, hs)."""
        if fused.fits(qkv, torch.float32, torch.bfloat16):
            return fused.Heads.apply(qkv, rope and torch.complex(*rope), self.n_head, self.n_kv_head,
                                     self.norm_eps if self.qk_norm else None)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        if rope is not None:
            qk = apply_rope(qk, *rope)
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_size,), eps=self.norm_eps)
        q, k = qk.split([self.n_head, self.n_kv_head], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, rope, mask, cache):
        B, T, C = x.shape
        q, k, v = self.heads(self.c_attn(x).view(B, T, -1, self.head_size), rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, nkv, S, hs)
        is_gqa = self.n_kv_head != self.n_head
        if isinstance(mask, torch.Tensor | None):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
                is_causal=self.is_causal and mask is None and T > 1, enable_gqa=is_gqa)
        else:  # a BlockMask; autocast does not know this call, which wants one type
            y = flex_attention(x.device.type)(q.type_as(v), k.type_as(v), v, block_mask=mask,
                                              enable_gqa=is_gqa)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        # SwiGLU (Shazeer 2020) has a third matrix; two thirds of the width keep the number of parameters.
        self.gated = config.activation == "swiglu"
        usual = math.ceil(8 * config.n_embd / 3 / 16) * 16 if self.gated else 4 * config.n_embd
        hidden = config.n_hidden or usual
        self.c_fc = nn.Linear(config.n_embd, hidden * (2 if self.gated else 1), bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.activation = {"gelu": F.gelu, "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
                           "swiglu": F.silu}[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = self.activation(gate) * x
        else:
            x = self.activation(x)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer):
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache):
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config.validate()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            "ln_f": RMSNorm(config.n_embd, eps=config.norm_eps) if config.final_norm == "rmsnorm"
            else nn.LayerNorm(config.n_embd, eps=1e-5, bias=False),
        })
        if config.use_rope:
            # Recomputed, not saved: a checkpoint holds weights only.
            cos, sin = rope_table(config.block_size, config.n_embd // config.n_head, config.rope_theta)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        else:
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.n_prev:
            self.transformer["prev"] = nn.ModuleList(
                nn.Embedding(config.vocab_size, config.n_embd) for _ in range(config.n_prev))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # tied (Press & Wolf 2017)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2's: normal(0.02), and the projections back to the residual stream scaled by 1/√(2 n_layer)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):  # apply() visits the children before their parent
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    @property
    def device(self):
        return self.lm_head.weight.device

    def n_params(self):
        """Number of parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def n_multiplied(self):
        """Number of parameters without the tables of which each token reads only a row."""
        c = self.config
        return self.n_params() - c.n_embd * (c.n_prev * c.vocab_size + (0 if c.use_rope else c.block_size))

    def flops_per_token(self, length=None):
        """Floating-point operations of training on one token: 6 N + 12 n_layer C length (PaLM, app. B)."""
        c = self.config
        return 6 * self.n_multiplied() + 12 * c.n_layer * c.n_embd * (length or c.block_size)

    def forward(self, idx, targets=None, documents=None, cache: KVCache | None = None, last_only=False):
        """Logits and loss.

        idx: (B, T) token ids. targets: (B, T) ids, IGNORE (-1) where a token carries no loss; the loss is
        the cross-entropy summed over the others and divided by their number, 0 where there are none.
        documents: (B, T) numbers (`documents_of`): attention and positions stay inside each document.
        cache: tokens read before; the new ones are appended. last_only: logits of the last token alone.
        Returns logits (B, T, V) or (B, 1, V), and the loss, a scalar (None without targets)."""
        B, T = idx.shape
        past = cache.n_tokens if cache is not None else 0
        if past + T > self.config.block_size:
            raise InputError(f"{past + T} tokens do not fit into the model's block_size "
                             f"{self.config.block_size}")
        mask, positions = self._mask_and_positions(idx, documents, past)

        x = self.transformer["wte"](idx)  # (B, T, C)
        if self.config.n_prev:
            x = x + self._preceding(idx, documents, cache)
        rope = None
        if self.config.use_rope:
            rope = [t[positions].unsqueeze(-2) for t in (self.rope_cos, self.rope_sin)]  # ([B,] T, 1, hs/2)
        else:
            x = x + self.transformer["wpe"](positions)
        x = self.transformer["drop"](x)
        for block in self.transformer["h"]:
            x = block(x, rope, mask, cache)
        x = self.transformer["ln_f"](x)
        if cache is not None:
            cache.n_tokens += T

        logits = self.lm_head(x[:, -1:] if last_only else x)
        if targets is None:
            return logits, None
        total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                                reduction="sum")
        return logits, total / (targets != IGNORE).sum().clamp(min=1)

    def _preceding(self, idx, documents, cache):
        """Sum of the embeddings of the tokens 1 … n_prev places before each token of idx, (B, T, C).

        A short convolution over the tokens, after the n-gram embeddings of the Byte Latent Transformer
        (Pagnoni et al. 2024). Nothing stands before the first token, or before a document's first."""
        T, total = idx.size(1), 0.0
        seen = idx if cache is None else torch.cat([cache.last_ids, idx], dim=1)
        for distance, table in enumerate(self.transformer["prev"], 1):
            before = table(seen[:, :-distance][:, -T:])
            before = F.pad(before, (0, 0, T - before.size(1), 0))
            if documents is not None:
                same = F.pad(documents[:, distance:] == documents[:, :-distance], (distance, 0))[:, :T]
                before = before * same.unsqueeze(-1)
            total = total + before
        if cache is not None:
            cache.last_ids = seen[:, -self.config.n_prev :]
        return total

    def _mask_and_positions(self, idx, documents, past):
        """The attention mask (None: plain causal or full), a BlockMask or a tensor that is True where a query
        may look, and the positions."""
        T, device = idx.size(1), idx.device
        if documents is None:
            positions = slice(past, past + T) if self.config.use_rope else \
                torch.arange(past, past + T, device=device)
            if past == 0 or T == 1:
                return None, positions
            # New tokens after cached ones: the diagonal starts `past` columns to the right.
            return torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past), positions
        # FlexAttention has no dropout, its kernel no head size below 16; it is compiled on its own.
        if not torch.compiler.is_compiling() and has_flex_attention(device) \
                and self.config.n_embd // self.config.n_head >= 16 \
                and not (self.training and self.config.dropout):
            return block_mask_of(documents, self.config.is_causal), positions_in(documents)
        mask = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, T)
        if self.config.is_causal:
            mask = mask.tril()
        return mask, positions_in(documents)


def batch_loss(model, x, y, document_mask=False, bos_id=None, eos_id=None):
    """Mean loss of a batch x, y (B, T) on the model's device, a scalar tensor."""
    documents = documents_of(x, bos_id, eos_id) if document_mask else None
    return model(x, y, documents=documents)[1]
