"""From logits to tokens: filter, sample, prefill, decode, generate.

Logits in, tokens out. Every draw takes an explicit torch.Generator; temperature 0 is argmax.
Letters in the shapes: B sequences side by side, T tokens, V vocab_size. After gpt-fast's ladder of functions.
"""

import torch
import torch.nn as nn

from config import InputError
from cpu import decode
from model import GPT, KVCache


def penalize_repetition(logits, seen, penalty):
    """Lower the logits (B, V) of the tokens in `seen` (B, T), whatever their sign (Keskar et al. 2019)."""
    if penalty == 1.0:
        return logits
    score = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(score > 0, score / penalty, score * penalty))


def logits_to_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities (B, V) from logits (B, V). top_k 0 and top_p 1 are off; temperature must be above 0."""
    logits = logits / temperature
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
    step = decode.step_of(model, cache)  # compiled, on a CPU
    return step(token) if step else model(token[:, None], cache=cache)[0][:, -1]


def check_sampling(temperature, top_k, top_p, repetition_penalty):
    """Raises InputError naming the first parameter that is out of range."""
    for name, value, good, rule in (
            ("temperature", temperature, 0 <= temperature < float("inf"), "0 or above"),
            ("top_k", top_k, top_k >= 0, "0 (off) or above"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "above 0")):
        if not good:
            raise InputError(f"{name} is {value}, but must be {rule}")


@torch.inference_mode()
def generate(model: GPT, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
             stop_ids=(), generator=None, cache_dtype=torch.float32):
    """Yield the next token ids (B,) of the prompts idx (B, T), one time step at a time.

    A sequence that has produced one of `stop_ids` repeats it; generation ends when all have. When the
    context is full, the later half of it is read again and generation goes on from there.
    Raises InputError for an empty prompt, or one longer than the model's block_size."""
    check_sampling(temperature, top_k, top_p, repetition_penalty)
    if idx.size(1) == 0:
        raise InputError("the prompt is empty")
    block_size = model.config.block_size
    length = min(block_size, idx.size(1) + max_new_tokens)
    stop = torch.tensor(list(stop_ids), dtype=torch.long, device=idx.device)
    stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    token, cache = None, None
    for _ in range(max_new_tokens):
        if cache is None or cache.n_tokens == block_size:
            if cache is not None:
                idx = idx[:, -(block_size // 2 or 1):]
            cache = KVCache(model.config, idx.size(0), length, idx.device, cache_dtype)
            logits = prefill(model, idx, cache)
        else:
            logits = decode_one_token(model, token, cache)
        drawn = sample(logits, idx, temperature, top_k, top_p, repetition_penalty, generator)
        token = torch.where(stopped, token, drawn) if len(stop) and token is not None else drawn
        yield token
        if len(stop):
            stopped |= torch.isin(token, stop)
            if stopped.all():
                return
        idx = torch.cat([idx, token[:, None]], dim=1)


@torch.inference_mode()
def complete(model, prompts, max_new_tokens, stop_ids=(), **sampling):
    """Answer many prompts (a list of id lists) at once; a list of id lists, cut before the stop token.

    Prompts of one length go through the model side by side, so that nothing need be padded."""
    answers = [None] * len(prompts)
    for length in sorted({len(p) for p in prompts}):
        which = [i for i, p in enumerate(prompts) if len(p) == length]
        idx = torch.tensor([list(map(int, prompts[i])) for i in which], device=model.device)
        room = min(max_new_tokens, model.config.block_size - length)
        steps = list(generate(model, idx, room, stop_ids=stop_ids, **sampling))
        for row, i in enumerate(which):
            ids = [int(step[row]) for step in steps]
            ends = [n for n, token in enumerate(ids) if token in stop_ids]
            answers[i] = ids[: ends[0]] if ends else ids
    return answers


@torch.inference_mode()
def generate_all_at_once(model: GPT, idx):
    """Sequence to sequence: the likeliest token at every position of idx (B, T), in one pass, (B, T).

    For models with full attention (is_causal false), which are trained with outputs in the inputs' places."""
    if model.config.is_causal:
        raise InputError("one-shot generation needs a model with is_causal false")
    return model(idx)[0].argmax(-1)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale an output: a token has a quarter of the bytes to read.

    Rounded to the nearest 1/127 of each output's largest weight (after Dettmers et al. 2022). Few rows go
    through torch's int8 product, their activations in bfloat16; many, as a prompt has, are multiplied in
    float32 by the weights put back together."""

    FEW = 8

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
        self.weight = (weight / self.scale[:, None]).round().to(torch.int8)  # (out, in)
        self.bias = linear.bias

    def forward(self, x):
        rows = x.flatten(0, -2)
        if len(rows) <= self.FEW and self.weight.size(1) % 16 == 0:  # others make torch's read past the end
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale.bfloat16()).float()
        else:
            y = rows @ (self.weight * self.scale[:, None]).T
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])


def quantize(model: GPT):
    """Give a model on the CPU int8 weights, in place, for generation alone; the embeddings stay as they are.

    Raises InputError for another device."""
    if model.device.type != "cpu":
        raise InputError(f"int8: for a CPU, but the model is on {model.device}; add --device cpu")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
