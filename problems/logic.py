"""Logic in prefix notation, answered token by token.

    bool    + is or, * is and: (+ (* 0 1) (* 1 1)) → 1
"""

import random
import re

from problems.task import Task
from script import InputError


def generate(rng, n, settings):
    """n expressions. An argument is a digit with probability 0.2, and always at nesting `depth`; the root is
    never a digit. Raises InputError for a depth or length that allows no expression."""
    uniform = random.Random(int(rng.integers(2**63))).random

    def expression(depth):
        if depth == 0 or (uniform() < 0.2 and depth < settings["depth"]):
            return "01"[uniform() < 0.5]
        return f"({'+*'[uniform() < 0.5]}{expression(depth - 1)}{expression(depth - 1)})"

    if settings["depth"] < 1 or settings["length"] < 7:
        raise InputError(f"depth {settings['depth']}, length {settings['length']}: must be at least 1 and 7")
    texts = []
    while len(texts) < n:
        text = expression(settings["depth"])
        if len(text) + 2 <= settings["length"]:  # room for "=" and the answer
            texts.append(text)
    return texts


def evaluate(text):
    """The value of a prefix expression, its depth, and [(position, value)] of each closing bracket.

    Raises InputError that says where the expression is malformed."""
    stack = []
    closed = []
    depth = 0
    for position, character in enumerate(text):
        if character != ")":
            stack.append(int(character) if character in "01" else character)
            depth = max(depth, stack.count("("))
            continue
        bracket, operator, a, b = stack[-4:] if len(stack) >= 4 else ("", "", "", "")
        if bracket != "(" or operator not in ("+", "*") or not (isinstance(a, int) and isinstance(b, int)):
            raise InputError(f"{text}: the bracket at character {position + 1} does not close an operator "
                             "with two values, such as (+ 0 1)")
        stack[-4:] = [a | b if operator == "+" else a & b]
        closed.append((position, stack[-1]))
    if len(stack) != 1 or not isinstance(stack[0], int):
        raise InputError(f"{text}: is not one whole expression, such as (+ (* 0 1) 1)")
    return stack[0], depth, closed


def answer(text):
    value, _, _ = evaluate(text)
    return str(value)


def check(text, settings):
    _, depth, _ = evaluate(text)
    if not 1 <= depth <= settings["depth"] or len(text) + 2 > settings["length"]:
        raise InputError(f"{text}: depth {depth}, {len(text) + 2} tokens with the answer, but the model was "
                         f"trained on depth 1 to {settings['depth']}, up to {settings['length']} tokens; "
                         "train one with --depth, --length")


def labels(text, settings):
    """[(position, character)]: at each closing bracket the value of its sub-expression."""
    if not settings["label_subexpressions"]:
        return []
    _, _, closed = evaluate(text)
    return [(position, str(value)) for position, value in closed]


def show(text):
    return re.sub(r"(?<=[^(])(?=[(01])", " ", text)


def block_size(settings):
    return settings["length"]


BOOL = Task(
    generate=generate,
    answer=answer,
    vocabulary="()+*01",
    settings={
        "depth": (4, "deepest nesting of an expression"),
        "length": (64, "longest expression with = and its answer, in tokens"),
        "label_subexpressions": (True, "in training, label each closing bracket with the value of its "
                                       "sub-expression?"),
    },
    block_size=block_size,
    check=check,
    labels=labels,
    show=show,
    model=dict(n_layer=6, n_head=4, n_embd=64, activation="relu2", qk_norm=True, use_rope=False),
    train=dict(max_steps=800),
)
