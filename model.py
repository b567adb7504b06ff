"""The GPT: token embedding, blocks of attention and MLP, a norm, and the embedding again as output layer.

GPT-2's structure and parameter names (Radford et al. 2019, after nanoGPT), with RMSNorm (Zhang & Sennrich
2019), rotary positions (RoPE; Su et al. 2021), grouped key/value heads (GQA; Ainslie et al. 2023), and the
choice of activation, of a query/key norm (Henry et al. 2020) and of causal or full attention.

Letters in the shapes: B batch, T tokens, C n_embd, H width of the MLP's hidden layer, V vocab_size,
nh heads, nkv key/value heads, hs head size, S tokens attended to (those in the cache and the new ones).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import IGNORE_INDEX, ModelConfig
from cpu import fused
from device import can_compile, has_flex_attention
from documents import block_mask_of, documents_of, flex_attention, positions_in
from gpu import usable_kernels
from preceding import PrecedingTokens
from script import InputError


class KVCache:
    """Keys and values of the tokens read so far, for generation.

    k, v: (n_layer, B, nkv, length, hs), allocated at once. ids: (B, length), the tokens themselves. n_tokens
    of the `length` columns are filled. first: column of each sequence's first token.
    Raises InputError for a model with full attention, whose outputs depend on later tokens."""

    first = 0

    def __init__(self, config: ModelConfig, batch_size, length, device="cpu", dtype=torch.float32):
        if not config.is_causal:
            raise InputError("a KV cache needs causal attention, but this model has is_causal false")
        n_kv_head = config.n_kv_head or config.n_head
        shape = (config.n_layer, batch_size, n_kv_head, length, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
        self.length = length
        self.limit = min(length, config.block_size)  # n_tokens stays at or below this
        self.n_tokens = 0

    def columns(self, n_new):
        """The columns of the next n_new tokens, (n_new,)."""
        return torch.arange(self.n_tokens, self.n_tokens + n_new, device=self.k.device)

    def update(self, layer, k, v):
        """Append k, v (B, nkv, T, hs) of one layer; return all to attend to, (B, nkv, S, hs)."""
        end = self.n_tokens + k.size(2)
        self.k[layer, :, :, self.n_tokens : end] = k
        self.v[layer, :, :, self.n_tokens : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def mask_and_positions(self, n_new):
        """Which tokens each of the next n_new may attend to: None (causal) or a bool tensor (n_new, S); and
        their positions, (n_new,)."""
        columns = self.columns(n_new)
        if self.n_tokens == 0 or n_new == 1:
            return None, columns
        S = self.n_tokens + n_new
        return torch.arange(S, device=self.k.device) <= columns[:, None], columns


def in_bfloat16(device_type):
    """Are products computed in bfloat16 at the moment?"""
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) is torch.bfloat16


def rope_table(length, head_size, theta):
    """cos and sin of the rotation angles, two tensors (length, hs / 2)."""
    # In double precision: at the last positions of a long context, float32 would lose digits of the angle.
    frequencies = theta ** (-torch.arange(0, head_size, 2).double() / head_size)
    angles = torch.arange(length).double()[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def apply_rope(x, cos, sin):
    """Rotate the adjacent pairs (2i, 2i + 1) of x (B, T, nh, hs); cos, sin: ([B,] T, 1, hs/2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).type_as(x)


