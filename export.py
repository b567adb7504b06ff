"""Take a model out of this repository: for transformers and vLLM, for llama.cpp and Ollama, for a browser.

    python export.py -m checkpoint/sft_best.pt --to hf nano_hf           a folder for transformers and vLLM
    python export.py -m checkpoint/sft_best.pt --to gguf nano.gguf       a file for llama.cpp and Ollama
    python export.py -m checkpoint/sft_best.pt --to html nano.html       one page that runs it, offline

What is written is complete or absent. It is loaded again and compared with the checkpoint, where the
program that runs it is installed (pip install transformers, pip install xllamacpp). The last line on
standard output is one JSON object.
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil

from flags import Parser, require_checkpoint
from script import InputError, before_imports, print_json, replacing, run_script, sync_folder

DTYPES = {
    "hf": ("float32", "float16", "bfloat16"),
    "gguf": ("F32", "F16", "Q8_0"),
    "html": ("int8", "float16"),
}
MARKER = "nano_export.json"  # in a folder that we have written, and so may replace
FOLDER = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
          "tokenizer_config.json", MARKER}
OLDEST = {"transformers": (4, 57), "xllamacpp": (2026, 4)}  # tried, and that know Apertus


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("-m", "--model", required=True, metavar="FILE", help="checkpoint")
    cli.add_argument("--to", required=True, choices=tuple(DTYPES), help="what to write")
    cli.add_argument("--dtype", help="type of the weights: " + "; ".join(
        f"{target}: {', '.join(names)}" for target, names in DTYPES.items()) + " (default: the first)")
    cli.add_argument("output", metavar="OUT", help="the folder (hf) or file (gguf, html) to write")
    args = cli.parse_args()
    args.dtype = args.dtype or DTYPES[args.to][0]
    if args.dtype not in DTYPES[args.to]:
        cli.error(f"--dtype is {args.dtype}, but --to {args.to} takes {', '.join(DTYPES[args.to])}")
    check_output(args)
    require_checkpoint(args.model)
    return args


def check_output(args):
    """Raises InputError if OUT holds something that an export must not replace."""
    out = args.output = os.path.normpath(args.output)
    parent = os.path.dirname(out) or "."
    if not os.path.isdir(parent):
        raise InputError(f"{out}: there is no folder {parent}; create it first")
    if args.to == "hf":
        if os.path.isdir(out):
            names = set(os.listdir(out))
            if names and (MARKER not in names or names - FOLDER):
                foreign = min(names - FOLDER or names)
                raise InputError(f"{out}: holds {foreign}, which no export has written; name another folder")
        elif os.path.lexists(out):
            raise InputError(f"{out}: is a file, but --to hf writes a folder; name another one")
        return
    if os.path.isdir(out):
        raise InputError(f"{out}: is a folder, but --to {args.to} writes a file; name a file in it")
    beginning = {"gguf": b"GGUF", "html": b"<!doctype html"}[args.to]
    check_replaceable(out, beginning)
    if args.to == "gguf":
        check_replaceable(modelfile_of(out), b"# Written by export.py")


def check_replaceable(path, beginning):
    if not os.path.exists(path):
        return
    try:
        with open(path, "rb") as f:
            found = f.read(len(beginning)).lower()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if found != beginning.lower():
        raise InputError(f"{path}: a file that no export has written; remove it or name another one")


def modelfile_of(path):
    return os.path.join(os.path.dirname(path), "Modelfile")


if __name__ == "__main__":
    before_imports(command_line)

import checkpoint as ckpt
from exports import gguf as export_gguf
from exports import hf as export_hf
from exports import html as export_html
from exports.portable import TOLERANCES, architecture_of


def to_hf(args, model, tokenizer, chat):
    """Write the folder beside OUT, check it, rename it. Returns the largest difference, or None."""
    architecture = architecture_of(model, tokenizer, args.model, "hf")
    temporary = f"{args.output}.{os.getpid()}.tmp"
    try:
        os.mkdir(temporary)
        export_hf.write_folder(model, tokenizer, architecture, temporary, args.dtype, chat)
        difference = checked(args, "transformers",
                             lambda: export_hf.check_folder(model, tokenizer, temporary, chat))
        with open(os.path.join(temporary, MARKER), "w", encoding="utf-8") as f:
            json.dump({"checkpoint": os.path.basename(args.model), "dtype": args.dtype}, f)
        replace_folder(temporary, args.output)
    except OSError as error:
        raise InputError(f"{args.output}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def replace_folder(temporary, folder):
    """Rename a written folder to its final name; an earlier export there makes room for it."""
    for name in os.listdir(temporary):
        sync_file(os.path.join(temporary, name))
    earlier = f"{temporary}.earlier"
    replaces = os.path.isdir(folder)
    if replaces:
        os.rename(folder, earlier)
    try:
        os.rename(temporary, folder)
    except OSError:
        if replaces:
            os.rename(earlier, folder)
        raise
    sync_folder(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def sync_file(path):
    with open(path, "r+b") as f:
        os.fsync(f.fileno())


def to_gguf(args, model, tokenizer, chat):
    """Write the file beside OUT, check it, rename it; then the Modelfile. Returns the difference, or None."""
    architecture = architecture_of(model, tokenizer, args.model, "gguf")
    name = os.path.splitext(os.path.basename(args.output))[0]
    with replacing(args.output) as temporary:
        export_gguf.write_file(model, tokenizer, architecture, temporary, name, args.dtype, chat)
        sync_file(temporary)
        difference = checked(args, "xllamacpp",
                             lambda: export_gguf.check_file(model, tokenizer, temporary, chat))
    modelfile = modelfile_of(args.output)
    before = export_gguf.named_in_modelfile(modelfile)
    export_gguf.write_modelfile(modelfile, os.path.basename(args.output), tokenizer,
                                model.config.block_size, chat)
    if before not in (None, os.path.basename(args.output)):
        print(f"{modelfile}: replaced, and no longer names {before}; export to another folder to keep both")
    return difference


def to_html(args, model, tokenizer, chat):
    """Write the page, which is checked by reading its weights back. Returns the difference."""
    difference = export_html.write_html(model, tokenizer, args.output, args.dtype, chat, args.steps)
    print(f"checked: largest difference of the logits {difference:.2g}")
    return difference


def checked(args, package, check):
    """Run `check`, which returns the largest difference of the logits and the largest logit; return the
    difference, or None if `package` is missing or too old. Raises InputError for too large a difference."""
    installed = importlib.util.find_spec(package) is not None
    if not installed or version_of(package) < OLDEST[package]:
        print(f"not checked: pip install --upgrade {package}, and export again")
        return None
    difference, largest = check()
    print(f"checked with {package}: largest difference of the logits {difference:.2g}, "
          f"largest logit {largest:.3g}")
    if not difference <= TOLERANCES[args.dtype] * max(1.0, largest):
        raise InputError(f"{args.output}: not written, because {package} computes other logits from it "
                         f"(difference {difference:.2g}); use --dtype {DTYPES[args.to][0]}")
    return difference


def version_of(package):
    """The first two numbers of an installed package's version."""
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


