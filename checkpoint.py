"""Checkpoints: one .pt file that holds a plain dict (strings, numbers, lists, tensors) and nothing that runs.

    python checkpoint.py checkpoint/sft_best.pt                    what is in the file
    python checkpoint.py checkpoint/ds checkpoint/ckpt_ds.pt       a DeepSpeed checkpoint as one such file
    python checkpoint.py checkpoint/sft_best.pt tokenizer.json     its vocabulary, for data.py --tokenizer

A file is written under a temporary name, synced and renamed, so that a reader finds the old one or the new
one and never a half. It is read with weights_only=True, after its checksums have been compared.
"""

import contextlib
import glob
import os
import shutil
import sys
import tempfile
import time
import zipfile

from config import ModelConfig, find, from_dict
from flags import Parser, what_there_is
from script import InputError, atomic_write, before_imports, replacing, run_script


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("checkpoint", help="a .pt file, or the folder of a DeepSpeed checkpoint")
    cli.add_argument("output", nargs="?", metavar="OUTPUT",
                     help="write it as a .pt, or its tokenizer as a .json")
    return cli.parse_args()


if __name__ == "__main__":
    before_imports(command_line)

import torch

from model import GPT
from tokenizer import Tokenizer

FORMAT = "nano-1"
KEYS = ("format", "model", "optimizer", "step", "task", "model_config", "train_config", "tokenizer_config",
        "best_val_loss", "dataloader", "rng", "scaler")
KINDS = {"model": dict, "step": int, "task": str, "model_config": dict, "train_config": dict,
         "tokenizer_config": dict, "best_val_loss": float}


def save(path, checkpoint):
    """Write `checkpoint` to `path`, whole or not at all. Raises InputError, and leaves the old file, if the
    disk is full or the folder cannot be written."""
    assert set(checkpoint) == set(KEYS), set(checkpoint) ^ set(KEYS)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_write(path) as f:
            torch.save(checkpoint, f)
    except (InputError, OSError, RuntimeError) as error:
        reason = error
        while reason.__context__ and not isinstance(reason, OSError):
            reason = reason.__context__  # torch raises a RuntimeError of its own after a failed write
        reason = getattr(reason, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path}: could not be saved ({reason}); earlier checkpoints are whole") from None


