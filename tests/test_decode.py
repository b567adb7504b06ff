"""The compiled decoding step computes what model.py does, and steps aside where it cannot."""

import os
import shutil

import pytest
import torch

from config import ModelConfig
from cpu import decode, native
from cpu.int8 import Int8Linear, quantize
from generate import decoding_step, generate
from model import GPT, KVCache
from script import InputError

NO_COMPILER = pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler")
OPTIONS = [
    {}, dict(activation="relu2", qk_norm=True, n_prev=3), dict(activation="swiglu", n_kv_head=2, bias=True),
    dict(use_rope=False, final_norm="layernorm"), dict(n_embd=60, n_head=6, vocab_size=67, n_layer=1),
    dict(n_embd=20, n_head=2, n_kv_head=1, vocab_size=1, bias=True, activation="swiglu", n_prev=1),
]


def trained_like(**values):
    """A GPT whose every parameter differs from its neighbours, also those that begin as 1 or 0."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{"block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 50,
                               **values})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def started(model):
    """A cache that holds a prompt of two tokens."""
    cache = KVCache(model.config, 1, 32)
    model(torch.tensor([[1, 2]]), cache=cache)
    return cache


@torch.no_grad()
def both(model, batch_size, prompt=2, reference=None):
    """Logits of compiled and of PyTorch's steps over the rest of a context after a prompt, (steps, B, V)."""
    idx = torch.randint(model.config.vocab_size, (batch_size, model.config.block_size))
    results = []
    for way in ("compiled", "PyTorch"):
        used = model if way == "compiled" else reference or model
        cache = KVCache(model.config, batch_size, idx.size(1))
        used(idx[:, :prompt], cache=cache)
        step = decode.CompiledStep(model, cache, decode.library()) if way == "compiled" else \
            lambda token, used=used, cache=cache: used(token[:, None], cache=cache)[0][:, -1]
        results.append(torch.stack([step(token) for token in idx[:, prompt:].unbind(1)]))
        assert cache.n_tokens == idx.size(1)
    return results


@NO_COMPILER
@pytest.mark.parametrize("batch_size", [1, 2, 17])
@pytest.mark.parametrize("values", OPTIONS, ids=range(len(OPTIONS)))
def test_the_compiled_step_gives_the_models_logits(values, batch_size):
    got, expected = both(trained_like(**values), batch_size)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@NO_COMPILER
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("values", OPTIONS, ids=range(len(OPTIONS)))
def test_with_int8_weights_it_gives_the_logits_of_the_rounded_weights(values, batch_size):
    model, rounded = trained_like(**values), trained_like(**values)
    quantize(model)
    rounded.lm_head.weight = torch.nn.Parameter(rounded.lm_head.weight.clone())  # the embedding stays exact
    modules = dict(model.named_modules())
    for name, linear in rounded.named_modules():
        if isinstance(linear, torch.nn.Linear):
            assert isinstance(modules[name], Int8Linear)
            linear.weight.data = modules[name].weight * modules[name].scale[:, None]
    got, expected = both(model, batch_size, prompt=12, reference=rounded)  # few tokens PyTorch rounds more
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


@NO_COMPILER
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_number_of_threads_changes_no_logit_but_by_rounding(threads):
    model = trained_like(vocab_size=67)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got, expected = both(model, 1)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@NO_COMPILER
def test_the_shortest_prompt_has_fewer_tokens_than_n_prev():
    got, expected = both(trained_like(n_prev=3), 1, prompt=1)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


@NO_COMPILER
@torch.no_grad()
def test_generation_takes_the_compiled_step_and_other_types_devices_and_training_do_not():
    model = trained_like()
    cache = started(model)
    assert isinstance(decoding_step(model, cache, 5), decode.CompiledStep)
    model.train()
    assert not isinstance(decoding_step(model, cache, 5), decode.CompiledStep)
    model.eval().double()
    assert decode.usable_library(model) is None
    assert decode.usable_library(trained_like().to("meta")) is None
    assert decode.usable_library(trained_like().to(torch.bfloat16)) is None


@NO_COMPILER
@torch.no_grad()
def test_a_token_outside_the_vocabulary_is_refused_before_memory_is_read():
    model = trained_like()
    step = decoding_step(model, started(model), 5)
    for token in (-1, 50):
        with pytest.raises(IndexError, match=f"token id {token} is out of range"):
            step(torch.tensor([token]))
    with pytest.raises(ValueError, match="2 tokens for 1 sequences"):
        step(torch.tensor([1, 2]))
    longer = KVCache(model.config, 1, 40)  # than the model's tables of positions
    model(torch.arange(32)[None], cache=longer)
    with pytest.raises(InputError, match="33 tokens do not fit into the model's block_size 32"):
        decoding_step(model, longer, 5)(torch.tensor([1]))
    other = KVCache(ModelConfig(n_layer=1, n_head=4, n_embd=32, block_size=32), 1, 32)
    with pytest.raises(ValueError, match="where .* is expected"):
        decoding_step(model, other, 5)


