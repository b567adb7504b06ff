"""Settings of the model and of training: fields, defaults, JSON files, command line, validation.

A value comes from the command line (`--learning_rate 1e-3`), else from the JSON file
(`config_pretrain.json`), else from the defaults below. An unknown key, a value of the wrong type and a
combination that cannot work stop the program with one line that names the key.

This file imports no torch, so that `--help` and mistakes are answered at once.
"""

import argparse
import difflib
import glob
import json
import math
import os
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal, get_args, get_origin, get_type_hints

from script import InputError, note

IGNORE = -1  # a target that carries no loss
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
        """Check what single fields cannot show. Raises InputError naming the keys."""
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
    timeout_minutes: float = option(10.0, "end the run if a process does not answer for this long", above=0.0)
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
        "auto", "torch.compile the model? auto: on CUDA, for 1000 steps or more")
    document_mask: bool = option(False, "hide the other documents of a window from each token?")
    log_stats: int = option(0, "steps between records of statistics per layer (stats.py); 0: none", least=0)
    skip_nonfinite: int = option(0, "steps with a non-finite gradient to skip before stopping", least=0)

    def validate(self, where="train config"):
        """Check what single fields cannot show. Raises InputError naming the keys."""
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


def parse_bool(text):
    """true/false as a command line or a person writes them."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse_switch(text):
    """The value of a choice that has "true" and "false" among others."""
    try:
        return str(parse_bool(text)).lower()
    except argparse.ArgumentTypeError:
        return text


def parse_pairs(text):
    """The value of --dataset_path, JSON such as [["train.npy", "val.npy"]]."""
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text} is not JSON; write [["train.npy", "val.npy"]], in PowerShell \\" for each "') from None


def parse_value(kind):
    """The function that turns a command-line word into a field of type `kind`."""
    if get_origin(kind) is list:
        return parse_pairs
    if get_origin(kind) is Literal:
        return parse_switch if "true" in get_args(kind) else str
    return parse_bool if kind is bool else kind


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line and an unknown flag is answered with the nearest one."""

    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **kwargs)

    def error(self, message):
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            # Compared without the dashes, by which all of them are alike.
            known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
            word = message[len(prefix):].split()[0].split("=")[0].lstrip("-")
            message += nearest(word, known).replace('"', '"--', 1)
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)

    def add_config(self, cls, skip=(), defaults=None):
        """Add a `--field value` flag for every field of a config class, except where that flag exists.

        skip: names to leave out. defaults: a dict of those that differ from the class's, for the help."""
        group = self.add_argument_group(cls.__doc__.splitlines()[0])
        for name, kind in get_type_hints(cls).items():
            if name in skip or f"--{name}" in self._option_string_actions:
                continue
            f = cls.__dataclass_fields__[name]
            default = f.default if f.default is not MISSING else f.default_factory()
            default = (defaults or {}).get(name, default)
            choices = get_args(kind) if get_origin(kind) is Literal else None
            extra = {"nargs": "?", "const": True} if kind is bool else {}
            if choices and "true" in choices:
                extra = {"nargs": "?", "const": "true"}
            group.add_argument(f"--{name}", type=parse_value(kind), choices=choices,
                               default=argparse.SUPPRESS,
                               metavar=None if choices else getattr(kind, "__name__", "json").upper(),
                               help=f"{f.metadata['help']} (default {default})".replace("%", "%%"), **extra)
        return self

    def overrides(self, args, cls):
        """The fields of `cls` that were given on the command line, as a dict."""
        return {name: getattr(args, name) for name in get_type_hints(cls) if hasattr(args, name)}


def load_config(cls, path, overrides=None):
    """A validated `cls` from a JSON file (None: defaults), with the dict `overrides` over it.

    Raises InputError naming the file and the key."""
    values = read_json(path) if path else {}
    where = path or cls.__name__
    from_dict(cls, values, where)
    config = from_dict(cls, {**values, **(overrides or {})}, "command line")
    if cls is TrainConfig:
        shorten_warmup(config, overrides or {})
    return config.validate(f"{where} with the command line" if overrides else where)


def find(path, root=ROOT):
    """`path` as given, or else relative to the repo root, where the configs look."""
    return path if os.path.exists(path) else os.path.join(root, path)


