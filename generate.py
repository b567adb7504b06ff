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
