"""What happens inside a model while it trains: a few numbers per layer, every `--log_stats` steps.

    python train.py -t pretrain --log_stats 100
    python plot_loss.py --stats train_<date>_<time>_stats.jsonl

One JSON line a record, beside the log. The letters of the shapes are those of model.py. Gradients are as the
optimizer sees them, after clipping; activations are those of the first rows of the step's batch, after the
step.
"""

import contextlib
import json
import math

import torch

from script import InputError

ROWS = 4  # of the batch that activations are taken from


def norm(tensor):
    return float(tensor.detach().float().norm())


class LayerStats:
    """Records statistics of `model` every `interval` steps in the file `path` (0 or None: nothing).

    A record holds the step and, per layer: norms of weights, gradients and updates (dicts by matrix); rms, of
    the residual stream after the layer; entropy of attention, in nats, the mean over heads and positions;
    max_logit of attention, before softmax; dead, the share of MLP units that no token activates."""

    def __init__(self, model, interval, path):
        self.model = model
        self.interval = interval
        self.before = None
        self.file = None
        if interval and path:
            try:
                self.file = open(path, "w", encoding="utf-8", buffering=1)
            except OSError as error:
                raise InputError(f"{path}: cannot be written ({error.strerror})") from None

    def matrices(self):
        """[(layer, name, parameter)] of the matrices in the blocks."""
        return [(layer, name, p) for layer, block in enumerate(self.model.transformer["h"])
                for name, p in block.named_parameters() if p.ndim == 2]

    def before_step(self, step):
        """Keep what the step changes, weights and gradients, if a record is due."""
        if self.file is None or step % self.interval:
            return
        self.before = [(p.detach().clone(), norm(p.grad) if p.grad is not None else math.nan)
                       for _, _, p in self.matrices()]

    @torch.no_grad()
    def after_step(self, step, x):
        """Write the record of `step`, if it is due; x: (B, T) token ids on the model's device."""
        if self.before is None:
            return
        layers = [{"weights": {}, "gradients": {}, "updates": {}} for _ in self.model.transformer["h"]]
        for (layer, name, p), (weight, gradient) in zip(self.matrices(), self.before, strict=True):
            name = name.removesuffix(".weight")
            layers[layer]["weights"][name] = norm(weight)
            layers[layer]["gradients"][name] = gradient
            layers[layer]["updates"][name] = norm(p.detach() - weight)
        self.before = None
        for layer, values in zip(layers, activations(self.model, x[:ROWS]), strict=True):
            layer.update(values)
        with contextlib.suppress(OSError):  # a full disk must not end the training
            self.file.write(json.dumps({"step": step, "layers": layers}) + "\n")

    def close(self):
        if self.file:
            self.file.close()


@torch.no_grad()
def activations(model, x):
    """[{rms, entropy, max_logit, dead}] of each layer, from one forward pass without dropout."""
    found = [{} for _ in model.transformer["h"]]
    hooks = []
    for values, block in zip(found, model.transformer["h"], strict=True):
        def after_block(module, args, output, values=values):
            values["rms"] = float(output.float().square().mean().sqrt())

        def before_attention(module, args, values=values):
            x, rope, _, is_causal = args[:4]
            values["entropy"], values["max_logit"] = attention_entropy(module, x, rope, is_causal)

        def before_projection(module, args, values=values):
            active = (args[0].flatten(0, -2) != 0).any(0)  # (hidden,)
            values["dead"] = 1 - float(active.float().mean())

        hooks.append(block.register_forward_hook(after_block))
        hooks.append(block.attn.register_forward_pre_hook(before_attention))
        hooks.append(block.mlp.c_proj.register_forward_pre_hook(before_projection))
    was_training = model.training
    try:
        model.eval()(x)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def attention_entropy(attention, x, rope, is_causal):
    """Mean entropy in nats, and the largest logit, of an Attention module for its input x (B, T, C)."""
    B, T, _ = x.shape
    q, k, _ = attention.heads(attention.c_attn(x).view(B, T, -1, attention.head_size), rope)
    k = k.repeat_interleave(attention.n_head // attention.n_kv_head, dim=1)  # (B, nh, T, hs)
    logits = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(attention.head_size)  # (B, nh, T, T)
    if is_causal:
        hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        logits = logits.masked_fill(hidden, -math.inf)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)  # (B, nh, T)
    return float(entropy.mean()), float(logits.max())
