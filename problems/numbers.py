"""Whole numbers, answered token by token.

    q    closed loops in the digits (0, 6 and 9 have one, 8 has two): 8086 → 6
"""

import re

import numpy as np

from problems.task import DIGITS, Task
from script import InputError

LOOPS = {"0": 1, "6": 1, "8": 2, "9": 1}


def generate(rng, n, settings):
    """n numbers from min_number to max_number: first the number of digits is sampled, then the number.

    Raises InputError for limits that are out of order or out of range."""
    low = settings["min_number"]
    high = settings["max_number"]
    if not 0 <= low <= high < 10**18:
        raise InputError(f"min_number {low}, max_number {high}: must be from 0 up, in order, and below 10^18")
    digits = rng.integers(len(str(low)), len(str(high)) + 1, n)
    smallest = np.where(digits == 1, 0, 10 ** (digits - 1))
    numbers = rng.integers(np.maximum(low, smallest), np.minimum(high, 10**digits - 1) + 1)
    return [str(number) for number in numbers.tolist()]


def generate_with_eights(rng, n, settings):
    """`generate`, but in half of the numbers a random share of the digits becomes eights, within the limits.

    High counts are so rare among plain numbers that training would hardly see them."""
    texts = generate(rng, n, settings)
    shares = rng.random(n) * (rng.random(n) < 0.5)
    for i, share in enumerate(shares):
        is_eight = rng.random(len(texts[i])) < share
        text = "".join("8" if eight else digit for digit, eight in zip(texts[i], is_eight, strict=True))
        if settings["min_number"] <= int(text) <= settings["max_number"]:
            texts[i] = text
    return texts


def count_loops(text):
    return str(sum(LOOPS.get(digit, 0) for digit in text))


def check(text, settings):
    if not re.fullmatch("0|[1-9][0-9]*", text):
        raise InputError(f"{text}: write a whole number without leading zeros")
    if not settings["min_number"] <= int(text) <= settings["max_number"]:
        raise InputError(f"{text}: the model was trained on numbers from {settings['min_number']} to "
                         f"{settings['max_number']}; train one with --min_number, --max_number")


def block_size(settings):
    return len(str(settings["max_number"])) + 3  # "=", the answer and <|eos|>


Q = Task(
    generate=generate,
    practice=generate_with_eights,
    answer=count_loops,
    vocabulary=DIGITS,
    settings={"min_number": (0, "smallest number"), "max_number": (99_999_999, "largest number")},
    block_size=block_size,
    check=check,
    model=dict(n_layer=2, n_head=4, n_embd=64),
    train=dict(max_steps=2000),
)
