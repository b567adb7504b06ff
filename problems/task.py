"""What a problem is: how to draw inputs, the right answers, and the settings to train with.

A problem of your own is a file in this folder and a line in the table TASKS of problem.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

DIGITS = "0123456789"


@dataclass
class Task:
    """One problem. An input is a string without spaces; `settings` has a value for each of the task's flags.

    A causal model reads "input=" and writes the answer and <|eos|>, token by token. A model with full
    attention (`is_causal` false in `model`) reads inputs of one length and outputs an answer of the same
    length, all at once.
    """

    generate: Callable  # (rng, n, settings) → list of n inputs, sampled with the numpy Generator rng
    answer: Callable  # input → right answer
    vocabulary: str  # the characters of inputs and answers
    settings: dict  # the task's own flags: name → (default, help)
    block_size: Callable  # settings → tokens in the longest row
    check: Callable  # (input, settings) raises InputError for an input that training would not generate
    model: dict = field(default_factory=dict)  # overrides the defaults of ModelConfig
    train: dict = field(default_factory=dict)  # overrides TRAIN in problem.py
    practice: Callable | None = None  # generates the training inputs, if they differ from the test inputs
    labels: Callable | None = None  # (input, settings) → [(position, character)]: more targets on the input
    show: Callable = str  # an input as people write it
