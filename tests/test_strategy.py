"""How the micro-batches of a step reach the device: values that are read, passes that are folded, graphs."""

import functools
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import CountedGraphs, Workspace
from torch.utils._python_dispatch import TorchDispatchMode

import device
import strategy
import train
from strategy import join, round_up_width

READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


# ---- Values that are read from the device ----

class CountReads(TorchDispatchMode):
    """Counts the operations that give Python a tensor's value, for which a GPU must be waited for."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func._schema.name in READS
        return func(*args, **(kwargs or {}))


class Watched(train.SingleProcess):
    """Counts the reads of a device value in each step, by the loop's own `read` and by anything else."""

    def __init__(self):
        self.reads = []
        self.counter = CountReads()

    def read(self, *values):
        before = self.counter.n
        values = super().read(*values)
        self.counter.n = before + 1  # its own operations are that one read
        return values

    def take_step(self, lr, norm):
        norm = super().take_step(lr, norm)
        self.reads.append(self.counter.n)
        self.counter.n = 0
        return norm


@pytest.mark.parametrize("words", [
    ["--optimizer", "muon"], ["--optimizer", "adamw", "--grad_clip", 0],
    ["--optimizer", "muon", "-t", "sft", "--from_checkpoint", ""],
    ["--optimizer", "adamw", "--document_mask", "--dropout", 0.1],
], ids=lambda words: " ".join(map(str, words)))
def test_a_step_reads_one_device_value(workspace, words):
    process = Watched()
    args = workspace.arguments("--max_steps", 8, "--eval_interval", 100, "--gradient_accumulation_steps", 4,
                               *words)
    with workspace.here(), process.counter:
        train.train(args, process)
    # The first step follows a validation and the set-up of the optimizers.
    assert process.reads[1:] == [1] * 7


# ---- Folding ----

class Folding(train.SingleProcess):
    """Folds `fold` micro-batches into a pass, as CUDA does; keeps the gradients of the first step."""

    def __init__(self, fold):
        self.wanted = fold
        self.passes = 0
        self.gradients = None

    def wrap(self, model, optimizer):
        super().wrap(model, optimizer)
        self.fold = self.wanted
        return self.compiled()

    def backward(self, loss):
        self.passes += 1
        super().backward(loss)

    def clip_gradients(self):
        if self.gradients is None:
            self.gradients = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        return super().clip_gradients()


class SmallDevice(Folding):
    """A device whose memory holds the passes of `room` rows."""

    def __init__(self, fold, room):
        super().__init__(fold)
        self.room = room

    def backward(self, loss):
        if self.fold * self.config.batch_size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().backward(loss)


def train_with(process, workspace, *words):
    """Train two steps of four micro-batches, of four rows each."""
    with workspace.here():
        return train.train(workspace.arguments("--gradient_accumulation_steps", 4, "--max_steps", 2, *words),
                           process)


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_folded_micro_batches_give_the_same_gradients_in_fewer_passes(workspace, task):
    words = ["-t", task, "--from_checkpoint", ""]
    expected = Folding(1)
    train_with(expected, workspace, *words)
    assert expected.passes == 2 * 4
    for fold in (2, 4):
        process = Folding(fold)
        train_with(process, workspace, *words)
        assert process.passes == 2 * 4 // fold
        torch.testing.assert_close(process.gradients, expected.gradients, rtol=1e-4, atol=1e-6)


def test_out_of_memory_halves_the_passes_and_goes_on(workspace, capsys):
    process = SmallDevice(4, room=4)
    assert train_with(process, workspace)["step"] == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [line.split(": ")[1] for line in said] == [
        "2 instead of 4 micro-batches in a pass", "1 instead of 2 micro-batches in a pass"]
    assert process.fold == 1
    expected = Folding(1)
    train_with(expected, workspace)
    torch.testing.assert_close(process.gradients, expected.gradients, rtol=1e-4, atol=1e-6)


def test_out_of_memory_compiles_again_without_a_cuda_graph_which_holds_one_pass(workspace, monkeypatch):
    one_pass = []
    monkeypatch.setattr(strategy, "compile_model", lambda model, device, one: one_pass.append(one) or model)
    assert train_with(SmallDevice(4, room=8), workspace, "--compile", "true")["step"] == 2
    assert one_pass[1:] == [True, False]  # the first is for a CPU's single micro-batches


def test_out_of_memory_validates_once(workspace, capsys):
    train_with(SmallDevice(4, room=4), workspace)
    assert capsys.readouterr().out.count("step 0: validation loss") == 1


def test_out_of_memory_in_a_single_micro_batch_says_what_to_do(workspace):
    process = SmallDevice(2, room=3)
    with pytest.raises(train.InputError, match="out of memory on cpu; lower batch_size"):
        train_with(process, workspace)


def test_batches_are_padded_to_the_widest_and_what_is_added_carries_no_loss():
    batches = [(np.ones((2, 3), np.int64), np.full((2, 3), 7)),
               (np.ones((1, 5), np.int64), np.full((1, 5), 8))]
    x, y = join(batches)
    assert x.shape == y.shape == (3, 5)
    assert (y[:2, 3:] == train.IGNORE).all() and (y[:2, :3] == 7).all() and (y[2] == 8).all()
    x, y = round_up_width(*batches[0], 4)
    assert x.shape == (2, 4) and (y[:, 3] == train.IGNORE).all()


# ---- Compiling ----

@pytest.mark.parametrize("words, most", [
    (["-t", "pretrain"], 3), (["-t", "pretrain", "--document_mask"], 3),
    (["-t", "sft", "--from_checkpoint", "", "--batch_size", 2], 8),
], ids=lambda words: " ".join(map(str, words)) if isinstance(words, list) else str(words))
def test_training_compiles_few_graphs(workspace, words, most):
    torch._dynamo.reset()
    graphs = CountedGraphs()
    compiled = functools.partial(torch.compile, backend=graphs)
    with workspace.here(), mock.patch.object(device.torch, "compile", compiled):
        result = train.train(workspace.arguments("--compile", "true", "--max_steps", 30, *words),
                             strategy.SingleProcess())
    torch._dynamo.reset()
    assert result["step"] == 30 and 1 <= graphs.n <= most
