"""The command line of every script: a flag for each field of a config, and mistakes answered in one line.

This file imports no torch, so that `--help` and mistakes are answered at once.
"""

import argparse
import difflib
import glob
import json
import os
import re
import sys
from dataclasses import MISSING
from typing import Literal, get_args, get_origin, get_type_hints

from config import ROOT, ModelConfig, TrainConfig, find, load_config, nearest
from script import InputError


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
