"""Optimizers and the learning-rate schedule, held against numbers and against torch's own."""

import copy
import math
from unittest import mock

import pytest
import torch
from conftest import TINY

from config import ModelConfig, TrainConfig
from model import GPT
from muon import Muon, orthogonalize, orthogonalize_bfloat16
from optimizer import build_optimizer, learning_rate

SCHEDULE = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=14)


def model_and_optimizer(**values):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**TINY, vocab_size=50))
    return model, build_optimizer(model, TrainConfig(**values))


def rates(n=16, **values):
    return [learning_rate(step, TrainConfig(**{**SCHEDULE, **values})) for step in range(n)]


def test_the_learning_rate_is_above_zero_at_the_first_step():
    assert rates()[0] == pytest.approx(0.2)
    assert rates(warmup_iters=0)[0] == 1.0
    assert rates(decay_lr=False)[0] == 1.0


def test_warm_up_is_linear_up_to_learning_rate():
    assert rates()[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_decay_ends_at_min_lr_and_stays_there():
    got = rates(40)
    assert got[4] == 1.0 and got[9] == pytest.approx(0.55) and got[14:] == pytest.approx([0.1] * 26)
    assert got[5] == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.1 * math.pi)))
    assert all(a >= b for a, b in zip(got[4:], got[5:], strict=False))


def test_linear_decay_falls_evenly():
    got = rates(lr_schedule="linear")
    assert got[4:15] == pytest.approx([1.0 - 0.09 * i for i in range(11)])


def test_lr_decay_iters_zero_decays_until_max_steps():
    assert rates(lr_decay_iters=0, max_steps=14) == rates()


def test_without_decay_lr_the_rate_is_constant():
    assert rates(decay_lr=False) == [1.0] * 16


def test_one_adamw_step_is_the_papers():
    """First step: the moments' bias cancels, so the update is the gradient's sign; then decoupled decay."""
    model, optimizer = model_and_optimizer(beta1=0.9, beta2=0.99, weight_decay=0.5)
    matrix, norm = model.lm_head.weight, model.transformer["ln_f"].weight
    torch.nn.init.constant_(matrix, 2.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, -0.3)
    optimizer.set_lr(0.1)
    optimizer.step()
    torch.testing.assert_close(matrix, torch.full_like(matrix, 2.0 * (1 - 0.1 * 0.5) + 0.1))
    torch.testing.assert_close(norm, torch.full_like(norm, 1.0 + 0.1))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.6)
    optimizer.step()
    m = (0.9 * 0.1 * -0.3 + 0.1 * 0.6) / (1 - 0.9**2)
    v = (0.99 * 0.01 * 0.09 + 0.01 * 0.36) / (1 - 0.99**2)
    torch.testing.assert_close(norm, torch.full_like(norm, 1.1 - 0.1 * m / math.sqrt(v)))


def test_one_muon_step_is_pinned_to_numbers():
    """By hand: on an orthogonal gradient the iteration is the polynomial on each singular value."""
    p = torch.nn.Parameter(torch.eye(2) * 3)
    optimizer = Muon([p], lr=0.1, weight_decay=0.5, momentum=0.95)
    p.grad = torch.tensor([[0.0, 4.0], [-4.0, 0.0]])
    optimizer.step()
    s = 1 / math.sqrt(2)  # of the gradient, over its Frobenius norm
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    size = 0.1 * 0.2 * math.sqrt(2) * s
    expected = torch.tensor([[2.85, -size], [size, 2.85]])
    torch.testing.assert_close(p.data, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)], ids=str)
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_muon_equals_torchs_within_bfloat16_rounding(shape, in_bfloat16):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = dict(lr=0.02, weight_decay=0.1)
    optimizers = (Muon([ours], in_bfloat16=in_bfloat16, **settings),
                  torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings))
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    states = [optimizer.state_dict()["state"][0] for optimizer in optimizers]
    torch.testing.assert_close(states[0], states[1])
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < (1e-6 if in_bfloat16 else 0.02) * moved


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)], ids=str)
@pytest.mark.parametrize("iterate", [orthogonalize, orthogonalize_bfloat16])
def test_matrices_that_are_orthogonalized_together_equal_those_that_are_alone(shape, iterate):
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    settings = (3.4445, -4.7750, 2.0315), 5, 1e-7
    together = iterate(matrices, *settings)
    alone = torch.stack([iterate(matrix, *settings) for matrix in matrices])
    torch.testing.assert_close(together, alone)