@NO_COMPILER
def test_a_change_to_model_py_alone_is_reported_and_takes_effect(capsys):
    """Though a model of the same config has been checked before."""
    prompt, same_config, changed = torch.tensor([[1, 2, 3]]), trained_like(), trained_like()
    assert decode.agrees(same_config, decode.library())
    for block in changed.transformer["h"]:
        block.mlp.activation = torch.tanh
    got = [int(t) for t in generate(changed, prompt, 12, temperature=0)]
    assert "decode.c gives other logits than model.py" in capsys.readouterr().err
    idx = prompt
    with torch.no_grad():
        for token in got:
            assert token == int(changed(idx, last_only=True)[0].argmax())
            idx = torch.cat([idx, torch.tensor([[token]])], dim=1)


@NO_COMPILER
@pytest.mark.parametrize("fault", ["second sequence", "sixth token"])
@pytest.mark.parametrize("int8", [False, True])
def test_the_guard_reads_two_sequences_and_more_tokens_than_n_prev(monkeypatch, capsys, fault, int8):
    model = trained_like(n_prev=3)
    if int8:
        quantize(model)
    assert decode.difference(model, decode.library()) == ""

    class Faulty(decode.CompiledStep):
        def __call__(self, token):
            logits = super().__call__(token)
            if fault == "second sequence":
                logits[1:] += 1
            elif self.cache.n_tokens > 5:
                logits += 1
            return logits
    monkeypatch.setattr(decode, "CompiledStep", Faulty)
    assert decode.usable_library(model) is None
    assert "decode.c gives other logits than model.py" in capsys.readouterr().err


@NO_COMPILER
@pytest.mark.parametrize("values", OPTIONS, ids=range(len(OPTIONS)))
def test_int8_weights_agree_with_the_dequantised_products(values):
    model = trained_like(**values)
    quantize(model)
    assert decode.agrees(model, decode.library())


@NO_COMPILER
def test_weights_made_int8_after_a_check_are_checked_again(monkeypatch):
    model = trained_like()
    assert decode.agrees(model, decode.library())
    quantize(model)
    monkeypatch.setattr(decode, "difference", lambda model, library: "is to be checked")
    assert not decode.agrees(model, decode.library())


@NO_COMPILER
def test_a_compiler_that_ends_in_the_middle_of_an_answer_changes_nothing(monkeypatch):
    model, library = trained_like(), decode.library
    expected = greedy(model)
    asked = []

    def ready_at_the_second_question():
        asked.append(True)
        return library() if len(asked) > 1 else None
    monkeypatch.setattr(decode, "library", ready_at_the_second_question)
    assert greedy(model) == expected and len(asked) == 1
    assert greedy(model) == expected and len(asked) == 2


@NO_COMPILER
def test_a_model_of_other_parts_is_generated_from_with_pytorch(capsys):
    model = trained_like()
    for block in model.transformer["h"]:
        block.attn.c_proj = torch.nn.Sequential(block.attn.c_proj, torch.nn.Identity())
    assert len(list(generate(model, torch.tensor([[1]]), 5, temperature=0))) == 5
    assert "decode.c does not fit model.py" in capsys.readouterr().err


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """native.py over a folder that has only decode.c in it: nothing is compiled yet."""
    shutil.copy(os.path.join(native.HERE, "decode.c"), tmp_path)
    monkeypatch.setattr(native, "HERE", str(tmp_path))
    native.start.cache_clear()
    yield tmp_path / "__pycache__"
    native.start.cache_clear()


def greedy(model):
    return [int(t) for t in generate(model, torch.tensor([[1, 2, 3]]), 20, temperature=0)]


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc"])
def test_without_a_compiler_pytorch_generates_the_same_and_nothing_is_left(elsewhere, monkeypatch, compiler):
    model = trained_like()
    expected = greedy(model)
    monkeypatch.setenv("CC", compiler)
    native.start.cache_clear()
    assert greedy(model) == expected
    assert native.wait("decode.c") is None and not list(elsewhere.iterdir())


@NO_COMPILER
def test_generation_does_not_wait_for_the_compiler_and_the_library_is_made_once(elsewhere):
    model = trained_like()
    expected = greedy(model)
    begun = list(elsewhere.glob("*.so"))
    assert not begun  # the text was there before the library
    assert native.wait("decode.c") and decode.library() and greedy(model) == expected
    made = list(elsewhere.glob("*.so"))
    when = made[0].stat().st_mtime_ns
    native.start.cache_clear()
    assert native.start("decode.c") == str(made[0]) and made[0].stat().st_mtime_ns == when
    assert list(elsewhere.iterdir()) == made


@NO_COMPILER
def test_a_damaged_library_or_a_folder_that_cannot_be_written_to_leaves_pytorch(elsewhere, monkeypatch):
    model = trained_like()
    path = native.start("decode.c")
    assert path
    native.COMPILING[path].wait(60)
    with open(path, "wb") as f:
        f.write(b"\x7fELF")
    assert decode.library() is None and len(greedy(model)) == 20
    native.start.cache_clear()
    shutil.rmtree(elsewhere)
    elsewhere.write_text("a file where the folder should be")
    assert native.start("decode.c") is None and len(greedy(model)) == 20
