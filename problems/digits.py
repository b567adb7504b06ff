"""Strings of digits, answered in one pass with full attention.

    sort          114515 → 111455
    palindrome    123456 → 654321
"""

import numpy as np

from problems.task import DIGITS, Task
from script import InputError


def generate(rng, n, settings):
    """n strings of `length` digits. Raises InputError if `length` is below 1."""
    if settings["length"] < 1:
        raise InputError(f"length {settings['length']}: must be at least 1")
    digits = rng.integers(ord("0"), ord("9") + 1, (n, settings["length"]), dtype=np.uint8)
    return [row.tobytes().decode() for row in digits]


def check(text, settings):
    if len(text) != settings["length"]:
        digits = "1 digit" if len(text) == 1 else f"{len(text)} digits"
        raise InputError(f"{text}: {digits}, but the model was trained on {settings['length']}; "
                         f"train one with --length {len(text)}")


def sort(text):
    return "".join(sorted(text))


def reverse(text):
    return text[::-1]


def block_size(settings):
    return settings["length"]


SETTINGS = {"length": (6, "digits in an input")}
# Learned positions: at this length they learn faster than RoPE (docs/problems.md).
MODEL = dict(n_layer=2, n_head=4, n_embd=64, is_causal=False, use_rope=False)

SORT = Task(
    generate=generate,
    answer=sort,
    vocabulary=DIGITS,
    settings=SETTINGS,
    block_size=block_size,
    check=check,
    model={**MODEL, "activation": "relu2"},
    train=dict(max_steps=1500),
)
PALINDROME = Task(
    generate=generate,
    answer=reverse,
    vocabulary=DIGITS,
    settings=SETTINGS,
    block_size=block_size,
    check=check,
    model=MODEL,
    train=dict(max_steps=500),
)
