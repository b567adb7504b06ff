"""A vocabulary that grows while a text is read, so that data.py reads the text once."""

import numpy as np

from tokenizer import SPECIAL_TOKENS, Tokenizer, is_surrogate


class GrowingTokenizer(Tokenizer):
    """A tokenizer that adds every new character it encodes to its vocabulary, in order of appearance.

    A text then needs to be read once only, instead of once for its vocabulary and once for its ids.
    `in_order` gives the final Tokenizer. Raises OverflowError if `dtype` has too few ids."""

    def __init__(self, dtype):
        super().__init__(list(SPECIAL_TOKENS), SPECIAL_TOKENS)
        self.dtype = np.dtype(dtype)
        self._id_of_code = self._id_of_code.astype(dtype)

    def encode(self, text, allow_special=False):
        codes = self._codes(text, allow_special)
        ids = self._id_of_code.take(codes)
        new = ids == self.unknown_id
        if new.any() and self._learn(codes[new]):
            ids = self._id_of_code.take(codes)
        return ids

    def _learn(self, codes):
        """Add the characters of some codes to the vocabulary; returns how many were added."""
        codes = np.unique(codes[~is_surrogate(codes)])
        first = self.vocab_size
        self.itos += map(chr, codes.tolist())
        self.vocab_size = len(self.itos)
        if self.vocab_size > np.iinfo(self.dtype).max:
            raise OverflowError(f"{self.vocab_size} entries do not fit into {self.dtype}")
        self._id_of_code[codes] = np.arange(first, self.vocab_size)
        return len(codes)

    def in_order(self):
        """(tokenizer, new_ids): the Tokenizer of the same characters, sorted, and its id for each id given so
        far, shape (vocab_size,)."""
        tokenizer = Tokenizer.build(self.itos[len(SPECIAL_TOKENS):])
        return tokenizer, np.array([tokenizer.stoi[token] for token in self.itos], self.dtype)
