"""A checkpoint as a GGUF file, which llama.cpp and Ollama run.

Called by export.py. llama.cpp encodes a text as our tokenizer does, character for character. Its byte-level
byte-pair encoding gets the bytes of each character as merges. It drops a byte that has no token; so the first
byte of a character that the vocabulary lacks, and what merges with it, are tokens with the weights of
<|unknown|>, and other bytes have no token.
"""

import contextlib
import json
import os
import re
import urllib.error
import urllib.request

import numpy as np
import torch

from exports.portable import (
    XIELU,
    as_messages,
    chat_template,
    layer_weights,
    require,
    sample_conversations,
    separator_of,
)
from script import InputError, atomic_write
from tokenizer import encode_prompt

# Our names -> GGUF's names inside blk.N.
NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    "norm_1": "attn_norm", "norm_2": "ffn_norm",
}
QUANTIZED_BLOCK = 32  # Q8_0: so many weights share a scale

# GPT-2's characters for the 256 bytes: printable ones stand for themselves, the others for U+0100 and up.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_CHARACTERS = {byte: chr(byte) for byte in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
FIRST_BYTES = [*range(0x80), *range(0xC2, 0xF5)]  # of a character in UTF-8


def byte_level(data):
    """Bytes as the text that stands for them in a byte-level vocabulary."""
    return "".join(BYTE_CHARACTERS[byte] for byte in data)


def vocabulary(tokenizer, vocab_size):
    """Token texts, their types and the merges. The texts after the first `vocab_size` are those of bytes that
    begin an unknown character."""
    from gguf import TokenType
    special = set(tokenizer.special_tokens)
    texts = [token if token in special else byte_level(token.encode()) for token in tokenizer.itos]
    types = [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokenizer.itos]
    types[tokenizer.unknown_id] = TokenType.UNKNOWN
    texts += [f"[unused {i}]" for i in range(len(texts), vocab_size)]
    types += [TokenType.UNUSED] * (vocab_size - len(types))

    # The separator's bytes merge like those of a character, but the whole has no token: it is dropped.
    characters = [token for token in tokenizer.itos if token not in special] + [separator_of(tokenizer)]
    merges = {}
    beginnings = dict.fromkeys(bytes([byte]) for byte in FIRST_BYTES)
    for character in characters:
        data = character.encode()
        for i in range(1, len(data)):
            merges[f"{byte_level(data[:i])} {byte_level(data[i : i + 1])}"] = None
            beginnings[data[:i]] = None
    known = set(texts)
    extra = [byte_level(data) for data in beginnings if byte_level(data) not in known]
    return texts + extra, types + [TokenType.NORMAL] * len(extra), list(merges)


def write_file(model, tokenizer, architecture, path, name, dtype, chat):
    """Write a GGUF file.

    dtype: "F32", "F16" or "Q8_0", of the matrices; norms stay F32. chat: with a chat template?
    Raises InputError if the gguf package is missing, or if a weight does not fit into dtype."""
    require("gguf", "gguf")
    import gguf
    c = model.config
    head_size = c.n_embd // c.n_head
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name(name)
    writer.add_file_type({"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16,
                          "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[dtype])
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(model.transformer["h"][0].mlp.c_proj.weight.size(1))
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head or c.n_head)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(head_size)
    if architecture.name == "apertus":
        writer.add_xielu_alpha_p([XIELU["alpha_p"]] * c.n_layer)
        writer.add_xielu_alpha_n([XIELU["alpha_n"]] * c.n_layer)
        writer.add_xielu_beta([XIELU["beta"]] * c.n_layer)
        writer.add_xielu_eps([XIELU["eps"]] * c.n_layer)

    texts, types, merges = vocabulary(tokenizer, c.vocab_size)
    writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text.encode() for text in texts])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unknown_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_sampling_temp(0.0)  # a small model answers best with its likeliest tokens
    if chat:
        writer.add_chat_template(chat_template(tokenizer))

    for tensor_name, weight in tensors(model, tokenizer, architecture, len(texts)):
        data, kind = as_type(weight, dtype)
        if not np.isfinite(data).all():
            raise InputError(f"{tensor_name} holds values that do not fit into {dtype}; use --dtype F32")
        writer.add_tensor(tensor_name, data, raw_dtype=kind)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def tensors(model, tokenizer, architecture, n_tokens):
    """Yield (name, float32 array). The rows that `vocabulary` appends are those of <|unknown|>."""
    wte = model.transformer["wte"].weight.detach()
    unknown = wte[tokenizer.unknown_id].expand(n_tokens - len(wte), -1)
    table = torch.cat([wte, unknown]).numpy()
    yield "token_embd.weight", table
    if architecture.name == "apertus":  # llama.cpp does not tie its output layer
        yield "output.weight", table
    yield "output_norm.weight", model.transformer["ln_f"].weight.detach().numpy()
    for i, block in enumerate(model.transformer["h"]):
        for name, weight in layer_weights(block, model.config, architecture.gguf_halves).items():
            yield f"blk.{i}.{NAMES[name]}.weight", weight.numpy()


