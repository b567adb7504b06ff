"""Settings of the model and of training: fields, defaults, JSON files, validation.

A value comes from the command line (`--learning_rate 1e-3`), else from the JSON file
(`config_pretrain.json`), else from the defaults below. An unknown key, a value of the wrong type and a
combination that cannot work stop the program with one line that names the key.

This file imports no torch, so that `--help` and mistakes are answered at once.
"""

import difflib
import json
import math
import os
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin, get_type_hints

from script import InputError, note

IGNORE_INDEX = -1  # a target that carries no loss
ROOT = os.path.dirname(os.path.abspath(__file__))


def option(default, help, **limits):
    """A config field with its help text and its limits (`above`, `least`, `below`)."""
    metadata = {"help": help, **limits}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The shape of a GPT; `model_config.json`."""

    block_size: int = option(256, "context length, in tokens", least=1)
    vocab_size: int = option(10000, "number of token ids (training takes the tokenizer's)", least=1)
    n_layer: int = option(4, "number of Transformer blocks", least=1)
    n_head: int = option(4, "number of attention heads", least=1)
    n_embd: int = option(256, "width of the residual stream", least=1)
    dropout: float = option(0.0, "dropout probability", least=0.0, below=1.0)
    bias: bool = option(False, "add a bias to the linear layers?")
    use_rope: bool = option(True, "rotary positions (RoPE)? otherwise learned ones")
    norm_eps: float = option(1e-5, "epsilon of the RMSNorm", above=0.0)
    is_causal: bool = option(True, "causal attention? otherwise every token sees all others")
    n_kv_head: int = option(0, "key/value heads (GQA); 0: as many as n_head", least=0)
    activation: Literal["gelu", "relu2", "swiglu"] = option("gelu", "MLP activation")
    qk_norm: bool = option(False, "normalise queries and keys (RMSNorm) before attention?")
    rope_theta: float = option(10000.0, "base of the RoPE frequencies", above=0.0)
    n_prev: int = option(0, "number of preceding tokens that each input embeds too, each with its own table",
                         least=0)
    final_norm: Literal["rmsnorm", "layernorm"] = option("rmsnorm", "norm before lm_head")
    n_hidden: int = option(0, "hidden width of the MLP; 0: 4 n_embd, or 8/3 n_embd for swiglu", least=0)

    def validate(self, where="model config"):
        """Check fields that depend on each other. Raises InputError naming the keys."""
        check_limits(self, where)
        if self.n_embd % self.n_head:
            raise InputError(f"{where}: n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise InputError(f"{where}: n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        head_size = self.n_embd // self.n_head
        if self.use_rope and head_size % 2:
            raise InputError(f"{where}: use_rope needs an even head size, but n_embd / n_head is "
                             f"{head_size}; change one of them, or set use_rope to false")
        return self


@dataclass
class TrainConfig:
    """How to train; `config_pretrain.json`, `config_sft.json`."""

    dropout: float = option(0.0, "dropout probability; overrides the model's", least=0.0, below=1.0)
    learning_rate: float = option(6e-4, "peak learning rate", above=0.0)
    weight_decay: float = option(1e-1, "decoupled weight decay of the matrices", least=0.0)
    beta1: float = option(0.9, "first moment decay of AdamW", least=0.0, below=1.0)
    beta2: float = option(0.99, "second moment decay of AdamW", least=0.0, below=1.0)
    decay_lr: bool = option(True, "warm up and decay the learning rate?")
    warmup_iters: int = option(300, "steps of linear warm-up", least=0)
    lr_decay_iters: int = option(100000, "step at which min_lr is reached; 0: max_steps or max_minutes",
                                least=0)
    min_lr: float = option(6e-5, "final learning rate", least=0.0)
    batch_size: int = option(100, "rows in a micro-batch", least=1)
    random_seed: int = option(1337, "seed of initialisation, data order and dropout", least=0,
                             below=2**63)
    dataset_path: list[list[str]] = option([], "[[train, val], …] prepared files, read in this order")
    eval_interval: int = option(100, "steps between validations", least=1)
    log_interval: int = option(1, "steps between log lines", least=1)
    eval_iters: int = option(5, "batches in a validation", least=1)
    backend: str = option("nccl", "torch.distributed backend (falls back to gloo without CUDA)")
    timeout_minutes: float = option(10.0, "end a distributed run if a process is silent for this long",
                                    above=0.0)
    device: str = option("cuda", "auto, cuda, cuda:N, mps or cpu")
    sdp_kernel: Literal["flash", "mem_efficient", "math"] = option("flash", "attention kernel")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "compute type of matrix products")
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping", least=0.0)
    gradient_accumulation_steps: int = option(4, "micro-batches in a step, over all processes", least=1)
    from_checkpoint: str = option("", 'checkpoint to start from, or "latest"')
    optimizer: Literal["adamw", "muon"] = option("adamw", "optimizer of the matrices")
    embedding_lr: float = option(1.0, "learning rate of the token embedding, as a multiple of learning_rate",
                                 above=0.0)
    lr_schedule: Literal["cosine", "linear"] = option("cosine", "shape of the decay")
    max_steps: int = option(0, "stop after this many steps; 0: no limit", least=0)
    max_minutes: float = option(0.0, "stop (and save) after this many minutes; 0: no limit", least=0.0)
    save_interval: int = option(1000, "steps between unconditional checkpoints", least=1)
    compile: Literal["auto", "true", "false"] = option(
        "auto", "torch.compile the model? auto: on CUDA, for runs of 1000 steps or 2 minutes")
    document_mask: bool = option(False, "hide the other documents of a window from each token?")
    log_stats: int = option(0, "steps between records of statistics per layer (stats.py); 0: none", least=0)
    skip_nonfinite: int = option(0, "steps with a non-finite gradient to skip before stopping", least=0)

    def validate(self, where="train config"):
        """Check fields that depend on each other. Raises InputError naming the keys."""
        check_limits(self, where)
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise InputError(f"{where}: min_lr {self.min_lr:g} is above learning_rate {self.learning_rate:g}")
        decay_until = self.lr_decay_iters or self.max_steps
        if self.decay_lr and not decay_until and not self.max_minutes:
            raise InputError(f"{where}: lr_decay_iters 0 means max_steps or max_minutes, but neither is set; "
                             "set one of the three")
        if self.decay_lr and 0 < decay_until <= self.warmup_iters:
            raise InputError(f"{where}: warmup_iters {self.warmup_iters} must be below the step at which the "
                             f"decay ends ({decay_until}: lr_decay_iters, or max_steps where that is 0)")
        if not all(len(pair) == 2 for pair in self.dataset_path):
            raise InputError(f'{where}: dataset_path must be a list of pairs, [["train.npy", "val.npy"], …]')
        return self


def shorten_warmup(config, given):
    """Let a warm-up that would outlast the decay take a tenth of it, and say so.

    given: the fields that were set on the command line. There a warm-up means what it says."""
    decay_until = config.lr_decay_iters or config.max_steps
    if config.decay_lr and 0 < decay_until <= config.warmup_iters and "warmup_iters" not in given:
        note(f"warmup_iters {decay_until // 10} instead of {config.warmup_iters}, since the decay ends at "
             f"step {decay_until}")
        config.warmup_iters = decay_until // 10


def check_limits(config, where):
    """Compare every number with the limits in its field's metadata."""
    for f in fields(config):
        value, limit = getattr(config, f.name), f.metadata
        for word, wrong in (("above", lambda a, b: not a > b), ("least", lambda a, b: not a >= b),
                            ("below", lambda a, b: not a < b)):
            if word in limit and wrong(value, limit[word]):
                text = {"above": "above", "least": "at least", "below": "below"}[word]
                raise InputError(f"{where}: {f.name} is {value!r}, but must be {text} {limit[word]}")


