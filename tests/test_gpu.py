"""The kernels for GPUs. Without a GPU, Triton's interpreter runs them on the CPU, on the same numbers."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import CountedGraphs

import gpu
import model
from config import IGNORE_INDEX
from cpu import fused as cpu_fused
from documents import documents_of
from model import apply_rope, rope_table

fused = pytest.importorskip("gpu.fused", reason="Triton exists for Linux only", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, dtype=torch.float32, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * scale
    return values.to(DEVICE, dtype).requires_grad_()


def plain_heads(qkv, rope, n_head, n_kv_head, eps):
    """What Attention.heads computes, in float64."""
    qk, v = qkv.double().split([n_head + n_kv_head, n_kv_head], dim=2)
    if rope is not None:
        even, odd = qk.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = (t.double() for t in rope)
        qk = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    if eps is not None:
        qk = F.rms_norm(qk, (qk.size(-1),), eps=eps)
    q, k = qk.split([n_head, n_kv_head], dim=2)
    return [x.transpose(1, 2) for x in (q, k, v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", ["none", "one row", "one row a sequence"])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_heads_equal_the_formulas_in_value_and_gradient(dtype, positions, eps):
    B, T, n_head, n_kv_head, head_size = 2, 5, 3, 1, 8
    qkv = random(B, T, n_head + 2 * n_kv_head, head_size, dtype=dtype)
    cos, sin = (t.to(DEVICE) for t in rope_table(20, head_size, 100.0))
    places = torch.arange(T) if positions == "one row" else torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    rope = None if positions == "none" else [t[places].unsqueeze(-2) for t in (cos, sin)]
    ours = fused.Heads.apply(qkv, *(rope or (None, None)), n_head, n_kv_head, eps)
    expected = plain_heads(qkv, rope, n_head, n_kv_head, eps)
    # The second layout is that of the gradients which attention kernels return.
    grads = [random(B, n_head, T, head_size, dtype=dtype).detach(),
             *(random(B, T, n_kv_head, head_size, dtype=dtype).detach().transpose(1, 2) for _ in "kv")]
    gradient, = torch.autograd.grad(ours, qkv, grads)
    wanted, = torch.autograd.grad(expected, qkv, [g.double() for g in grads])
    close = dict(atol=2 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other.to(dtype), **close)
    torch.testing.assert_close(gradient, wanted, atol=8 * torch.finfo(dtype).eps, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [3, 65, 5000])
def test_cross_entropy_equals_torchs_in_value_and_gradient(dtype, V):
    logits = random(7, V, dtype=dtype, scale=20.0)
    targets = torch.randint(V, (7,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[2] = IGNORE_INDEX
    ours = fused.CrossEntropy.apply(logits, targets, IGNORE_INDEX)
    expected = F.cross_entropy(logits.double(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(ours, expected.float())
    gradient, = torch.autograd.grad(0.5 * ours, logits)
    wanted, = torch.autograd.grad(0.5 * expected, logits)
    torch.testing.assert_close(gradient, wanted.to(dtype), atol=torch.finfo(dtype).eps, rtol=0.01)
    assert (gradient[2] == 0).all()


def test_cross_entropy_of_no_counted_token_is_zero():
    logits = random(3, 10)
    loss = fused.CrossEntropy.apply(logits, torch.full((3,), IGNORE_INDEX, device=DEVICE), IGNORE_INDEX)
    assert loss == 0 and (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_what_the_compiler_is_told_of_the_kernels_is_true():
    qkv = random(2, 3, 5, 8).detach()
    cos, sin = (t.to(DEVICE) for t in rope_table(3, 8, 100.0))
    grad = torch.ones(2, 3, 3, 8, device=DEVICE)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.heads_forward, (qkv, cos, sin, 4, 1e-5), test_utils=tests)
    torch.library.opcheck(fused.heads_backward, (grad, grad[:, :1], grad[:, :1], qkv, cos, sin, None),
                          test_utils=tests)
    logits, targets = random(4, 9).detach(), torch.arange(4, device=DEVICE)
    torch.library.opcheck(fused.cross_entropy_forward, (logits, targets, IGNORE_INDEX), test_utils=tests)
    inputs = logits, targets, logits[:, 0].clone(), logits.sum(), IGNORE_INDEX
    torch.library.opcheck(fused.cross_entropy_backward, inputs, test_utils=tests)


def test_kernels_are_used_only_where_they_run(tiny_model, monkeypatch, capsys):
    """A model as on a GPU whose Triton works, and then as on one whose Triton cannot compile."""
    monkeypatch.setattr(model, "can_compile", lambda device: device.type == DEVICE)
    gpu.usable_kernels.cache_clear()
    made = tiny_model().to(DEVICE)
    assert made.gpu_cross_entropy is fused.CrossEntropy
    assert all(block.attn.gpu_heads is fused.Heads for block in made.transformer["h"])
    odd = tiny_model(n_head=1, n_embd=24).to(DEVICE)  # a head size that is no power of two
    assert odd.transformer["h"][0].attn.gpu_heads is None
    assert capsys.readouterr().err == ""
    gpu.usable_kernels.cache_clear()
    monkeypatch.setattr(fused, "cross_entropy_forward", mock.Mock(side_effect=OSError("no Python.h\nat all")))
    made = tiny_model().to(DEVICE)
    assert made.gpu_cross_entropy is None
    assert all(block.attn.gpu_heads is None for block in made.transformer["h"])
    tiny_model().to(DEVICE)
    assert capsys.readouterr().err.splitlines() == [
        "note: gpu/fused.py is not used, so this will be slower: OSError: no Python.h"]
    gpu.usable_kernels.cache_clear()


def with_kernels(made):
    """The model as it is on a GPU with Triton."""
    made.to(DEVICE)
    made.gpu_cross_entropy = fused.CrossEntropy
    for block in made.transformer["h"]:
        block.attn.gpu_heads = fused.Heads
    return made


def without_kernels(made):
    """The model as its formulas are written."""
    made.to(DEVICE)
    made.gpu_cross_entropy = None
    for block in made.transformer["h"]:
        block.attn.gpu_heads = None
    return made


@pytest.mark.parametrize("way", ["eager", "compiled", "documents"])
@pytest.mark.parametrize("values", [{}, dict(n_kv_head=2, qk_norm=True), dict(use_rope=False, n_prev=2)],
                         ids=["default", "grouped and normalised", "learned positions"])
def test_the_kernels_change_no_logits_loss_or_gradient_of_a_model(tiny_model, monkeypatch, values, way):
    monkeypatch.setattr(cpu_fused, "can_fuse", lambda *args: False)
    plain, fast = without_kernels(tiny_model(**values)), with_kernels(tiny_model(**values))
    idx = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets = idx.roll(-1, 1)
    targets[0, :4] = IGNORE_INDEX
    documents = documents_of(idx, int(idx[0, 5]), -1) if way == "documents" else None
    graphs = CountedGraphs()
    torch._dynamo.reset()
    trained = fast
    if way == "compiled":
        trained = torch.compile(fast, backend=graphs, fullgraph=True, dynamic=False)
    expected = plain(idx, targets, documents=documents)
    found = trained(idx, targets, documents=documents)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    expected[1].backward()
    found[1].backward()
    for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    assert graphs.n == (way == "compiled")


def test_rope_of_the_model_is_that_of_the_kernel():
    """apply_rope, which the kernel replaces, on queries alone."""
    x = random(1, 6, 2, 8).detach()
    cos, sin = (t[:6, None].to(DEVICE) for t in rope_table(6, 8, 10000.0))
    qkv = torch.cat([x, x], dim=2)  # 2 queries, 1 key, 1 value
    q = fused.Heads.apply(qkv, cos, sin, 2, 1, None)[0]
    torch.testing.assert_close(q.transpose(1, 2), apply_rope(x, cos, sin))
