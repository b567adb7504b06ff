"""The documents of a window: their numbers, positions that restart, and the mask that keeps them apart.

Used where `document_mask` is set. FlexAttention serves where it exists, a boolean mask elsewhere (model.py).
Letters in the shapes: those of model.py.
"""

import functools

import torch
import torch.nn.functional as F


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
    """The mask of documents (B, T) for FlexAttention (Dong et al. 2024), which skips fully masked blocks."""
    from torch.nn.attention.flex_attention import create_block_mask  # here: its import takes a second

    def visible(b, h, q, kv):
        same = documents[b, q] == documents[b, kv]
        return same & (q >= kv) if is_causal else same
    B, T = documents.shape
    return create_block_mask(visible, B, None, T, T, device=documents.device)


@functools.cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)


def flex_attention(q, k, v, block_mask, enable_gqa):
    """torch's, in one type; compiled on CUDA even where the model is not, since only that form is fast.

    Contiguous, since compiled kernels misread queries and keys that share memory (torch 2.13, on a CPU)."""
    from torch.nn.attention.flex_attention import flex_attention as attention
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        attention = compiled_flex_attention()
    q, k, v = (t.type_as(v).contiguous() for t in (q, k, v))
    return attention(q, k, v, block_mask=block_mask, enable_gqa=enable_gqa)
