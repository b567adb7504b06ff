"""The tokens before each token as part of its input (`n_prev`): a research option of model.py.

Letters in the shapes: those of model.py.
"""

import torch
import torch.nn as nn


class PrecedingTokens(nn.ModuleList):
    """Sum of the embeddings of the tokens 1 … n_prev places before each token: idx (B, T) → (B, T, C).

    A short convolution over the tokens, after the n-gram embeddings of the Byte Latent Transformer
    (Pagnoni et al. 2024). Nothing stands before the first token, or before a document's first."""

    def __init__(self, n_prev, vocab_size, n_embd):
        super().__init__(nn.Embedding(vocab_size, n_embd) for _ in range(n_prev))

    def forward(self, idx, documents=None, cache=None):
        """documents, cache: see GPT.forward. The new tokens are written into the cache, which the next call
        reads them from."""
        ids = idx
        first = 0
        columns = torch.arange(idx.size(1), device=idx.device)
        if cache is not None:
            ids = cache.ids
            first = cache.first
            columns = cache.columns(idx.size(1))
            ids.index_copy_(1, columns, idx)
        total = 0.0
        for distance, table in enumerate(self, 1):
            before = columns - distance  # (T,)
            exists = before >= first  # (T,), or (B, T) of a padded batch
            before = before.clamp(min=0)
            if documents is not None:
                exists = exists & (documents[:, before] == documents)  # (B, T)
            total = total + table(ids[:, before]) * exists.unsqueeze(-1)  # (B, T, C)
        return total