def numbered_texts(path, root=ROOT):
    """The pairs of files that data.py wrote for several texts beside `path`, for --dataset_path; [] if `path`
    is not pretrain_train.npy or pretrain_val.npy, whose place they take."""
    folder, name = os.path.split(path)
    if name not in ("pretrain_train.npy", "pretrain_val.npy"):
        return []
    pairs = [[os.path.join(folder, f"pretrain_{i}_{side}.npy") for side in ("train", "val")]
             for i in range(100)]
    return [pair for pair in pairs if os.path.exists(os.path.join(root, pair[0]))]


def check_files(config, train_config, root):
    """Raise InputError for data or a checkpoint that does not exist, before torch is imported."""
    if not config.dataset_path:
        raise InputError(f'{train_config}: dataset_path is not set; give [["train.npy", "val.npy"]]')
    for path in (path for pair in config.dataset_path for path in pair):
        if os.path.exists(os.path.join(root, path)):
            continue
        if pairs := numbered_texts(path, root):
            raise InputError(f"{path}: no such file, but data.py wrote {len(pairs)} texts; train on them "
                             f"with --dataset_path '{json.dumps(pairs, ensure_ascii=False)}'")
        raise InputError(f"{path}: no such file; run python data.py first")
    path = config.from_checkpoint
    if path and path != "latest" and not os.path.exists(find(path, root)):
        last = re.sub(r"_best\.pt$", "_last.pt", path)
        hint = what_there_is(path, root)
        if last != path and os.path.exists(find(last, root)):
            hint = f"; start from the last one instead: --from_checkpoint {last}"
        raise InputError(f"from_checkpoint {path}: no such file{hint}")


def require_checkpoint(path):
    """Raise InputError if there is no such file or folder (see `find`), before torch is imported."""
    if not os.path.exists(find(path)):
        raise InputError(f"{path}: no such file{what_there_is(path)}")


def what_there_is(wanted="", root=ROOT):
    """The end of a message about a missing checkpoint: the one in checkpoint/ whose name is that of `wanted`
    or nearly so, else which ones there are: those with fixed names, then the newest."""
    paths = glob.glob(os.path.join(glob.escape(root), "checkpoint", "*.pt"))
    found = set(map(os.path.basename, paths))
    if not found:
        return "; train a model first (python train.py)"
    fixed = sorted(name for name in found if re.fullmatch(r"[a-z]+_(best|last)\.pt", name))
    # A dated name holds date and time, by which it sorts: pretrain_20261128_102506_best.pt
    dated = sorted(found.difference(fixed), key=lambda name: (name.partition("_")[2], name), reverse=True)
    name = os.path.basename(wanted)
    close = [name] if name in found else difflib.get_close_matches(name, [*fixed, *dated], n=1, cutoff=0.8)
    if close:
        return f"; did you mean checkpoint/{close[0]}?"
    return "; there are " + ", ".join(f"checkpoint/{name}" for name in [*fixed, *dated][:8])


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


def command_line(doc, add_flags=None, argv=None, root=ROOT):
    """Parse the flags of a training script: args.task, args.train, args.model, args.model_flags, ….

    add_flags: called with the Parser, for flags that only one script has. argv: instead of the process's own.
    root: the folder with the JSON files, dataset/ and checkpoint/. Raises InputError."""
    cli = Parser(doc)
    cli.add_argument("-t", "--task", choices=("pretrain", "sft"), default="pretrain")
    cli.add_argument("--model_config", default=os.path.join(root, "model_config.json"), metavar="FILE")
    cli.add_argument("--train_config", metavar="FILE", help="default: config_<task>.json")
    cli.add_argument("--tensorboard", metavar="DIR", help="write the curves there too, for TensorBoard")
    if add_flags:
        add_flags(cli)
    cli.add_config(TrainConfig).add_config(ModelConfig)
    args = cli.parse_args(argv)
    args.root = root
    args.train_config = args.train_config or os.path.join(root, f"config_{args.task}.json")
    args.train = load_config(TrainConfig, args.train_config, cli.overrides(args, TrainConfig))
    args.model_flags = cli.overrides(args, ModelConfig)
    args.model = load_config(ModelConfig, args.model_config, args.model_flags)
    check_files(args.train, args.train_config, root)
    return args
