"""How likely a model finds some answers after some prompts, many at a time, for evaluate.py.

Letters in the shapes: those of model.py.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tokenizer import encode_conversation, join_ids

BATCH_TOKENS = 4096  # a batch of sequences: its logits, 4,096 times the vocabulary, stay small


def fit_prompt(tokenizer, turns, question, room):
    """The prompt of a question after some turns, in at most `room` tokens.

    Returns (ids, n_dropped, is_cut): how many turns were left out, the earliest first, and whether the
    question lost its beginning. ids is None if nothing of the question fits."""
    asked = tokenizer.encode(question)
    for n_dropped in range(len(turns) + 1):
        history, _ = encode_conversation(tokenizer, turns[n_dropped:])
        if len(history) + len(asked) + 2 <= room:
            break
    kept = max(0, room - 2 - len(history))
    is_cut = kept < len(asked)
    if room < 2 or (is_cut and not kept):
        return None, n_dropped, True
    asked = asked[len(asked) - min(kept, len(asked)):]
    ids = join_ids(tokenizer, [history, [tokenizer.instruct_id], asked, [tokenizer.response_id]])
    return ids, n_dropped, is_cut


def batches_of(sequences, pad_id, device):
    """Yield (numbers, ids): sequences of similar length side by side, padded on the right, (B, T).

    Causal attention makes the padding invisible to what stands before it."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(sequences[order[end]]) * (end + 1 - start) <= BATCH_TOKENS:
            end += 1
        numbers = order[start:end]
        ids = np.full((len(numbers), len(sequences[numbers[-1]])), pad_id, np.int64)
        for row, number in enumerate(numbers):
            ids[row, : len(sequences[number])] = sequences[number]
        yield numbers, torch.from_numpy(ids).to(device)
        start = end


@torch.inference_mode()
def log_likelihoods(model, contexts, answers, pad_id):
    """Summed log-likelihood of each answer after its context, both lists of ids: array (n,), in nats.

    Equal pairs are computed once, so that they tie exactly."""
    keys = [(context.tobytes(), answer.tobytes()) for context, answer in zip(contexts, answers, strict=True)]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    kept = sorted(first.values())
    sequences = [np.concatenate([contexts[i], answers[i]]).astype(np.int64) for i in kept]
    result = np.zeros(len(keys))
    with tqdm(total=len(sequences), desc="options", unit="option", leave=False, disable=None) as bar:
        for numbers, ids in batches_of(sequences, pad_id, model.device):
            logits = model(ids[:, :-1])[0]  # (B, T, V)
            nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            nll = nll.view(len(numbers), -1).double().cpu().numpy()
            for row, number in enumerate(numbers):
                i = kept[number]
                begin = len(contexts[i]) - 1
                result[i] = -nll[row, begin : begin + len(answers[i])].sum()
            bar.update(len(numbers))
    return result[[first[key] for key in keys]] if keys else result


@torch.inference_mode()
def letter_logits(model, prompts, letter_ids, pad_id):
    """Logits of the letters after each prompt (a list of ids): array (n, 4)."""
    result = np.zeros((len(prompts), len(letter_ids)))
    for numbers, ids in batches_of(prompts, pad_id, model.device):
        last = torch.tensor([len(prompts[number]) - 1 for number in numbers], device=model.device)
        logits = model(ids)[0][torch.arange(len(numbers), device=model.device), last]  # (B, V)
        result[numbers] = logits[:, letter_ids].double().cpu().numpy()
    return result