def prepare_folder(folder):
    """Create the folder of the checkpoints, remove what a killed run left half-written, and try to write.

    Raises InputError if nothing can be saved there, before any step of training is spent."""
    try:
        os.makedirs(folder, exist_ok=True)
        for path in glob.glob(os.path.join(glob.escape(folder), "*.pt.*.tmp")):
            if time.time() - os.path.getmtime(path) > 3600:  # a younger one may belong to another run
                os.remove(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: checkpoints cannot be saved there ({error.strerror})") from None


def alias(path, name):
    """Let the fixed `name`, in the same folder, stand for the file `path`, in one step."""
    target = os.path.join(os.path.dirname(path), name)
    try:
        with replacing(target) as temporary:
            try:
                os.link(path, temporary)  # a second name for the same bytes: costs no space
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
    except InputError as error:
        raise InputError(f"{error}; {path} is whole") from None


def load(path):
    """The checkpoint dict in `path`, on the CPU. Raises InputError for whatever is wrong with it."""
    path = find(path)
    if os.path.isdir(path):
        return from_deepspeed(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself does not compare the checksums
            for entry in archive.infolist():
                if entry.external_attr & 0x10:  # torch would take it for a folder and read stray memory
                    damaged = entry.filename
            if damaged:
                raise InputError(f"{path}: damaged (in {damaged}); take an earlier checkpoint")
        with torch.serialization.safe_globals(stand_ins()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name == "posix")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{what_there_is(path)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        reason = "it would run code" if "Unsupported" in str(error) or "WeightsUnpickler" in str(error) else \
            str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a checkpoint that can be loaded safely ({reason})") from None
    if isinstance(checkpoint, dict) and "step_count" in checkpoint:
        checkpoint = from_reference(checkpoint, path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT or set(checkpoint) != set(KEYS):
        raise InputError(f"{path}: not a checkpoint of this program")
    for name, kind in KINDS.items():
        if not isinstance(checkpoint[name], kind):
            raise InputError(f"{path}: not a checkpoint of this program ({name} is no {kind.__name__})")
    return checkpoint


def peek(path):
    """Task, "<date>_<time>" of its run (None in older files), and step of a checkpoint, without reading its
    tensors. Raises InputError for a file that is damaged or no checkpoint."""
    try:
        with torch.serialization.safe_globals(stand_ins()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint["task"], (checkpoint["dataloader"] or {}).get("stamp"), checkpoint["step"]
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        raise InputError(f"{path}: not a checkpoint that can be loaded ({type(error).__name__})") from None


class ModelStandIn:
    """Takes the place of the reference project's pickled `model.ModelConfig`; it only holds values."""


class TrainStandIn:
    """Takes the place of the reference project's pickled `model.TrainConfig`."""


def stand_ins():
    return [(ModelStandIn, "model.ModelConfig"), (TrainStandIn, "model.TrainConfig")]


def from_reference(old, path):
    """A checkpoint of the reference project (bd4sur/Nano) as one of ours, without its optimizer state.

    Its vocabulary may hold words of several characters. Its weights have GPT-2's names, or since October 2024
    Llama's. Raises InputError for LoRA weights, and for what does not fit together."""
    if old.get("is_lora"):
        raise InputError(f"{path}: holds LoRA weights, not a model; merge them into their base model with "
                         "the program that wrote them")
    try:
        values = vars(old["model_config"])
        known = {name: values[name] for name in ModelConfig.__dataclass_fields__ if name in values}
        if "tok_embeddings.weight" in old["model"]:
            weights, config = from_llama_names(old["model"], known, path)
        else:
            weights, config = old["model"], {**known, "final_norm": "layernorm"}  # a LayerNorm without bias
        return {
            "format": FORMAT, "model": weights, "optimizer": None, "step": old["step_count"],
            "task": "reference", "model_config": {**config, "vocab_size": len(weights["lm_head.weight"])},
            "train_config": {}, "tokenizer_config": old["tokenizer_config"], "best_val_loss": float("inf"),
            "dataloader": None, "rng": None, "scaler": None,
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: a checkpoint of the reference project, but without {error}") from None
    except RuntimeError as error:  # matrices of widths that cannot be joined
        raise InputError(f"{path}: weights that do not fit together ({error})") from None


def from_llama_names(old, values, path):
    """Weights and config of the reference project's newer layout under our names.

    old: state dict with wq, wk, wv and w1 (gate), w3 (up), which we store joined. values: its config, where
    None stands for a width that follows from the others. Raises KeyError for a missing weight."""
    rest = dict(old)
    wte = rest.pop("tok_embeddings.weight")
    if not torch.equal(rest.pop("output.weight"), wte):
        raise InputError(f"{path}: output.weight differs from tok_embeddings.weight, but here they are tied")
    weights = {"transformer.wte.weight": wte, "lm_head.weight": wte,
               "transformer.ln_f.weight": rest.pop("norm.weight")}
    if not values["use_rope"]:
        weights["transformer.wpe.weight"] = rest.pop("wpe.weight")
    n_hidden = 0
    for i in range(values["n_layer"]):
        ours = f"transformer.h.{i}."
        theirs = f"layers.{i}."
        rest.pop(theirs + "attention.mask", None)  # a buffer
        qkv = [rest.pop(f"{theirs}attention.{name}.weight") for name in ("wq", "wk", "wv")]
        gate_and_up = [rest.pop(f"{theirs}feed_forward.{name}.weight") for name in ("w1", "w3")]
        weights[ours + "attn.c_attn.weight"] = torch.cat(qkv)
        weights[ours + "attn.c_proj.weight"] = rest.pop(theirs + "attention.wo.weight")
        weights[ours + "mlp.c_fc.weight"] = torch.cat(gate_and_up)
        weights[ours + "mlp.c_proj.weight"] = rest.pop(theirs + "feed_forward.w2.weight")
        weights[ours + "ln_1.weight"] = rest.pop(theirs + "attention_norm.weight")
        weights[ours + "ln_2.weight"] = rest.pop(theirs + "ffn_norm.weight")
        n_hidden = len(gate_and_up[0])
    if rest:
        raise InputError(f"{path}: the weight {min(rest)} is not known here")
    config = {**values, "n_kv_head": values["n_kv_head"] or 0, "n_hidden": n_hidden, "activation": "swiglu"}
    return weights, config


@contextlib.contextmanager
def deepspeed_weights_only():
    """In this context DeepSpeed reads its files with weights_only=True, although it asks for the opposite.

    Besides tensors and plain values they hold objects of the four classes named here only."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's log would mix with answers and tables
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
            from deepspeed.runtime.zero.config import ZeroStageEnum
            from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:
        raise InputError("a DeepSpeed checkpoint needs DeepSpeed: pip install deepspeed") from None
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # overrides torch.load's argument
    try:
        with torch.serialization.safe_globals(
                [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def find_deepspeed(path):
    """The folder with the files of all processes that `path` (checkpoint/ds, or such a folder) stands for."""
    if glob.glob(os.path.join(glob.escape(path), "*_model_states.pt")):
        return os.path.realpath(path)
    try:
        with open(os.path.join(path, "latest"), encoding="utf-8") as f:
            folder = os.path.join(path, f.read().strip())
    except OSError:
        raise InputError(f"{path}: not a DeepSpeed checkpoint (the file `latest` is missing)"
                         f"{what_there_is()}") from None
    if not glob.glob(os.path.join(glob.escape(folder), "*_model_states.pt")):
        raise InputError(f"{path}: `latest` names {os.path.basename(folder)}, which holds no checkpoint")
    return folder


def read_deepspeed(folder):
    """What train_deepspeed.py has put beside the weights: our dict without them, and the ZeRO stage."""
    path = sorted(glob.glob(os.path.join(glob.escape(folder), "*_model_states.pt")))[0]
    try:
        with deepspeed_weights_only():
            states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return states["nano"], states["zero_stage"], states["module"]
    except KeyError:
        raise InputError(f"{path}: not written by train_deepspeed.py") from None
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        raise InputError(f"{path}: cannot be loaded safely ({str(error).splitlines()[0][:80]})") from None


def from_deepspeed(path):
    """A DeepSpeed checkpoint folder as one of our checkpoints: float32, without the optimizer's state.

    Takes what zero_to_fp32.py wrote into checkpoint/ds as well: weights alone, the rest is found beside."""
    converted = os.path.join(path, "pytorch_model.bin")
    if os.path.exists(converted):
        nano, _, _ = read_deepspeed(find_deepspeed(os.path.dirname(os.path.abspath(path))))
        weights = torch.load(converted, map_location="cpu", weights_only=True)
    else:
        folder = find_deepspeed(path)
        nano, _, weights = read_deepspeed(folder)
        if glob.glob(os.path.join(glob.escape(folder), "*_optim_states.pt")):  # ZeRO split the weights
            weights = zero_to_fp32(folder)
    weights = {name: weight.float().clone() for name, weight in weights.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # tied: one tensor, written once
    checkpoint = {**nano, "model": weights, "optimizer": None, "scaler": None}
    if checkpoint.get("format") != FORMAT or set(checkpoint) != set(KEYS):
        raise InputError(f"{path}: not a checkpoint of this program")
    return checkpoint


def zero_to_fp32(folder):
    """The weights that the ZeRO files in `folder` make up, by DeepSpeed's own zero_to_fp32."""
    with deepspeed_weights_only(), open(os.devnull, "w") as quiet, \
            contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        try:
            return get_fp32_state_dict_from_zero_checkpoint(*os.path.split(folder))
        except Exception as error:  # a file is missing, damaged or hostile: DeepSpeed raises what it meets
            reason = str(error).splitlines()[0][:120]
            raise InputError(f"{folder}: cannot be put together ({reason})") from None


def build_model(checkpoint, path="checkpoint", dropout=None):
    """The GPT (in evaluation mode) and the Tokenizer of a checkpoint. `dropout` overrides the stored one."""
    values = dict(checkpoint["model_config"])
    if dropout is not None:
        values["dropout"] = dropout
    where = f"{path}: model_config"
    model = GPT(from_dict(ModelConfig, values, where).validate(where))
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: weights do not fit its model_config ({reason})") from None
    tokenizer = Tokenizer.from_dict(checkpoint["tokenizer_config"], f"{path}: tokenizer_config")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"{path}: a vocabulary of {tokenizer.vocab_size} is larger than the model's, "
                         f"{model.config.vocab_size}")
    return model.eval(), tokenizer


def main():
    args = command_line()
    checkpoint = load(args.checkpoint)
    if args.output and args.output.endswith(".json"):
        Tokenizer.from_dict(checkpoint["tokenizer_config"]).save(args.output)
    elif args.output:
        save(args.output, checkpoint)
    print(f"{args.checkpoint}: {checkpoint['task']}, step {checkpoint['step']}, "
          f"best validation loss {checkpoint['best_val_loss']:.4f}")
    for section in ("model_config", "train_config"):
        print(f"{section}: " + ", ".join(f"{key} {value}" for key, value in checkpoint[section].items()))
    print(f"{build_model(checkpoint)[0].n_params():,} parameters")


if __name__ == "__main__":
    run_script(main)