def as_type(weight, dtype):
    """A float32 array as stored: norms as F32, rows that Q8_0 cannot divide into blocks as F16."""
    import gguf
    kinds = gguf.GGMLQuantizationType
    if dtype == "F32" or weight.ndim == 1:
        return weight, kinds.F32
    if dtype == "Q8_0" and weight.shape[1] % QUANTIZED_BLOCK == 0:
        return gguf.quants.quantize(weight, kinds.Q8_0), kinds.Q8_0
    with np.errstate(over="ignore"):
        return weight.astype(np.float16), kinds.F16


def write_modelfile(path, gguf_name, tokenizer, block_size, chat):
    """Write Ollama's Modelfile: the instruction template in Go's template language, and greedy decoding."""
    ask, answer, eos = (tokenizer.itos[i] for i in
                        (tokenizer.instruct_id, tokenizer.response_id, tokenizer.eos_id))
    template = "{{ .Prompt }}"
    if chat:
        template = ('{{ $system := "" }}{{ range .Messages }}'
                    '{{ if eq .Role "system" }}{{ $system = printf "%s\\n" .Content }}'
                    '{{ else if eq .Role "user" }}' + ask + "{{ $system }}{{ .Content }}" + answer +
                    '{{ $system = "" }}'
                    '{{ else if eq .Role "assistant" }}{{ .Content }}' + eos + "{{ end }}{{ end }}")
    with atomic_write(path, "w") as f:
        f.write(f'{MODELFILE_HEAD}\nFROM ./{gguf_name}\nTEMPLATE """{template}"""\n'
                f"PARAMETER stop {eos}\nPARAMETER num_ctx {block_size}\n"
                f"PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n")


def named_in_modelfile(path):
    """The name of the GGUF file that a Modelfile of ours names; None if there is none."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as f:
        found = re.search(r"^FROM \./(.+)$", f.read(), re.M)
    return found[1] if found else None


MODELFILE_HEAD = "# Written by export.py for Ollama: ollama create nano -f Modelfile"


@contextlib.contextmanager
def llama_server(path, block_size):
    """In this context llama.cpp's server runs the file; yields a function post(route, dict) -> dict."""
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = max(block_size, 64)  # llama.cpp ends the process if a batch is smaller than 2
    params.n_parallel = 1
    params.cpuparams.n_threads = torch.get_num_threads()
    # By default the keys and values of the context are rounded to float16, which hides what the file holds.
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = -1
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise InputError(f"llama.cpp does not load the file ({error}); nothing written") from None
    address = server.listening_address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(route, body):
        request = urllib.request.Request(address + route, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with opener.open(request) as reply:
                return json.load(reply)
        except urllib.error.URLError as error:
            raise InputError(f"llama.cpp does not answer {route} ({error}); nothing written") from None
    yield post
    del server  # ends its thread


@torch.inference_mode()
def check_file(model, tokenizer, path, chat):
    """Run the file in llama.cpp's server and compare its token ids and logits with ours.

    The logits are those of the ten likeliest tokens, up to a constant, for 16 greedy tokens after each
    prompt. Returns the largest difference and the largest logit. Raises InputError if an id differs."""
    c = model.config
    difference = largest = 0.0

    def as_ours(i):  # a token appended by `vocabulary` stands for an unknown character
        return i if i < c.vocab_size else tokenizer.unknown_id

    with llama_server(path, c.block_size) as post:
        for turns, question in sample_conversations(tokenizer):
            expected = tokenizer.encode(question, allow_special=True).tolist()
            text = question
            if chat:
                expected = encode_prompt(tokenizer, turns, question).tolist()
                text = post("/apply-template", {"messages": as_messages(turns, question)})["prompt"]
            ids = post("/tokenize", {"content": text, "parse_special": True})["tokens"]
            if [as_ours(i) for i in ids] != expected:
                raise InputError(f"{question!r} has other token ids in the GGUF than here; nothing written")
            prompt = expected[: c.block_size // 2 or 1]
            reply = post("/completion", {"prompt": prompt, "n_predict": min(16, c.block_size // 2 or 1),
                                         "n_probs": 10, "temperature": 0, "ignore_eos": True})
            steps = reply["completion_probabilities"]
            tokens = [as_ours(step["id"]) for step in steps[:-1]]
            idx = torch.tensor([prompt + tokens])
            logits = model(idx)[0][0, len(prompt) - 1 :]
            largest = max(largest, float(logits.abs().max()))
            for row, step in zip(logits, steps, strict=True):
                theirs = torch.tensor([entry["logprob"] for entry in step["top_logprobs"]])
                ours = row[[as_ours(entry["id"]) for entry in step["top_logprobs"]]]
                offsets = theirs - ours
                difference = max(difference, float((offsets - offsets[0]).abs().max()))
    return difference, largest
