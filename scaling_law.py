"""Scaling laws: the loss to expect of a model on a text, and the settings that follow the model's size.

The shipped laws and the rules for learning rate and weight decay were fitted to the runs in docs/scaling.md.
plan.py chooses a model by them, studies.scaling fits a law to a text.
"""

import math
import os

import numpy as np

from config import read_json

# For 256-token windows of these texts, with plan.py's SHAPE and RECIPE.
LAWS = {
    "Tiny Shakespeare": {"vocab_size": 71, "E": 0.923, "A": 131.1, "B": 61.62, "alpha": 0.521, "beta": 0.351},
    "amateur radio": {"vocab_size": 2096, "E": 0.497, "A": 243.7, "B": 40.5, "alpha": 0.456, "beta": 0.217},
}
LEARNING_RATE = 3e-3  # of a model AT_WIDTH wide
AT_WIDTH = 256


def choose_law(root, vocab_size, n_tokens, shape):
    """The law that studies.scaling fitted to this text and kind of model; else the shipped one whose
    vocabulary is nearest in size, as the alphabet decides most of the loss. And words that say which it is.

    shape: the ModelConfig fields, as a dict, that a model of this kind has."""
    path = os.path.join(root, "scaling.json")
    if os.path.isfile(path):
        study = read_json(path)
        kind = study.get("model", {})
        is_same = all(kind.get(key, 0) == shape[key] for key in shape)
        if study.get("training_tokens") == n_tokens and is_same and "law" in study:
            return study["law"], "fitted to this text (scaling.json)"
    name = min(LAWS, key=lambda name: abs(math.log(LAWS[name]["vocab_size"] / vocab_size)))
    return LAWS[name], (f"the shipped one of {name}, whose vocabulary of {LAWS[name]['vocab_size']} is "
                        "nearest; python -m studies.scaling fits one to your text")


def saturating(amount, enough, limit):
    """`amount` up to `enough`; of what is above, at most `limit` × `enough` (Muennighoff et al. 2023)."""
    excess = np.maximum(0.0, np.asarray(amount) / enough - 1)
    return np.minimum(amount, enough) + enough * limit * (1 - np.exp(-excess / limit))


def effective(n, tokens, unique):
    """What n parameters and `tokens` tokens are worth if the text has only `unique` tokens, read repeatedly.

    The limit of 5.3 is that of the paper; the other, 15.4 there, was fitted with the laws."""
    return saturating(n, unique, 5.3), saturating(tokens, unique, 8.0)


def predict(law, n, d):
    """The law's loss for n parameters and d tokens: E + A / n^alpha + B / d^beta (Hoffmann et al. 2022)."""
    return law["E"] + law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"]


def weight_decay_for(n, tokens, unique, learning_rate, in_a_step):
    """The usual 0.1, or more where n parameters could memorise a text of `unique` tokens that is read again:
    then they forget within about a pass, as learning rate × decay × steps in a pass is near 1 (a timescale
    as in Wang & Aitchison 2024; docs/scaling.md). in_a_step: tokens in a step. At most 4: short texts, which
    would get more, are learnt better with that (docs/log.md)."""
    in_a_pass = min(1.6, math.sqrt(n * tokens) / (4 * unique))
    return min(4.0, max(0.1, in_a_pass * in_a_step / (learning_rate * unique)))


def learning_rate_at(width, learning_rate=LEARNING_RATE, at_width=AT_WIDTH):
    """The learning rate of a model `width` wide, given that of one `at_width` wide: in inverse proportion, as
    in μP (Yang et al. 2022) for the hidden matrices; measured in docs/scaling.md."""
    return learning_rate * at_width / width


def step_tokens(tokens, block_size):
    """Tokens in a step for a run of `tokens`: about 2,000 steps, each a power of two of windows; from 1,024
    to 524,288 tokens, beyond which a larger batch saves hardly any steps at these sizes."""
    wanted = min(max(tokens / 2000, 1024), 524288)
    return block_size * 2 ** max(0, math.floor(math.log2(wanted / block_size)))