class RMSNorm(nn.RMSNorm):
    """x (…, C) over its root mean square, times a learned weight (C,) (Zhang & Sennrich 2019)."""

    def forward(self, x):
        if fused.can_fuse(x, torch.float32):
            return fused.RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), x (B, T, C) → (B, T, C), with grouped key/value heads.

    rope: None, or cos and sin ([B,] T, 1, hs/2). mask: None, a tensor (…, T, S) that is True where a query
    may look, or FlexAttention's BlockMask. is_causal: hide later tokens where mask is None. cache: None, or
    the KVCache that the new keys and values are appended to."""

    def __init__(self, config: ModelConfig, layer):
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_size = config.n_embd // config.n_head
        self.qk_norm = config.qk_norm
        self.norm_eps = config.norm_eps
        self.is_on_gpu = self.is_on_mps = self.has_flash = False  # GPT sets these
        self.gpu_heads = None
        # One product makes queries, keys and values, in this order.
        width = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def heads(self, qkv, rope):
        """qkv (B, T, nh + 2 nkv, hs) → queries (B, nh, T, hs), keys and values (B, nkv, T, hs)."""
        if fused.can_fuse(qkv, torch.float32, torch.bfloat16):
            angles = torch.complex(*rope) if rope is not None else None
            eps = self.norm_eps if self.qk_norm else None
            return fused.Heads.apply(qkv, angles, self.n_head, self.n_kv_head, eps)
        if self.gpu_heads is not None:
            cos, sin = rope or (None, None)
            eps = self.norm_eps if self.qk_norm else None
            return self.gpu_heads.apply(qkv, cos, sin, self.n_head, self.n_kv_head, eps)
        # Queries and keys are rotated and normalised together: half as many operations.
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        if rope is not None:
            qk = apply_rope(qk, *rope)
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_size,), eps=self.norm_eps).type_as(v)
        q, k = qk.split([self.n_head, self.n_kv_head], dim=2)  # (B, T, nh, hs), (B, T, nkv, hs)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, rope, mask, is_causal, cache):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_size)  # (B, T, nh + 2 nkv, hs)
        q, k, v = self.heads(qkv, rope)  # (B, nh, T, hs), twice (B, nkv, T, hs)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, nkv, S, hs)
        if self.is_on_mps:  # its kernel has misread other layouts (pytorch issue 181133)
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        is_grouped = self.n_kv_head != self.n_head
        if isinstance(mask, torch.Tensor | None):
            can_use_flash = self.has_flash and mask is None and v.dtype in (torch.float16, torch.bfloat16)
            if is_grouped and self.is_on_gpu and not can_use_flash:
                # The other kernels cannot share heads, and torch would fall back to writing out all scores.
                k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=1)  # (B, nh, S, hs)
                v = v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)
                is_grouped = False
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                               is_causal=is_causal, enable_gqa=is_grouped)  # (B, nh, T, hs)
        else:
            y = flex_attention(q, k, v, mask, is_grouped)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers and an activation between them, x (B, T, C) → (B, T, H) → (B, T, C).

    With "swiglu" (Shazeer 2020) the first layer makes 2 H numbers, of which half are gates; two thirds of the
    width then keep the number of parameters."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.activation == "swiglu"
        usual = math.ceil(8 * config.n_embd / 3 / 16) * 16 if self.gated else 4 * config.n_embd
        hidden = config.n_hidden or usual
        self.c_fc = nn.Linear(config.n_embd, hidden * (2 if self.gated else 1), bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.activation = {"gelu": F.gelu, "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
                           "swiglu": F.silu}[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, H), or (B, T, 2 H)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)  # each (B, T, H)
            x = self.activation(gate) * x
        else:
            x = self.activation(x)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """One Transformer block, x (B, T, C) → (B, T, C): attention and an MLP, each added to what it reads.

    The norms come first (pre-norm; Xiong et al. 2020). Other arguments: those of Attention."""

    def __init__(self, config: ModelConfig, layer):
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, is_causal, cache):
        x = x + self.attn(self.ln_1(x), rope, mask, is_causal, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model: token ids (B, T) → logits (B, T, V), and the loss where targets are given.

    `torch.compile(model)` gives a compiled model that shares the weights, while `model` itself stays eager,
    for generation and scoring, whose many shapes would each be compiled anew.
    Raises InputError where the config contradicts itself."""

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
        if not config.use_rope:
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.n_prev:
            self.transformer["prev"] = PrecedingTokens(config.n_prev, config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # tied (Press & Wolf 2017)
        self.apply(self._init_weights)
        self._set_up_device()

    def _init_weights(self, module):
        """GPT-2's: normal(0.02), and the projections back to the residual stream scaled by 1/√(2 n_layer)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):  # apply() visits the children before their parent
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def _apply(self, fn, recurse=True):
        """What .to(), .cuda() and .bfloat16() call."""
        super()._apply(fn, recurse)
        self._set_up_device()
        return self

    def _set_up_device(self):
        """Make what depends on the device and is not saved. The RoPE tables are float32 whatever the weights
        are, since bfloat16 would give neighbouring positions one angle."""
        config = self.config
        head_size = config.n_embd // config.n_head
        if config.use_rope:
            cos, sin = rope_table(config.block_size, head_size, config.rope_theta)
            self.register_buffer("rope_cos", cos.to(self.device), persistent=False)
            self.register_buffer("rope_sin", sin.to(self.device), persistent=False)
        # Which kernels there are is asked here, since the compiler cannot trace the questions. FlexAttention
        # wants heads of 16 or more.
        self.is_on_gpu = is_cuda = self.device.type == "cuda"
        kernels = usable_kernels(self.device) if can_compile(self.device) else None
        self.gpu_cross_entropy = kernels and kernels.CrossEntropy
        self.use_flex_attention = bool(kernels) and has_flex_attention(self.device) and head_size >= 16
        has_flash = is_cuda and torch.cuda.get_device_capability(self.device) >= (8, 0)
        for block in self.transformer["h"]:
            block.attn.is_on_gpu = is_cuda
            block.attn.is_on_mps = self.device.type == "mps"
            block.attn.gpu_heads = kernels and kernels.Heads if head_size.bit_count() == 1 else None
            block.attn.has_flash = has_flash and torch.backends.cuda.flash_sdp_enabled()

    @property
    def device(self):
        return self.transformer["wte"].weight.device

    def n_params(self):
        """Number of parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def n_matmul_params(self):
        """Number of parameters without the tables of which each token reads only a row."""
        c = self.config
        return self.n_params() - c.n_embd * (c.n_prev * c.vocab_size + (0 if c.use_rope else c.block_size))

    def flops_per_token(self, length=None):
        """Floating-point operations of training on one token: 6 N + 12 n_layer C length (PaLM, app. B)."""
        c = self.config
        return 6 * self.n_matmul_params() + 12 * c.n_layer * c.n_embd * (length or c.block_size)

    def forward(self, idx, targets=None, documents=None, cache: KVCache | None = None, last_only=False):
        """Logits and loss.

        idx: (B, T) token ids. targets: (B, T) ids, IGNORE_INDEX (-1) where a token carries no loss; the loss
        is the cross-entropy summed over the others and divided by their number, 0 where there are none.
        documents: (B, T) numbers (`documents_of`): attention and positions stay inside each document.
        cache: tokens read before; the new ones are appended. last_only: logits of the last token alone.
        Returns logits (B, T, V) or (B, 1, V), without gradient where there are targets, and the loss, a
        scalar (None without targets).
        Raises InputError for more tokens than block_size."""
        T = idx.size(1)
        past = cache.n_tokens if cache is not None else 0
        limit = cache.limit if cache is not None else self.config.block_size
        if past + T > limit:
            raise InputError(f"{past + T} tokens do not fit into the model's block_size "
                             f"{self.config.block_size}")
        # With a cache only the first call is causal: later ones have a mask, or a single token that sees all.
        mask, positions = self._mask_and_positions(idx, documents, cache)
        is_causal = self.config.is_causal and mask is None and past == 0

        x = self.transformer["wte"](idx)  # (B, T, C)
        if self.config.n_prev:
            x = x + self.transformer["prev"](idx, documents, cache)
        rope = None
        if self.config.use_rope:
            rope = [t[positions].unsqueeze(-2) for t in (self.rope_cos, self.rope_sin)]  # ([B,] T, 1, hs/2)
        else:
            x = x + self.transformer["wpe"](positions)
        x = self.transformer["drop"](x)
        if self.is_on_gpu and in_bfloat16(x.device.type):
            x = x.bfloat16()  # the residual stream too: half the bytes between the blocks (docs/log.md)
        for block in self.transformer["h"]:
            x = block(x, rope, mask, is_causal, cache)
        x = self.transformer["ln_f"](x)  # (B, T, C)
        if cache is not None:
            cache.n_tokens += T

        logits = self.lm_head(x[:, -1:] if last_only else x)  # (B, T or 1, V)
        if targets is None:
            return logits, None
        # In float32, where the sum of many exponentials keeps its digits. A batch without counted tokens has
        # loss 0 instead of NaN: in instruction data a whole micro-batch can be questions.
        if self.gpu_cross_entropy is not None:
            total = self.gpu_cross_entropy.apply(logits.flatten(0, 1), targets.flatten(), IGNORE_INDEX)
        else:
            total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(),
                                    ignore_index=IGNORE_INDEX, reduction="sum")
        # Only the loss has a gradient. For one of the logits too, the compiler would fill and add zeros.
        return logits.detach(), total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def _mask_and_positions(self, idx, documents, cache):
        """The attention mask, as Attention takes it, and the positions: a slice, or a tensor ([B,] T)."""
        if documents is not None:
            return self._document_mask(documents), positions_in(documents)
        if cache is not None:
            return cache.mask_and_positions(idx.size(1))
        if self.config.use_rope:
            return None, slice(idx.size(1))
        return None, torch.arange(idx.size(1), device=idx.device)

    def _document_mask(self, documents):
        """A BlockMask where FlexAttention, which has no dropout, serves; else a tensor (B, 1, T, T)."""
        has_dropout = self.training and self.config.dropout > 0
        if self.use_flex_attention and not has_dropout:
            return block_mask_of(documents, self.config.is_causal)
        mask = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, T)
        return mask.tril() if self.config.is_causal else mask


def batch_loss(model, x, y, document_mask=False, bos_id=None, eos_id=None):
    """Mean loss of a batch x, y (B, T) on the model's device, a scalar tensor.

    document_mask: let no token see another document of its window; bos_id and eos_id part the documents."""
    documents = documents_of(x, bos_id, eos_id) if document_mask else None
    return model(x, y, documents=documents)[1]