def closing_words(args, chat):
    """How to start what was written, one line a program."""
    out = shlex.quote(args.output)
    if args.to == "html":
        return [f"open {out} in a browser; it needs no network; {args.output}#q=…&t=0&r=1 asks a question"]
    question = '{"messages": [{"role": "user", "content": "你是谁"}], "temperature": 0}'
    route = "chat/completions"
    if not chat:
        question = '{"prompt": "无线电", "max_tokens": 100, "temperature": 0}'
        route = "completions"
    if args.to == "hf":
        port = 8000
        text = '[{"role": "user", "content": "你是谁"}]' if chat else '"无线电"'
        call = ("from transformers import pipeline; "
                f'print(pipeline("text-generation", {json.dumps(args.output)})({text}, do_sample=False))')
        lines = [
            f"transformers:  python -c {shlex.quote(call)}",
            f"vLLM:          vllm serve {out} --served-model-name nano",
            "llama.cpp and Ollama run what --to gguf writes",
        ]
        question = question.replace("{", '{"model": "nano", ', 1)
    else:
        port = 8080
        folder = shlex.quote(os.path.dirname(args.output) or ".")
        lines = [
            f"llama.cpp:  llama-server -m {out}   (a chat page is at http://127.0.0.1:8080)",
            f"Ollama:     cd {folder} && ollama create nano -f Modelfile && ollama run nano   "
            "(its API is at port 11434)",
            "vLLM runs what --to hf writes: vllm serve FOLDER   (its API is at port 8000)",
        ]
    return [*lines, f"OpenAI-style API:  curl http://127.0.0.1:{port}/v1/{route} "
                    f"-H 'Content-Type: application/json' -d '{question}'"]


def size_of(path):
    """Bytes of a file, or of the files in a folder."""
    if os.path.isdir(path):
        return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
    return os.path.getsize(path)


def main():
    args = command_line()
    checkpoint = ckpt.load(args.model)
    model, tokenizer = ckpt.build_model(checkpoint, args.model)
    args.steps = checkpoint["step"]
    chat = checkpoint["task"] != "pretrain"  # a pretrained model only continues text
    write = {"hf": to_hf, "gguf": to_gguf, "html": to_html}[args.to]
    difference = write(args, model, tokenizer, chat)
    size = size_of(args.output)
    print(f"{args.output}: {size / 1e6:.1f} MB, {args.dtype}")
    print(*closing_words(args, chat), sep="\n")
    print_json({"model": args.model, "to": args.to, "output": args.output, "dtype": args.dtype, "bytes": size,
                "largest_difference": difference})


if __name__ == "__main__":
    run_script(main)