def nearest(name, known):
    """'; did you mean "x"?' for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def read_json(path):
    """The object in a JSON file. Raises InputError naming the file and the line."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            value = json.load(f)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise InputError(f"{path}: not valid JSON ({str(error).split(';')[0]})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, {{…}}")
    return value


def cast(name, value, kind, where):
    """`value` as a field of type `kind`. int is accepted for float; no other conversion is done, except that
    a bool stands for the text of a choice that has it ("true", "false")."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if isinstance(value, bool) and str(value).lower() in choices:
            return str(value).lower()
        if value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise InputError(f"{where}: {name} is {value!r}, but must be one of {', '.join(choices)}{hint}")
        return value
    if get_origin(kind) is list:
        if not isinstance(value, list) or not all(
                isinstance(row, list) and all(isinstance(item, str) for item in row) for row in value):
            raise InputError(f'{where}: {name} must be a list of pairs, [["train.npy", "val.npy"], …]')
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: {name} is {value!r}, but must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{where}: {name} is {value}, but must be a finite number")
    return value


def from_dict(cls, values, where):
    """A `cls` from a dict such as a JSON file holds. Raises InputError for unknown keys and wrong types."""
    kinds = get_type_hints(cls)
    for name in values:
        if name not in kinds:
            raise InputError(f'{where}: unknown key "{name}"{nearest(name, kinds)}')
    return cls(**{name: cast(name, value, kinds[name], where) for name, value in values.items()})


def load_config(cls, path, overrides=None):
    """A validated `cls` from a JSON file (None: defaults), with the dict `overrides` over it.

    Raises InputError naming the file and the key."""
    values = read_json(path) if path else {}
    where = path or cls.__name__
    from_dict(cls, values, where)  # alone first, so that a mistake in the file is not blamed on the flags
    config = from_dict(cls, {**values, **(overrides or {})}, "command line")
    if cls is TrainConfig:
        shorten_warmup(config, overrides or {})
    return config.validate(f"{where} with the command line" if overrides else where)


def find(path, root=ROOT):
    """`path` as given, or else relative to the repo root, where the configs look."""
    return path if os.path.exists(path) else os.path.join(root, path)


def check_sampling(temperature, top_k, top_p, repetition_penalty, repeat_last_n=-1):
    """Raises InputError naming the first parameter that is out of range."""
    for name, value, good, rule in (
            ("temperature", temperature, 0 <= temperature < float("inf"), "0 or above"),
            ("top_k", top_k, top_k >= 0, "0 (off) or above"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "above 0"),
            ("repeat_last_n", repeat_last_n, repeat_last_n >= -1, "-1 (all), 0 (off) or above")):
        if not good:
            raise InputError(f"{name} is {value}, but must be {rule}")