def three_muon_steps(rank, world_size):
    """Weights and momentum of 5 matrices of one shape and one of another after three steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = 5 * [(6, 8)] + [(8, 6)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    muon = Muon(params, rank, world_size, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        muon.step()
    return [p.data for p in params] + [muon.state[p]["momentum_buffer"] for p in params]


def muon_process(rank, world_size, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                         world_size=world_size)
    torch.save(three_muon_steps(rank, world_size), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_that_share_muons_matrices_out_get_the_weights_of_one_process(tmp_path):
    """Three of them: the shares of 5 matrices are of 2, 2 and 1, and two have none of the single matrix."""
    torch.multiprocessing.spawn(muon_process, (3, str(tmp_path)), nprocs=3)
    expected = three_muon_steps(0, 1)
    for rank in range(3):
        for got, value in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert torch.equal(got, value)


def test_matrices_of_one_shape_go_together_except_on_one_cpu():
    def groups(device, world_size=1):
        params = [torch.nn.Parameter(torch.empty(shape, device=device)) for shape in 5 * [(6, 8)] + [(8, 6)]]
        for p in params:
            p.grad = torch.empty_like(p)
        return [len(batch) for batch in Muon(params, 0, world_size)._batches(params)]

    assert groups("meta") == groups("cpu", 2) == [5, 1] and groups("cpu") == [1] * 6


def test_what_processes_send_each_other_is_contiguous_as_nccl_wants_it(monkeypatch):
    sent = []

    def all_gather(shares, share, async_op):
        sent.append(share)
        for other in shares:
            other.copy_(share)
        return mock.Mock()

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    three_muon_steps(0, 2)
    assert len(sent) == 3 * 2 and all(share.is_contiguous() for share in sent)


def test_a_restored_state_is_a_copy(tmp_path):
    """torch.load(mmap=True) leaves tensors in their file, which another program may write over."""
    model, optimizer = model_and_optimizer(optimizer="muon")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", mmap=True)
    _, other = model_and_optimizer(optimizer="muon")
    other.load_state_dict(states)
    in_file = {tensor.data_ptr() for state in states for moments in state["state"].values()
               for tensor in moments.values()}
    restored = {tensor.data_ptr() for part in other.optimizers for moments in part.state.values()
                for tensor in moments.values()}
    assert len(restored) > 10 and not restored & in_file


def test_which_kernel_computes_a_step_is_not_taken_from_the_checkpoint():
    """A run that is continued on another device has its own `fused`, and its moments."""
    model, optimizer = model_and_optimizer(optimizer="muon")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = copy.deepcopy(optimizer.state_dict())
    for group in states[0]["param_groups"]:
        group["fused"] = None
    _, other = model_and_optimizer(optimizer="muon")
    other.load_state_dict(states)
    assert {group["fused"] for group in other.optimizers[0].param_groups} == {True}
    for own, restored in zip(optimizer.state_dict(), other.state_dict(), strict=True):
        torch.testing.assert_close(own["state"], restored["state"], rtol=0, atol=0)


def test_orthogonalize_brings_singular_values_near_one():
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    for m in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonalize(m, (3.4445, -4.7750, 2.0315), 5, 1e-7))
        assert values.min() > 0.5 and values.max() < 1.3
    assert orthogonalize(torch.zeros(4, 4), (3.4445, -4.7750, 2.0315), 5, 1e-7).count_nonzero() == 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_acts_on_matrices_only(kind):
    """With gradients of zero, decay is all that moves a parameter."""
    model, optimizer = model_and_optimizer(optimizer=kind, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.set_lr(0.1)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.data, before[name] * (0.95 if p.ndim == 2 else 1.0), msg=name)


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model, optimizer = model_and_optimizer(optimizer="muon")
    adamw, muon = optimizer.optimizers
    names = {p: name for name, p in model.named_parameters()}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert taken == {f"transformer.h.{n}.{part}.weight" for n in range(2)
                     for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted(rest) == sorted(set(names.values()) - taken)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_set_lr_reaches_all(kind):
    model, optimizer = model_and_optimizer(optimizer=kind)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    optimizer.set_lr(0.123)
    assert {group["lr"] for group in optimizer.param_groups} == {0.123}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_embedding_may_learn_faster_and_its_weight_decay_stays_that_of_the_rest(kind):
    """With gradients of zero, decay is all that moves a parameter; the sign of a gradient moves one by lr."""
    model = GPT(ModelConfig(**TINY, vocab_size=50, n_prev=1))
    optimizer = build_optimizer(model, TrainConfig(optimizer=kind, embedding_lr=4.0, weight_decay=0.5))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    wte, prev = model.lm_head.weight, model.transformer["prev"][0].weight
    before = wte.detach().clone(), prev.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.set_lr(0.01)
    optimizer.step()
    torch.testing.assert_close(wte.data, before[0] * (1 - 0.01 * 0.5) - 0.04)
    torch.testing.assert_close(prev.data, before[1] * (1 - 0.01 * 0.5) - 0.02)


def test_betas_reach_adamw():
    _, optimizer = model_and_optimizer(beta1=0.5, beta2=0.6)
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.5, 0.6)}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_continues_from_its_state_bit_for_bit(kind):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            idx = torch.randint(0, 50, (2, 16))
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = model_and_optimizer(optimizer=kind)
    steps(model, optimizer, range(3))
    other, continued = model_and_optimizer(optimizer=kind)
    other.load_state_dict(model.state_dict())
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both would share the moments
    steps(model, optimizer, range(3, 6))
    steps(other, continued, range(3, 6))
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
