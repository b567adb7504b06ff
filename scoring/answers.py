"""Answers to many prompts at once, for evaluate.py and problem.py."""

import torch

from generate import generate
from script import InputError


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
