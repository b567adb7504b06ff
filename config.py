"""Settings of the model and of training: fields, defaults, JSON files, command line, validation.

A value is looked for on the command line (`--learning_rate 1e-3`), then in the JSON file
(`config_pretrain.json`), then among the defaults below. A key that nobody knows, a value of the wrong
type and a combination that cannot work stop the program with one line that names the key.

This file imports no torch, so that `--help` and mistakes answer at once.
"""

import argparse
import contextlib
import difflib
import gc
import json
import math
import os
import sys
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal, get_args, get_origin, get_type_hints

IGNORE = -1  # a target that carries no loss
ROOT = os.path.dirname(os.path.abspath(__file__))

# Before torch loads OpenMP: let idle threads sleep soon instead of spinning. Beside one other busy process,
# spinning halves the speed of training on a CPU; alone, training does not need it (docs/benchmarks.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class InputError(Exception):
    """Something that the user gave is wrong. Its text is one line: what, where, and what to do."""

    def __str__(self):
        return " ".join(super().__str__().splitlines())  # a name in it may hold line breaks


def prepare_streams():
    """Make standard input, output and error usable: a closed one is replaced by the null device, and
    characters that the output's encoding lacks are written as backslash escapes instead of failing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # its descriptor was closed; the next file opened takes its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def before_imports(parse):
    """What a script does before it imports torch, which takes seconds: call `parse()`, so that --help and
    mistakes in flags and files answer at once.

    From here to `run_script` the garbage collector is off: importing creates half a million objects that
    stay, and scanning them again and again takes a fifth of the time of the imports."""
    prepare_streams()
    try:
        parse()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    gc.disable()


def run_script(main):
    """Call `main()` as a script does: an `InputError` becomes one line on stderr and exit status 2."""
    prepare_streams()
    if not gc.isenabled():
        gc.freeze()  # what was imported stays, so later collections skip it
        gc.enable()
    try:
        status = main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output (`| head`) has closed it: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file for writing that appears at `path` whole or not at all: a temporary file in the same
    folder, synced to disk and then renamed. mode: "wb" or "w" (UTF-8).

    If anything fails the old file stays as it was and the temporary file is removed. An OSError becomes an
    InputError that names `path`."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(temporary)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None


def sync_folder(path):
    """Make a rename in the folder of `path` survive a power failure."""
    if os.name == "posix":
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def print_json(result):
    """Print a dict as one JSON line, the last of a script's output; non-finite numbers become null."""
    def finite(value):
        if isinstance(value, dict):
            return {str(key): finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value
    print(json.dumps(finite(result), allow_nan=False))


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
    is_causal: bool = option(True, "causal attention? otherwise every token sees all")
    n_kv_head: int = option(0, "key/value heads (GQA); 0: as many as n_head", least=0)
    activation: Literal["gelu", "relu2", "swiglu"] = option("gelu", "MLP activation")
    qk_norm: bool = option(False, "normalise queries and keys (RMSNorm) before attention?")
    rope_theta: float = option(10000.0, "base of the RoPE frequencies", above=0.0)
    n_prev: int = option(0, "how many preceding tokens each input embeds too, each with a table of its own",
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

    dropout: float = option(0.0, "dropout probability; goes over the model's", least=0.0, below=1.0)
    learning_rate: float = option(6e-4, "peak learning rate", above=0.0)
    weight_decay: float = option(1e-1, "decoupled weight decay of the matrices", least=0.0)
    beta1: float = option(0.9, "first moment decay of AdamW", least=0.0, below=1.0)
    beta2: float = option(0.99, "second moment decay of AdamW", least=0.0, below=1.0)
    decay_lr: bool = option(True, "warm up and decay the learning rate?")
    warmup_iters: int = option(300, "steps of linear warm-up", least=0)
    lr_decay_iters: int = option(100000, "step at which min_lr is reached; 0: max_steps", least=0)
    min_lr: float = option(6e-5, "final learning rate", least=0.0)
    batch_size: int = option(100, "rows in a micro-batch", least=1)
    random_seed: int = option(1337, "seed of initialisation, data order and dropout", least=0,
                             below=2**63)
    dataset_path: list[list[str]] = option([], "[[train, val], …] prepared files, walked in this order")
    eval_interval: int = option(100, "steps between validations", least=1)
    log_interval: int = option(1, "steps between log lines", least=1)
    eval_iters: int = option(5, "batches in a validation", least=1)
    backend: str = option("nccl", "torch.distributed backend (gloo is taken where there is no CUDA)")
    timeout_minutes: float = option(10.0, "end the run if a process does not answer for so long", above=0.0)
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
    compile: bool = option(False, "torch.compile the model?")
    document_mask: bool = option(False, "let no token see another document of its window?")
    skip_nonfinite: int = option(0, "steps with a non-finite gradient to pass over before stopping", least=0)

    def validate(self, where="train config"):
        """Check what single fields cannot show. Raises InputError naming the keys."""
        check_limits(self, where)
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise InputError(f"{where}: min_lr {self.min_lr:g} is above learning_rate {self.learning_rate:g}")
        decay_until = self.lr_decay_iters or self.max_steps
        if self.decay_lr and not decay_until:
            raise InputError(f"{where}: lr_decay_iters 0 means max_steps, but max_steps is not set; "
                             "set one of them")
        if self.decay_lr and decay_until <= self.warmup_iters:
            raise InputError(f"{where}: warmup_iters {self.warmup_iters} must be below the step at which the "
                             f"decay ends ({decay_until}: lr_decay_iters, or max_steps where that is 0)")
        if not all(len(pair) == 2 for pair in self.dataset_path):
            raise InputError(f'{where}: dataset_path must be a list of pairs, [["train.npy", "val.npy"], …]')
        return self


def check_limits(config, where):
    """Hold every number against the limits in its field's metadata."""
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
    """`value` as a field of type `kind`; int passes for float, nothing else is bent."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
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
    raise ValueError(text)


def parse_value(kind):
    """The function that turns a command-line word into a field of type `kind`."""
    if get_origin(kind) is list:
        return json.loads
    if get_origin(kind) is Literal:
        return str
    return parse_bool if kind is bool else kind


class Parser(argparse.ArgumentParser):
    """argparse with our manners: a mistake is one line, an unknown flag is answered with the nearest."""

    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **kwargs)

    def error(self, message):
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            known = [name for action in self._actions for name in action.option_strings]
            message += nearest(message[len(prefix):].split()[0].split("=")[0], known)
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)

    def add_config(self, cls, skip=(), defaults=None):
        """A `--field value` flag for every field of a config class that no earlier flag has taken.

        defaults: a dict of those that differ from the class's, for the help."""
        group = self.add_argument_group(cls.__doc__.splitlines()[0])
        for name, kind in get_type_hints(cls).items():
            if name in skip or f"--{name}" in self._option_string_actions:
                continue
            f = cls.__dataclass_fields__[name]
            default = f.default if f.default is not MISSING else f.default_factory()
            default = (defaults or {}).get(name, default)
            choices = get_args(kind) if get_origin(kind) is Literal else None
            extra = {"nargs": "?", "const": True} if kind is bool else {}
            group.add_argument(f"--{name}", type=parse_value(kind), choices=choices,
                               default=argparse.SUPPRESS,
                               metavar=None if choices else getattr(kind, "__name__", "json").upper(),
                               help=f"{f.metadata['help']} (default {default})".replace("%", "%%"), **extra)
        return self

    def overrides(self, args, cls):
        """The fields of `cls` that were given on the command line, as a dict."""
        return {name: getattr(args, name) for name in get_type_hints(cls) if hasattr(args, name)}


def load_config(cls, path, overrides=None):
    """A validated `cls` from a JSON file (None: defaults), with `overrides` over it.

    Raises InputError naming the file and the key."""
    values = read_json(path) if path else {}
    where = path or cls.__name__
    from_dict(cls, values, where)
    config = from_dict(cls, {**values, **(overrides or {})}, "command line")
    return config.validate(f"{where} with the command line" if overrides else where)


def command_line(doc, add_flags=None):
    """Parse the flags of a training script, one process or several.

    add_flags: called with the Parser, for flags that one script alone has."""
    cli = Parser(doc)
    cli.add_argument("-t", "--task", choices=("pretrain", "sft"), default="pretrain")
    cli.add_argument("--model_config", default=os.path.join(ROOT, "model_config.json"), metavar="FILE")
    cli.add_argument("--train_config", metavar="FILE", help="default: config_<task>.json")
    if add_flags:
        add_flags(cli)
    cli.add_config(TrainConfig).add_config(ModelConfig)
    args = cli.parse_args()
    args.train_config = args.train_config or os.path.join(ROOT, f"config_{args.task}.json")
    args.train = load_config(TrainConfig, args.train_config, cli.overrides(args, TrainConfig))
    args.model_flags = cli.overrides(args, ModelConfig)
    args.model = load_config(ModelConfig, args.model_config, args.model_flags)
    return args
