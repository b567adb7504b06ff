"""The model: causality, cache, positions, loss, initialisation, names."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, CountedGraphs

from config import IGNORE_INDEX, ModelConfig
from cpu import fused
from device import set_sdp_kernel
from documents import documents_of, positions_in
from generate import generate, new_cache
from generate_gpu import StaticKVCache
from model import GPT, KVCache, apply_rope, rope_table
from script import InputError

# Every option of the model, alone, and all of them together.
VARIANTS = {
    "default": {},
    "learned_positions": dict(use_rope=False),
    "rope_theta": dict(rope_theta=100.0),
    "gqa": dict(n_kv_head=2),
    "mqa": dict(n_kv_head=1),
    "qk_norm": dict(qk_norm=True),
    "relu2": dict(activation="relu2"),
    "swiglu": dict(activation="swiglu"),
    "bias": dict(bias=True),
    "n_prev": dict(n_prev=3),
    "layernorm": dict(final_norm="layernorm", norm_eps=1e-3),
    "all": dict(n_kv_head=2, n_prev=2, qk_norm=True, activation="swiglu", bias=True, final_norm="layernorm"),
}
every_variant = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())


def some_ids(batch=2, length=12, vocab_size=50, seed=1):
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradient_of_output(model, idx, position, documents=None):
    """Size of the gradient of the logits at `position` with respect to each input embedding, (B, T)."""
    embeddings = []
    hook = model.transformer["wte"].register_forward_hook(
        lambda module, args, out: embeddings.append(out) or out.retain_grad())
    logits, _ = model(idx, documents=documents)
    hook.remove()
    logits[:, position].square().sum().backward()
    return embeddings[0].grad.norm(dim=-1)


@every_variant
def test_no_output_depends_on_a_later_token(tiny_model, values):
    gradient = gradient_of_output(tiny_model(**values), some_ids(), position=5)
    assert (gradient[:, 6:] == 0).all()
    assert (gradient[:, :6] > 0).all()


@every_variant
def test_full_attention_lets_every_output_depend_on_every_token(tiny_model, values):
    gradient = gradient_of_output(tiny_model(is_causal=False, **values), some_ids(), position=5)
    assert (gradient > 0).all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_document_mask_stops_attention_at_document_bounds(tiny_model, is_causal):
    idx, documents = some_ids(length=10), torch.tensor([[0] * 4 + [1] * 6] * 2)
    gradient = gradient_of_output(tiny_model(is_causal=is_causal), idx, position=6, documents=documents)
    assert (gradient[:, :4] == 0).all()
    assert (gradient[:, 4:7] > 0).all()
    assert ((gradient[:, 7:] == 0) == is_causal).all()


@every_variant
def test_a_masked_document_reads_as_it_does_alone(tiny_model, values):
    model, first, second = tiny_model(**values), some_ids(length=5), some_ids(length=7, seed=2)
    documents = torch.tensor([[0] * 5 + [1] * 7] * 2)
    together = model(torch.cat([first, second], dim=1), documents=documents)[0]
    alone = torch.cat([model(first)[0], model(second)[0]], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def with_flex_attention(model):
    """The model as it is where FlexAttention can be used."""
    model.use_flex_attention = True
    return model


@every_variant
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_gives_the_logits_and_loss_of_the_mask(tiny_model, values, is_causal):
    """Its eager form, which is what runs without a GPU; torch has no gradients for it there."""
    made = tiny_model(is_causal=is_causal, n_head=2, **{**values, "n_kv_head": bool(values.get("n_kv_head"))})
    idx, documents = some_ids(length=12), torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1, 2, 2]])
    with torch.inference_mode():
        masked = made(idx, idx, documents=documents)
        with_flex_attention(made)
        assert not isinstance(made._document_mask(documents), torch.Tensor)
        flexible = made(idx, idx, documents=documents)
    for one, other in zip(masked, flexible, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_dropout_keeps_the_mask_that_can_do_it(tiny_model):
    made = with_flex_attention(tiny_model(n_head=2, dropout=0.1)).train()
    assert isinstance(made._document_mask(torch.zeros(2, 12)), torch.Tensor)
    assert not isinstance(made.eval()._document_mask(torch.zeros(2, 12)), torch.Tensor)


@pytest.fixture
def compiled_model():
    """Compiles a model in one graph, or fails; returns it and the count of graphs."""
    def make(model):
        torch._dynamo.reset()
        graphs = CountedGraphs()
        return torch.compile(model, backend=graphs, fullgraph=True, dynamic=False), graphs
    yield make
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["plain", "documents", "flex", "heads as on a GPU"])
@pytest.mark.parametrize("values", [{}, VARIANTS["all"]], ids=["default", "all"])
def test_the_compiled_model_is_one_graph_and_gives_the_same_loss(tiny_model, compiled_model, values, way):
    model = tiny_model(**{**values, "n_head": 2, "n_kv_head": bool(values)})
    idx = some_ids(length=16)
    documents = documents_of(idx, int(idx[0, 5]), -1) if way in ("documents", "flex") else None
    expected = model(idx, idx, documents=documents)[1]
    for block in model.transformer["h"]:
        block.attn.is_on_gpu = block.attn.has_flash = way == "heads as on a GPU"
    compiled, graphs = compiled_model(with_flex_attention(model) if way == "flex" else model)
    with torch.no_grad():  # torch has no gradients for flex_attention on a CPU
        for _ in range(3):
            torch.testing.assert_close(compiled(idx, idx, documents=documents)[1], expected)
    assert graphs.n == 1


def test_generation_from_a_model_that_is_compiled_for_training_makes_no_graph(tiny_model, compiled_model):
    model = tiny_model()
    compiled, graphs = compiled_model(model)
    with torch.no_grad():
        compiled(some_ids(), some_ids())
    expected = model(some_ids(1, 4))[0][0, -1].argmax()
    steps = list(generate(model, some_ids(1, 4), 8, temperature=0))
    assert steps[0] == expected and len(steps) == 8 and graphs.n == 1
    assert all(p is q for p, q in zip(compiled.parameters(), model.parameters(), strict=True))


@every_variant
@pytest.mark.parametrize("way", ["plain", "documents", "full attention", "cache", "static cache"])
def test_no_tensor_is_made_on_another_device_than_the_models(tiny_model, values, way):
    """On the meta device, mixing in a tensor of the CPU raises an error."""
    model = tiny_model(**values, is_causal=way != "full attention").to("meta")
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"meta"}
    idx = torch.zeros(2, 12, dtype=torch.long, device="meta")
    if "cache" in way:
        kind = StaticKVCache if way == "static cache" else KVCache
        cache = kind(model.config, 2, 16, "meta")
        for piece in idx[:, :9].split([5, 1, 3], dim=1):
            assert model(piece, cache=cache)[0].device.type == "meta"
        return
    documents = documents_of(idx, 2, 3) if way == "documents" else None
    logits, loss = model(idx, idx, documents=documents)
    loss.backward()
    assert logits.device.type == loss.device.type == "meta"
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["fused", "formulas", "as on a GPU"])
def test_types_under_autocast(tiny_model, values, dtype, way, monkeypatch):
    """Matrix products and attention in half precision; loss and gradients in float32, and the residual
    stream too, except on a GPU in bfloat16 (float16 has no room for large sums)."""
    if way != "fused":
        monkeypatch.setattr(fused, "can_fuse", lambda x, *dtypes: False)
    model, idx, seen = tiny_model(**values), some_ids(), {}
    model.is_on_gpu = way == "as on a GPU"
    stream = torch.bfloat16 if model.is_on_gpu and dtype is torch.bfloat16 else torch.float32
    expected = model(idx, idx)[1]

    def note(name):
        return lambda module, args, out: seen.update({name: out.dtype})
    block = model.transformer["h"][1]
    for name, module in (("attention", block.attn.c_attn), ("mlp", block.mlp.c_fc), ("block", block)):
        module.register_forward_hook(note(name))
    attention = F.scaled_dot_product_attention

    def noted(q, k, v, **options):
        seen.update(q=q.dtype, k=k.dtype, v=v.dtype)
        return attention(q, k, v, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    with torch.autocast("cpu", dtype):
        logits, loss = model(idx, idx)
    loss.backward()
    assert seen == dict(attention=dtype, mlp=dtype, q=dtype, k=dtype, v=dtype, block=stream)
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
               if p.grad is not None)


@every_variant
def test_half_precision_weights_keep_the_rope_tables_in_float32(tiny_model, values):
    """A model in bfloat16 gives the logits of one in float32 within rounding, cached and not."""
    model, idx = tiny_model(**values), some_ids(length=16)
    expected = model(idx)[0].detach()
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(table.dtype == torch.float32 for table in model.buffers())
    cache = new_cache(model, 2, 16)
    assert cache.k.dtype == torch.bfloat16
    pieces = [model(piece, cache=cache)[0] for piece in idx.split([5, 1, 10], dim=1)]
    tolerance = 0.05 * float(expected.abs().max())
    for logits in (model(idx)[0], torch.cat(pieces, dim=1)):
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0.1)


def test_documents_begin_at_bos_and_after_eos():
    bos, eos = 2, 3
    idx = torch.tensor([[9, 9, eos, bos, 8, eos, 7, 7, bos, 6]])
    documents = documents_of(idx, bos, eos)
    starts = [i for i in range(idx.size(1)) if i == 0 or documents[0, i] != documents[0, i - 1]]
    assert starts == [0, 3, 6, 8]
    assert positions_in(documents).tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 0, 1]]


@every_variant
def test_cached_decode_equals_uncached(tiny_model, values):
    """A prompt, then pieces of several tokens and of one, against one pass over everything."""
    model, idx = tiny_model(**values), some_ids(length=16)
    expected, _ = model(idx)
    for kind in (KVCache, StaticKVCache):
        cache = kind(model.config, 2, 20)
        pieces = [model(piece, cache=cache)[0] for piece in idx.split([5, 1, 4, 1, 1, 3, 1], dim=1)]
        assert cache.n_tokens == 16
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-4)


@every_variant
def test_a_padded_batch_gives_the_logits_of_each_prompt_alone(tiny_model, values):
    model, idx, pads = tiny_model(**values), some_ids(3, length=16), (6, 0, 4)
    cache = StaticKVCache(model.config, 3, 20, padding=torch.tensor(pads))
    pieces = [model(piece, cache=cache)[0] for piece in idx.split([7, 1, 1, 3, 4], dim=1)]
    together = torch.cat(pieces, dim=1)
    for row, pad in enumerate(pads):
        alone = model(idx[row : row + 1, pad:])[0]
        torch.testing.assert_close(together[row : row + 1, pad:], alone, atol=1e-5, rtol=1e-4)


def test_last_only_returns_the_last_logits(tiny_model):
    model, idx = tiny_model(), some_ids()
    torch.testing.assert_close(model(idx, last_only=True)[0], model(idx)[0][:, -1:])


def test_cache_refuses_full_attention():
    with pytest.raises(InputError, match="is_causal"):
        KVCache(ModelConfig(is_causal=False), 1, 8)


def test_tokens_beyond_the_context_are_refused(tiny_model):
    model = tiny_model()
    with pytest.raises(InputError, match="33 tokens .* block_size 32"):
        model(some_ids(length=33))
    cache = KVCache(model.config, 2, 32)
    model(some_ids(length=30), cache=cache)
    with pytest.raises(InputError, match="block_size 32"):
        model(some_ids(length=3), cache=cache)


def test_rope_depends_on_relative_positions_only():
    cos, sin = rope_table(64, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double()

    def score(i, j):
        return (apply_rope(q, cos[i], sin[i]) * apply_rope(k, cos[j], sin[j])).sum().item()

    assert score(7, 3) == pytest.approx(score(60, 56), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_rope_rotates_adjacent_pairs_by_the_papers_angles():
    x = torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    even, odd = x[..., 0::2], x[..., 1::2]
    expected = torch.empty_like(x)
    expected[..., 0::2] = even * angle.cos() - odd * angle.sin()
    expected[..., 1::2] = even * angle.sin() + odd * angle.cos()
    torch.testing.assert_close(apply_rope(x, *rope_table(5, 8, 10000.0)), expected)


@every_variant
@pytest.mark.parametrize("way", ["plain", "documents", "dropout", "bfloat16"])
def test_what_is_fused_on_a_cpu_gives_the_logits_and_gradients_of_the_papers_formulas(
        tiny_model, values, way, monkeypatch):
    model, idx, targets = tiny_model(**values, dropout=0.2), some_ids(), some_ids(seed=2)
    model.train(way == "dropout")  # attention then takes another kernel, with other strides
    documents = documents_of(idx, bos_id=int(idx[0, 5]), eos_id=-1) if way == "documents" else None
    results = []
    for can_fuse in (fused.can_fuse, lambda x, *dtypes: False):
        monkeypatch.setattr(fused, "can_fuse", can_fuse)
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
            logits, loss = model(idx, targets, documents=documents)
        loss.backward()
        results.append([logits.detach().float(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=5e-3 if way == "bfloat16" else 1e-6)


@pytest.mark.parametrize("way", ["plain", "documents", "cache"])
@pytest.mark.parametrize("has_flash", [True, False])
def test_where_a_gpu_cannot_share_heads_they_are_repeated(tiny_model, monkeypatch, way, has_flash):
    """What a GPU runs, on a CPU: in float32 no kernel can, whether or not there is flash attention."""
    model, idx, grouped = tiny_model(n_kv_head=2), some_ids(), []
    attention = F.scaled_dot_product_attention

    def noted(q, k, v, **options):
        grouped.append(options["enable_gqa"])
        return attention(q, k, v, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    documents = documents_of(idx, int(idx[0, 5]), -1) if way == "documents" else None

    def logits():
        cache = KVCache(model.config, 2, 12) if way == "cache" else None
        return model(idx, documents=documents, cache=cache)[0]
    expected = logits()
    for block in model.transformer["h"]:
        block.attn.is_on_gpu = True
        block.attn.has_flash = has_flash
    torch.testing.assert_close(logits(), expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        logits()
    shared = has_flash and way == "plain"  # the cache is of float32
    assert grouped == 2 * [True] + 2 * [False] + 2 * [shared]


def test_on_mps_attention_gets_contiguous_tensors(tiny_model, monkeypatch):
    model = tiny_model(n_kv_head=2)
    idx = some_ids()
    expected = model(idx)[0]
    layouts = []
    attention = F.scaled_dot_product_attention

    def noted(*tensors, **options):
        layouts.append([t.is_contiguous() for t in tensors])
        return attention(*tensors, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for block in model.transformer["h"]:
        block.attn.is_on_mps = True
    assert torch.equal(model(idx)[0], expected)
    assert layouts == 2 * [[True, True, True]]


def test_grouped_heads_equal_repeated_heads(tiny_model):
    """GQA with 2 key/value heads = MHA whose 4 key/value heads are those, each twice."""
    grouped, full = tiny_model(n_kv_head=2), tiny_model()
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("c_attn.weight")]:
        q, k, v = state[name].view(8, 8, 32).split([4, 2, 2])
        state[name] = torch.cat([q, *(t.repeat_interleave(2, dim=0) for t in (k, v))]).view(96, 32)
    full.load_state_dict(state)
    idx = some_ids()
    torch.testing.assert_close(full(idx)[0], grouped(idx)[0], atol=1e-5, rtol=1e-4)


def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys(tiny_model):
    model, idx = tiny_model(qk_norm=True, norm_eps=1e-12), some_ids()
    before = model(idx)[0]
    with torch.no_grad():
        for block in model.transformer["h"]:
            block.attn.c_attn.weight[:64] *= 7  # 4 query heads and 4 key heads of 8
    torch.testing.assert_close(model(idx)[0], before, atol=1e-5, rtol=1e-4)


def test_loss_is_the_sum_over_masked_in_tokens_divided_by_their_number(tiny_model):
    model, idx, targets = tiny_model(), some_ids(), some_ids(seed=2)
    targets[0, 3:] = IGNORE_INDEX  # rows of unlike weight: 3 tokens and 12
    logits, loss = model(idx, targets)
    each = [-logits[b, t].log_softmax(0)[targets[b, t]] for b in range(2) for t in range(12)
            if targets[b, t] != IGNORE_INDEX]
    assert len(each) == 15
    torch.testing.assert_close(loss, torch.stack(each).sum() / 15)


def test_a_token_that_is_masked_out_changes_nothing(tiny_model):
    """The loss is that of the other tokens; taking the mask away changes it."""
    model, idx, targets = tiny_model(), some_ids(), some_ids(seed=2)
    hidden = targets.clone()
    hidden[:, :6] = IGNORE_INDEX
    full, masked = model(idx, targets)[1], model(idx, hidden)[1]
    assert abs(full - masked) > 1e-4
    logits = model(idx)[0][:, 6:]
    torch.testing.assert_close(masked, F.cross_entropy(logits.flatten(0, 1), targets[:, 6:].flatten()))


@every_variant
def test_a_batch_without_a_masked_in_token_has_loss_zero_and_finite_gradients(tiny_model, values):
    model, idx = tiny_model(**values), some_ids()
    loss = model(idx, torch.full_like(idx, IGNORE_INDEX))[1]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=32, vocab_size=500, n_layer=8, n_head=4, n_embd=128, bias=True,
                            use_rope=False))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05), name
        elif p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
    targets = some_ids(4, 32, 500)
    assert model(targets, targets.roll(1, 1))[1].item() == pytest.approx(math.log(500), rel=0.05)


def test_the_tied_embedding_is_one_tensor_and_counts_once(tiny_model):
    model = tiny_model()
    assert model.lm_head.weight is model.transformer["wte"].weight
    per_block = 32 * 96 + 32 * 32 + 2 * 32 * 128 + 2 * 32
    assert model.n_params() == 50 * 32 + 2 * per_block + 32
    copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    assert copy.lm_head.weight is copy.transformer["wte"].weight


def test_learned_positions_and_biases_and_swiglu_have_the_expected_numbers_of_parameters(tiny_model):
    n = tiny_model().n_params()
    assert tiny_model(use_rope=False).n_params() == n + 32 * 32
    assert tiny_model(bias=True).n_params() == n + 2 * (96 + 32 + 128 + 32)
    assert tiny_model(n_kv_head=1).n_params() == n - 2 * 32 * 48
    swiglu, gelu = tiny_model(n_embd=96, activation="swiglu"), tiny_model(n_embd=96)
    assert swiglu.n_params() == gelu.n_params()  # 8/3 of 96 is a multiple of 16


def test_flops_per_token_is_the_palm_formula(tiny_model):
    model = tiny_model()
    assert model.flops_per_token() == 6 * model.n_params() + 12 * 2 * 32 * 32
    assert model.flops_per_token(10) == 6 * model.n_params() + 12 * 2 * 32 * 10
    learned = tiny_model(use_rope=False)  # looking a position up costs nothing
    assert learned.flops_per_token() == model.flops_per_token()
    assert tiny_model(n_prev=3).flops_per_token() == model.flops_per_token()


def test_parameter_names_are_gpt2s(tiny_model):
    block = [f"{part}.weight" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc",
                                           "mlp.c_proj")]
    expected = {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight",
                *(f"transformer.h.{n}.{name}" for n in range(2) for name in block)}
    assert set(tiny_model().state_dict()) == expected
    assert set(tiny_model(use_rope=False).state_dict()) == expected | {"transformer.wpe.weight"}
    biases = {f"transformer.h.{n}.{part}.bias" for n in range(2)
              for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert set(tiny_model(bias=True).state_dict()) == expected | biases


def test_activations_are_the_ones_they_are_named_after(tiny_model):
    x = torch.linspace(-3, 3, 50)
    gelu = tiny_model().transformer["h"][0].mlp.activation(x)
    torch.testing.assert_close(gelu, 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))  # exact, not tanh
    relu2 = tiny_model(activation="relu2").transformer["h"][0].mlp.activation(x)
    torch.testing.assert_close(relu2, x.clamp(min=0) ** 2)


@pytest.mark.parametrize("values", [{}, dict(n_kv_head=2), dict(is_causal=False)], ids=str)
def test_attention_kernels_agree(tiny_model, values):
    model, idx = tiny_model(**values), some_ids(length=32)
    try:
        outputs = []
        for kernel in ("math", "mem_efficient", "flash"):
            set_sdp_kernel(kernel)
            assert torch.backends.cuda.flash_sdp_enabled() == (kernel == "flash")
            assert torch.backends.cuda.mem_efficient_sdp_enabled() == (kernel != "math")
            outputs.append(model(idx)[0])
    finally:
        set_sdp_kernel("flash")
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_training_only(tiny_model):
    model, idx = tiny_model(dropout=0.3), some_ids()
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(model(idx)[0], tiny_model()(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    torch.manual_seed(3)
    first = model(idx)[0]
    torch.manual_seed(3)
    assert torch.equal(model(idx)[0], first)


def test_dropout_acts_on_embedding_attention_and_both_projections(tiny_model):
    """Each place alone makes two passes in training mode differ."""
    for place in ("drop", "attention", "resid_dropout", "mlp"):
        model = tiny_model(dropout=0.3).train()
        for block in model.transformer["h"]:
            if place != "attention":
                block.attn.dropout = 0.0
            if place != "resid_dropout":
                block.attn.resid_dropout.p = 0.0
            if place != "mlp":
                block.mlp.dropout.p = 0.0
        if place != "drop":
            model.transformer["drop"].p = 0.0
        idx = some_ids()
        assert not torch.equal(model(idx)[0], model(idx)[0]), place


def test_norm_eps_is_the_rms_norms(tiny_model):
    norm = tiny_model(norm_eps=0.5).transformer["h"][0].ln_1
    x = torch.randn(3, 32)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt())


def test_a_model_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, idx = GPT(ModelConfig(**TINY, vocab_size=50)), some_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
