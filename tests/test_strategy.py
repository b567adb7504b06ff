"""How the micro-batches of a step reach the device: values that are read, passes that are folded, graphs."""

import functools
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import CountedGraphs, Workspace
from torch.utils._python_dispatch import TorchDispatchMode

import device
import strategy
import train
from config import TrainConfig
from strategy import WIDTHS, join, round_up_width
from tokenizer import Tokenizer, encode_conversation

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
        self.counter.n = before + max(1, self.counter.n - before)  # .tolist() is a read that is not counted
        return values

    def optimizer_step(self, lr, norm):
        norm = super().optimizer_step(lr, norm)
        self.reads.append(self.counter.n)
        self.counter.n = 0
        return norm


@pytest.mark.parametrize("words", [
    ["--optimizer", "muon"], ["--optimizer", "adamw", "--grad_clip", 0],
    ["--optimizer", "muon", "-t", "sft", "--from_checkpoint", ""],
    ["--optimizer", "adamw", "--document_mask", "--dropout", 0.1],
], ids=lambda words: " ".join(map(str, words)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_reads_one_device_value(workspace, words, dtype):
    process = Watched()
    args = workspace.arguments("--max_steps", 8, "--eval_interval", 100, "--gradient_accumulation_steps", 4,
                               *words)
    with workspace.here(), mock.patch.object(strategy, "pick_dtype", return_value=dtype), process.counter:
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
    """A device whose memory holds passes of `room` rows; with more it runs out in the last pass of a step."""

    def __init__(self, fold, room):
        super().__init__(fold)
        self.room = room

    def micro_step(self, last):
        self.is_last = last
        return super().micro_step(last)

    def backward(self, loss):
        if self.is_last and self.fold * self.config.batch_size > self.room:
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


def test_out_of_memory_frees_the_failed_pass_before_it_makes_smaller_ones(workspace, monkeypatch):
    losses = []
    freed = []

    class Watching(SmallDevice):
        def backward(self, loss):
            losses.append(weakref.ref(loss))
            super().backward(loss)

    def shrink_passes(*args):
        freed.append(losses[-1]() is None)
        return strategy.shrink_passes(*args)

    monkeypatch.setattr(train, "shrink_passes", shrink_passes)
    train_with(Watching(4, room=8), workspace)
    assert freed == [True]


def test_out_of_memory_elsewhere_is_one_line(workspace, monkeypatch):
    def validate(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …")

    monkeypatch.setattr(train, "validation_loss", validate)
    assert workspace.refused_training() == (
        "error: out of memory: 20.00 GiB more were needed; use a smaller batch or model")


def test_out_of_memory_on_a_cpu_is_one_line(workspace):
    program = "import resource, script; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)); " \
              "script.run_script(lambda: __import__('torch').empty(2**33))"
    assert workspace.run("-c", program, status=2).stderr == (
        "error: out of memory: 34359738368 bytes more were needed; use a smaller batch or model\n")


def on_cuda(process, **values):
    """A strategy as it is on a GPU, up to its first step."""
    process.setup(TrainConfig(device="cpu", **values))
    process.device = torch.device("cuda", 0)
    return process


def test_cuda_folds_what_fits_except_between_processes_which_could_not_agree_on_less(tiny_model):
    model = tiny_model(block_size=1024)
    for batch_size, accumulation, expected in ((4, 4, 4), (16, 8, 4), (16, 6, 3), (64, 4, 1), (100, 2, 1)):
        process = on_cuda(train.SingleProcess(), batch_size=batch_size, compile="false",
                          gradient_accumulation_steps=accumulation)
        process.wrap(model, None)
        assert process.fold == expected, (batch_size, accumulation)
        process.world_size = 2
        process.wrap(model, None)
        assert process.fold == 1


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
    assert (y[:2, 3:] == train.IGNORE_INDEX).all() and (y[:2, :3] == 7).all() and (y[2] == 8).all()
    x, y = round_up_width(*batches[0], 32)
    assert x.shape == (2, 4) and (y[:, 3] == train.IGNORE_INDEX).all()


# ---- Compiling ----

def graphs_of_training(workspace, *words):
    """Train 30 steps, compiled; returns the number of graphs. A shape that is not compiled fails."""
    torch._dynamo.reset()
    graphs = CountedGraphs()
    compiled = functools.partial(torch.compile, backend=graphs)
    with workspace.here(), mock.patch.object(device.torch, "compile", compiled), \
            torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        result = train.train(workspace.arguments("--compile", "true", "--max_steps", 30, *words),
                             strategy.SingleProcess())
    torch._dynamo.reset()
    assert result["step"] == 30
    return graphs.n


@pytest.mark.parametrize("words", [[], ["--document_mask"], ["--block_size", 27]], ids=str)
def test_pretraining_compiles_one_graph_and_validation_none(workspace, words):
    assert graphs_of_training(workspace, *words) == 1


@pytest.mark.parametrize("block_size", [64, 63, 50])
def test_fine_tuning_on_rows_of_all_lengths_compiles_at_most_eight_graphs(workspace, block_size):
    tokenizer = Tokenizer.load(workspace.path / "dataset" / "tokenizer.json")
    rows = []
    for length in range(1, block_size - 3):
        ids, mask = encode_conversation(tokenizer, [("A", "B" * length)])
        rows += [np.stack([ids, mask], axis=1), np.zeros((1, 2))]
    np.save(workspace.path / "dataset" / "sft_train.npy", np.concatenate(rows).astype(tokenizer.dtype))
    words = ["-t", "sft", "--from_checkpoint", "", "--block_size", block_size, "--batch_size", 1]
    assert 4 < graphs_of_training(workspace, *words) <= WIDTHS


def test_there_are_at_most_eight_widths_for_every_block_size():
    for block_size in range(1, 300):
        widths = set()
        for T in range(1, block_size + 1):
            x, y = round_up_width(np.ones((1, T), np.int64), np.ones((1, T), np.int64), block_size)
            assert T <= x.shape[1] == y.shape[1] <= block_size
            widths.add(x.shape[1])
        assert len(widths) <= WIDTHS


def test_auto_compiles_long_runs_where_triton_works(monkeypatch):
    def compiles(widths=1, **values):
        process = strategy.SingleProcess()
        process.setup(TrainConfig(device="cpu", **values), widths)
        return process.compiles

    assert not compiles()  # a CPU
    monkeypatch.setattr(strategy, "can_compile", lambda device: True)
    monkeypatch.setattr(strategy, "usable_kernels", lambda device: None)  # no Python.h, say
    assert not compiles() and compiles(compile="true")
    monkeypatch.setattr(strategy, "usable_kernels", lambda device: strategy)
    assert compiles() and compiles(max_steps=1000) and not compiles(compile="false")
    assert not compiles(max_steps=999) and not compiles(max_minutes=1.9) and compiles(max_minutes=2)
    assert compiles(WIDTHS, max_steps=8000) and not compiles(WIDTHS, max_steps=7999)  # a graph for each


def test_a_cuda_graph_is_for_one_pass_on_one_card_without_document_masks(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(strategy, "compile_model", lambda model, device, one: asked.append(one) or model)
    process = on_cuda(train.SingleProcess(), batch_size=4, compile="true", gradient_accumulation_steps=4)
    process.wrap(tiny_model(), None)
    process.config.document_mask = True
    process.compiled()
    process.config.document_mask = False
    process.world_size = 2
    process.compiled()
    process.world_size = 1
    process.fold = 2
    process.compiled()
    assert asked == [True, False, False, False]
