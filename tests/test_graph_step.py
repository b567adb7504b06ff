"""The step that a GPU records as a CUDA graph. Here its operations are kept, and done again on the same
tensors, as a graph does."""

import contextlib

import pytest
import torch
from test_model import VARIANTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import generate_gpu
from cpu import fused
from scoring import answers

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="records on a CPU")
PROMPTS = [[5, 6, 7], [9], [8] * 28, [1, 2, 3, 4, 5, 6], [7, 7]]


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph on a CPU; as a context it records."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():  # else a view
                        old.copy_(new)


@pytest.fixture
def recording(monkeypatch):
    """A CPU whose "CUDA" records as above and has an empty stream; it counts the recorded steps."""
    class Stream:
        def wait_stream(self, other):
            pass

    recorded = []

    def decoding_step(model, cache, n_steps):
        recorded.append(1)
        return generate_gpu.GraphStep(model, cache)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(fused, "can_fuse", lambda *args: False)
    monkeypatch.setattr(answers, "goes_together", lambda device: True)
    monkeypatch.setattr(generate, "new_cache", lambda model, *args: generate_gpu.StaticKVCache(
        model.config, *args[:2], "cpu", model.lm_head.weight.dtype, *args[2:]))

    @contextlib.contextmanager
    def record():
        with monkeypatch.context() as patch:
            patch.setattr(generate, "decoding_step", decoding_step)
            yield recorded
    return record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_recorded_step_generates_what_the_plain_one_does(tiny_model, recording, values, dtype):
    """Also when the context is full and is read again, and with prompts of different lengths in one batch."""
    model = tiny_model(**values).to(dtype)
    for block in model.transformer["h"]:
        block.attn.is_on_gpu = True
    idx = torch.tensor([[4, 8, 15, 16, 23], [1, 2, 3, 4, 5]])

    def generated():
        drawn = generate.generate(model, idx, 40, top_k=5, generator=torch.Generator().manual_seed(3))
        long = generate.generate(model, idx, 60, temperature=0, repetition_penalty=1.3)
        return (torch.stack(list(drawn)).tolist(), torch.stack(list(long)).tolist(),
                answers.complete(model, PROMPTS, 100, temperature=0, repetition_penalty=1.3))

    expected = generated()
    with recording() as recorded:
        assert generated() == expected
    assert len(recorded) == 3
