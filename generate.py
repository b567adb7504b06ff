"""From logits to tokens: filter, sample, prefill, decode, generate.

Logits in, tokens out, after gpt-fast's ladder of functions. Every draw takes an explicit torch.Generator;
temperature 0 is argmax. Letters in the shapes: those of model.py.
"""

import functools

import torch

from config import check_sampling
from cpu import decode
from generate_gpu import GraphStep, StaticKVCache
from model import GPT, KVCache
from script import InputError

GRAPH_TOKENS = 32  # recording a CUDA graph takes about as long as this many steps without one


def penalize_repetition(logits, seen, penalty):
    """Lower the logits (B, V) of the tokens in `seen` (B, T), whatever their sign (Keskar et al. 2019)."""
    if penalty == 1.0:
        return logits
    score = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(score > 0, score / penalty, score * penalty))


def logits_to_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities (B, V) from logits (B, V). top_k 0 and top_p 1 are off; temperature must be above 0."""
    logits = logits - logits.amax(-1, keepdim=True)  # else a small temperature makes the largest infinite
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1.0:  # nucleus sampling (Holtzman et al. 2020)
        ordered, order = probs.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
        probs = probs.masked_fill(beyond.scatter(1, order, beyond), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample(logits, seen, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, generator=None):
    """The next token ids (B,) from logits (B, V), given the tokens `seen` (B, T) so far."""
    logits = penalize_repetition(logits.float(), seen, repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1)
    probs = logits_to_probs(logits, temperature, top_k, top_p)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def prefill(model, idx, cache):
    """Read a whole prompt idx (B, T) in one pass; the logits (B, V) after its last token."""
    return model(idx, cache=cache, last_only=True)[0][:, -1]


def decode_one_token(model, token, cache):
    """Read one token a sequence, (B,); the logits (B, V) after it."""
    return model(token[:, None], cache=cache)[0][:, -1]


def new_cache(model, batch_size, length, padding=None):
    """A cache for generation from `model`, on its device and in its type."""
    dtype = model.transformer["wte"].weight.dtype
    if padding is None and model.device.type != "cuda":
        return KVCache(model.config, batch_size, length, model.device, dtype)
    return StaticKVCache(model.config, batch_size, length, model.device, dtype, padding)


def decoding_step(model, cache, n_steps):
    """The fastest way to read some n_steps tokens a sequence into `cache`, one at a time.

    Returns a function from tokens (B,) to the logits (B, V) after them: decode.c on a CPU, a CUDA graph, or
    PyTorch where they do not apply."""
    if not isinstance(cache, StaticKVCache):
        library = decode.usable_library(model)
        if library is not None:
            return decode.CompiledStep(model, cache, library)
    elif model.device.type == "cuda" and n_steps >= GRAPH_TOKENS and not model.training:
        return GraphStep(model, cache)
    return functools.partial(decode_one_token, model, cache=cache)


@torch.inference_mode()
def generate(model: GPT, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
             stop_ids=(), generator=None, repeat_last_n=-1, penalty_start=0, padding=None):
    """Yield the next token ids (B,) of the prompts idx (B, T), one time step at a time.

    A sequence that has produced one of `stop_ids` repeats it; generation ends when all have. When the
    context is full, its second half is read again and generation continues from there.
    The repetition penalty covers the prompt from its token number `penalty_start` on and what is generated;
    of these, with `repeat_last_n` of 0 or above, the last that many tokens.
    padding: None or (B,), how many tokens on the left of each prompt are padding, which must repeat a token
    of the prompt; the context then must not fill up.
    Raises InputError for an empty prompt, or one longer than the model's block_size."""
    check_sampling(temperature, top_k, top_p, repetition_penalty, repeat_last_n)
    if idx.size(1) == 0:
        raise InputError("the prompt is empty")
    block_size = model.config.block_size
    length = idx.size(1) + max_new_tokens
    if padding is None:
        length = min(length, block_size)
    stop = torch.tensor(list(stop_ids), dtype=torch.long, device=idx.device)
    stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    cache = new_cache(model, idx.size(0), length, padding)
    step = None
    token = None
    for n in range(max_new_tokens):
        if n == 0:
            logits = prefill(model, idx, cache)
        elif cache.n_tokens == cache.limit:  # the context is full
            dropped = idx.size(1) - (block_size // 2 or 1)
            idx = idx[:, dropped:]
            penalty_start = max(0, penalty_start - dropped)
            cache.n_tokens = 0
            logits = prefill(model, idx, cache)
        else:
            # Chosen once: an answer has one arithmetic, even if the compiler of decode.c ends in the middle.
            step = step or decoding_step(model, cache, max_new_tokens)
            logits = step(token)
        seen = idx[:, penalty_start:]
        if repeat_last_n >= 0:
            seen = seen[:, max(0, seen.size(1) - repeat_last_n) :]
        drawn = sample(logits, seen, temperature, top_k, top_p, repetition_penalty, generator)
        token = torch.where(stopped, token, drawn) if len(stop) and n else drawn
        yield token
        if len(stop):
            stopped |= torch.isin(token, stop)
            if stopped.all():
                return
        idx = torch.cat([idx, token[:, None]], dim=1)


def goes_together(device):
    """Is it faster there to pad prompts to one length than to answer each length by itself?

    A GPU has room to spare. On a CPU, decode.c would compute for the padding as well."""
    return device.type == "cuda"


def left_pad(prompts, device):
    """A list of id lists as one tensor (B, T), and how many tokens on the left of each are padding, (B,).

    The padding repeats a prompt's first token, which changes nothing for a repetition penalty."""
    length = max(map(len, prompts))
    rows = [[int(p[0])] * (length - len(p)) + [int(i) for i in p] for p in prompts]
    padding = [length - len(p) for p in prompts]
    return torch.tensor(rows, device=device), torch.tensor(padding, device=device)


@torch.inference_mode()
def complete(model, prompts, max_new_tokens, stop_ids=(), **sampling):
    """Answer many prompts (a list of id lists) at once; a list of id lists, cut before the stop token.

    Prompts of one length go through the model side by side; on a GPU all do, with padding on the left.
    Raises InputError for an empty prompt."""
    if not all(len(prompt) for prompt in prompts):
        raise InputError("the prompt is empty")
    groups = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(0 if goes_together(model.device) else len(prompt), []).append(i)
    answers = [[] for _ in prompts]
    for _, which in sorted(groups.items()):
        idx, padding = left_pad([prompts[i] for i in which], model.device)
        is_ragged = len({len(prompts[i]) for i in which}) > 1
        rooms = [max(0, min(max_new_tokens, model.config.block_size - len(prompts[i]))) for i in which]
        if not any(rooms):
            continue
        steps = list(generate(model, idx, max(rooms), stop_ids=stop_ids,
                              padding=padding if is_ragged else None, **sampling))
        rows = torch.stack(steps, dim=1).tolist()  # read once: each read waits for the device
        for i, row, room in zip(which, rows, rooms, strict=True):
            ends = [n for n, token in enumerate(row) if token in stop_ids]
            answers[i] = row[: min([room, *ends])]
    return answers


@torch.inference_mode()
def generate_all_at_once(model: GPT, idx):
    """Sequence to sequence: the likeliest token at every position of idx (B, T), in one pass, (B, T).

    For models with full attention (is_causal false), trained to give the output of each input's position.
    Raises InputError for others."""
    if model.config.is_causal:
        raise InputError("one-shot generation needs a model with is_causal false")
    return model(idx)[0].argmax(-1)
