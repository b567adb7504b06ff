"""What other programs call our model: architectures, weights, characters, the chat template.

Used by exports/hf.py and exports/gguf.py. Three facts make an export exact:

- An RMS norm without weights commutes with a rotation. So our query/key norm, after RoPE, is the one that
  Qwen3 and Apertus have before RoPE, with weights of one.
- Adjacent RoPE pairs (2i, 2i + 1) become the halves (i, i + hs/2) that others rotate once the rows of each
  query and key head are permuted.
- Squared ReLU is Apertus's xIELU (Huang & Schlag 2024) with alpha_p 1, alpha_n 0 and beta 0.
"""

import importlib.util
import math
from dataclasses import dataclass

from script import InputError

# xIELU puts alpha_p and alpha_n through softplus: log(e - 1) becomes 1, and -100 becomes 0.
XIELU = {"alpha_p": math.log(math.e - 1), "alpha_n": -100.0, "beta": 0.0, "eps": -1e-6}

# What a check may find, as a share of the largest logit. Rounded weights move the logits, so this catches
# weights in the wrong place, not rounding.
TOLERANCES = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1, "F32": 1e-3, "F16": 0.02, "Q8_0": 0.2}


@dataclass(frozen=True)
class Architecture:
    """A published architecture that computes what our GPT does.

    hf: the prefix of its classes in transformers. name: its name in config.json and in GGUF files.
    gguf_halves: does llama.cpp rotate halves (permuted rows), or adjacent pairs as we do?"""
    hf: str
    name: str
    hidden_act: str
    gguf_halves: bool


ARCHITECTURES = {  # (activation, qk_norm)
    ("swiglu", True): Architecture("Qwen3", "qwen3", "silu", True),
    ("swiglu", False): Architecture("Llama", "llama", "silu", False),
    ("relu2", True): Architecture("Apertus", "apertus", "xielu", True),
    ("relu2", False): Architecture("Arcee", "arcee", "relu2", False),
}


def architecture_of(model, tokenizer, path, target):
    """The Architecture of a GPT. Raises InputError naming every option that has no counterpart in `target`,
    and what works instead."""
    c = model.config
    options = (
        (c.n_prev, f"n_prev {c.n_prev}", "--n_prev 0"),
        (not c.use_rope, "use_rope false (learned positions)", "--use_rope true"),
        (c.final_norm != "rmsnorm", f"final_norm {c.final_norm}", "--final_norm rmsnorm"),
        (c.bias, "bias true", "--bias false"),
        (c.activation == "gelu", "activation gelu", "--activation relu2 (or swiglu)"),
        (not c.is_causal, "is_causal false (full attention)", "--is_causal true"),
    )
    without = [(name, instead) for applies, name, instead in options if applies]
    if without:
        names = ", ".join(name for name, _ in without)
        flags = " ".join(instead for _, instead in without)
        other = ", or use --to html" if c.is_causal else ""
        raise InputError(f"{path}: {names}: no counterpart in --to {target}; train with {flags}{other}")
    words = [token for token in tokenizer.itos if len(token) > 1 and token not in tokenizer.special_tokens]
    if words:
        raise InputError(f"{path}: a vocabulary of words such as {words[0]!r} is encoded by longest match, "
                         f"which --to {target} cannot express; use --to html")
    return ARCHITECTURES[c.activation, c.qk_norm]


def require(package, target):
    """Raises InputError with the pip command if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--to {target} needs the package {package}: pip install {package}")


def halves(weight, heads):
    """Permute the rows of each head of `weight` (heads hs, C) from adjacent pairs to halves."""
    hs = weight.size(0) // heads
    return weight.view(heads, hs // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def layer_weights(block, config, permute):
    """The float32 matrices and norms of one Block, by name. `permute`: RoPE on halves."""
    nh = config.n_head
    nkv = config.n_kv_head or nh
    hs = config.n_embd // nh
    q, k, v = block.attn.c_attn.weight.detach().float().split([nh * hs, nkv * hs, nkv * hs])
    weights = {
        "q": halves(q, nh) if permute else q,
        "k": halves(k, nkv) if permute else k,
        "v": v,
        "o": block.attn.c_proj.weight,
        "down": block.mlp.c_proj.weight,
        "norm_1": block.ln_1.weight,
        "norm_2": block.ln_2.weight,
    }
    if config.activation == "swiglu":
        weights["gate"], weights["up"] = block.mlp.c_fc.weight.chunk(2)
    else:
        weights["up"] = block.mlp.c_fc.weight
    if config.qk_norm:
        weights["q_norm"] = weights["k_norm"] = q.new_ones(hs)
    return {name: weight.detach().float().contiguous() for name, weight in weights.items()}


def separator_of(tokenizer):
    """A character that no text holds and no vocabulary has, from the end of the last plane of Unicode.

    The chat template puts it into every "<|" of a message, and the exported tokenizer drops it. So the text
    of a special token in a message reaches the model as characters: nobody can end a turn by typing <|eos|>.
    """
    return next(c for c in map(chr, range(0x10FFFF, 0xFFFFF, -1)) if c not in tokenizer.stoi)


def chat_template(tokenizer):
    """The instruction template in Jinja. It renders text whose ids are those of `encode_prompt`.

    A system message becomes the first line of the question that follows it."""
    separator = separator_of(tokenizer)
    ask, answer, eos = (tokenizer.itos[i] for i in
                        (tokenizer.instruct_id, tokenizer.response_id, tokenizer.eos_id))
    return ("{% set ns = namespace(system='') %}{% for m in messages %}"
            "{% set text = m['content'] | replace('<|', '<" + separator + "|') %}"
            "{% if m['role'] == 'system' %}{% set ns.system = text + '\\n' %}"
            "{% elif m['role'] == 'user' %}" + ask + "{{ ns.system + text }}" + answer +
            "{% set ns.system = '' %}"
            "{% else %}{{ text }}" + eos + "{% endif %}{% endfor %}")


def sample_conversations(tokenizer):
    """Conversations for checking a tokenizer: lists of (question, answer) and a last question.

    They hold spaces, line breaks, the text of a special token, characters of up to four bytes, and some that
    the vocabulary lacks."""
    characters = [token for token in tokenizer.itos if len(token) == 1]
    known = "".join(characters[:: max(1, len(characters) // 50)] + characters[-1:])
    eos = tokenizer.itos[tokenizer.eos_id]
    return [
        ([], known),
        ([], f"  a{eos}b \n\n {tokenizer.itos[tokenizer.unknown_id]}é😀\U0001fae8無\U0010abcd\t"),
        ([(known[:3], f" {known[-3:]}\n"), ("a", "b")], " c <| |>"),
    ]


def as_messages(turns, question):
    """A conversation as the OpenAI-style chat API takes it."""
    messages = []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]
