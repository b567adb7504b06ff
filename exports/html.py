"""One self-contained HTML page that runs a model in the browser, offline.

    python export.py -m checkpoint/sft_best.pt --to html nano.html

The page is web/page.html with the style sheet, the scripts, the vocabulary and the weights put into it.
Its Content-Security-Policy allows these scripts by their hashes, a Worker made from them, and nothing else:
no network, no code from elsewhere.
"""

import base64
import copy
import hashlib
import html
import json
import os
import re

import numpy as np
import torch

from config import ROOT
from script import InputError, note, replacing

CHUNK = 6 * 2**20  # bytes of weights in a script element: browsers limit the length of a string
ENGINE = ("kernel.js", "engine.js", "generate.js")  # what the Worker runs too
APP = ("text.js", "words.js", "dom.js", "settings.js", "inspector.js", "app.js")
WEIGHTS = ("int8", "float16", "float32")
BIG = 100e6  # bytes of a page, from which on its size is worth a note


def read_source(name):
    with open(os.path.join(ROOT, "web", name), encoding="utf-8") as f:
        return f.read()


def pack_tensors(model, weights):
    """The weights as the page reads them: (entries, parts).

    entries: dict name -> {shape, type, offset, scales}, offsets in bytes. parts: a list of bytes.
    int8: each row is rounded to the nearest 1/127 of its largest number, embeddings as well. Vectors (norms,
    biases) stay float32. Raises InputError for numbers beyond float16."""
    entries = {}
    parts = []
    offset = 0

    def put(array):
        nonlocal offset
        data = array.tobytes()
        data += bytes(-len(data) % 4)  # typed arrays start at multiples of their size
        parts.append(data)
        offset += len(data)
        return offset - len(data)

    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # the embedding
        values = tensor.detach().float().cpu().numpy()
        entry = {"shape": list(values.shape), "type": weights if values.ndim == 2 else "float32"}
        if entry["type"] == "int8":
            scale = np.maximum(np.abs(values).max(axis=1), np.float32(1e-12)) / np.float32(127)  # (rows,)
            entry["offset"] = put(np.rint(values / scale[:, None]).astype(np.int8))
            entry["scales"] = put(scale.astype("<f4"))
        elif entry["type"] == "float16":
            with np.errstate(over="ignore"):
                halves = values.astype("<f2")
            if not np.isfinite(halves).all():
                raise InputError(f"{name} has weights that float16 cannot hold; use int8")
            entry["offset"] = put(halves)
        else:
            entry["offset"] = put(values.astype("<f4"))
        entries[name] = entry
    return entries, parts


def unpack_tensors(entries, data):
    """The opposite of `pack_tensors`: a dict name -> float32 tensor."""
    def read(dtype, n, offset):
        return np.frombuffer(data, dtype, n, offset).astype(np.float32)

    tensors = {}
    for name, entry in entries.items():
        shape = entry["shape"]
        dtype = {"int8": np.int8, "float16": "<f2", "float32": "<f4"}[entry["type"]]
        values = read(dtype, int(np.prod(shape)), entry["offset"]).reshape(shape)
        if entry["type"] == "int8":
            values = values * read("<f4", shape[0], entry["scales"])[:, None]
        tensors[name] = torch.from_numpy(values)
    return tensors


def short_number(n):
    """3631104 -> "3.6 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def describe(model, tokenizer, weights, chat, steps):
    """What the page needs to know besides the weights, as a dict for JSON."""
    c = model.config
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "use_rope", "norm_eps",
             "activation", "qk_norm", "rope_theta", "n_prev", "final_norm")
    return {
        "config": {name: getattr(c, name) for name in names},
        "tokenizer": {
            "itos": tokenizer.itos,
            "special": [tokenizer.stoi[token] for token in tokenizer.special_tokens],
            "unknown_id": tokenizer.unknown_id,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "instruct_id": tokenizer.instruct_id,
            "response_id": tokenizer.response_id,
        },
        "card": {"parameters": short_number(model.n_params()), "layers": c.n_layer, "width": c.n_embd,
                 "vocabulary": tokenizer.vocab_size, "context": c.block_size, "steps": steps,
                 "weights": weights, "chat": chat},
    }


def policy(scripts, style):
    """The Content-Security-Policy that allows these inline texts, a Worker and WebAssembly, nothing else."""
    def allow(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return "; ".join([
        "default-src 'none'",
        f"script-src {' '.join(map(allow, scripts))} blob: 'wasm-unsafe-eval'",
        f"style-src {allow(style)}",
        "worker-src blob:", "connect-src 'none'", "base-uri 'none'", "form-action 'none'"])


def page_parts(description, data):
    """The page, piece by piece, as strings; data: the bytes of the weights."""
    # In a script element only "<" could begin something else; JSON may write it as an escape.
    model = json.dumps(description, separators=(",", ":")).replace("<", "\\u003c")
    texts = {
        "model": model,
        "style": read_source("style.css"),
        "engine": "\n".join(map(read_source, ENGINE)),
        "app": "\n".join(map(read_source, APP)),
    }
    texts["policy"] = html.escape(policy([texts["engine"], texts["app"]], texts["style"]), quote=True)
    before, after = read_source("page.html").split("{{weights}}")
    yield re.sub(r"\{\{(\w+)\}\}", lambda found: texts[found[1]], before)
    for start in range(0, len(data), CHUNK):
        block = base64.b64encode(data[start:start + CHUNK]).decode()
        yield f'<script type="text/plain" class="weights">{block}</script>\n'
    yield after


def read_page(path):
    """What is in a page: (description, data), as `page_parts` takes them. For checks."""
    with open(path, encoding="utf-8") as f:
        text = f.read()
    description = json.loads(re.search(r'id="model">(.*?)</script>', text, re.DOTALL)[1])
    blocks = re.findall(r'class="weights">(.*?)</script>', text)
    return description, b"".join(map(base64.b64decode, blocks))


@torch.inference_mode()
def difference_of(model, path):
    """Largest difference between the logits of `model` and of the weights read back from a page.

    The engine itself is compared with PyTorch in tests/test_web.py."""
    description, data = read_page(path)
    written = copy.deepcopy(model).float().cpu()
    tensors = unpack_tensors(description["tensors"], data)
    written.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    idx = torch.arange(min(model.config.block_size, 64))[None] * 7 % model.config.vocab_size  # (1, T)
    expected = model(idx.to(model.device))[0].float().cpu()
    return float((written(idx)[0] - expected).abs().max())


def write_html(model, tokenizer, path, weights="int8", chat=True, steps=None):
    """Write a page that runs `model`, a GPT in evaluation mode, whole or not at all.

    weights: "int8" (a scale for each row), "float16", or "float32" (exact; for tests). chat: start in the
    chat, otherwise in text continuation. steps: how long the model was trained, to be shown.
    Returns the largest difference of the logits that the rounding makes.
    Raises InputError for a model with full attention and for a path that cannot be written."""
    if not model.config.is_causal:
        raise InputError("html: this model has full attention (is_causal false), but the page writes token "
                         "by token; train with is_causal true")
    entries, parts = pack_tensors(model, weights)
    data = b"".join(parts)
    description = describe(model, tokenizer, weights, chat, steps)
    description["tensors"] = entries
    description["bytes"] = len(data)
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n") as f:
            for part in page_parts(description, data):
                f.write(part)
            f.flush()
            os.fsync(f.fileno())
        difference = difference_of(model, temporary)
    size = os.path.getsize(path)
    if size > BIG:
        note(f"{path} has {size / 1e6:.0f} MB: a browser takes a while to open it, and a phone may not")
    return difference
