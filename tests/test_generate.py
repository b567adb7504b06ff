"""From logits to tokens: sampling, stopping, the full context, many prompts at once."""

import pytest
import torch

from config import check_sampling
from cpu.int8 import quantize
from generate import (
    decode_one_token,
    generate,
    logits_to_probs,
    penalize_repetition,
    prefill,
    sample,
)
from model import KVCache
from scoring.answers import complete
from script import InputError

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
PROMPT = torch.tensor([[4, 8, 15, 16, 23]])


def tokens(model, prompt=PROMPT, n=20, seed=0, **sampling):
    generator = torch.Generator().manual_seed(seed)
    return [int(t) for t in generate(model, prompt, n, generator=generator, **sampling)]


@pytest.mark.parametrize("token", [0, 1, 2, 4, 5])
def test_repetition_penalty_lowers_a_seen_token_whether_its_logit_is_positive_or_negative(token):
    """Were a negative logit divided as a positive one is, the penalty would be a reward."""
    seen = torch.tensor([[token, token]])
    before = LOGITS.softmax(-1)[0, token]
    after = penalize_repetition(LOGITS, seen, 1.3).softmax(-1)[0, token]
    assert after < before
    rest = [i for i in range(6) if i != token]
    assert torch.equal(penalize_repetition(LOGITS, seen, 1.3)[:, rest], LOGITS[:, rest])


def test_repetition_penalty_of_one_is_off_and_below_one_rewards():
    seen = torch.tensor([[0, 4]])
    assert torch.equal(penalize_repetition(LOGITS, seen, 1.0), LOGITS)
    assert (penalize_repetition(LOGITS, seen, 0.5)[0, [0, 4]] > LOGITS[0, [0, 4]]).all()


def test_repetition_penalty_makes_a_real_model_repeat_less(tiny_model):
    model = tiny_model()
    plain, penalised = (tokens(model, n=25, temperature=0, repetition_penalty=p) for p in (1.0, 50.0))
    assert len(set(penalised)) > len(set(plain))


def penalized(monkeypatch, model, prompt, n, **sampling):
    """The tokens that the repetition penalty covers at each step, and all tokens."""
    covered = []

    def noted(logits, seen, penalty):
        covered.append(seen[0].tolist())
        return penalize_repetition(logits, seen, penalty)
    monkeypatch.setattr("generate.penalize_repetition", noted)
    ids = prompt[0].tolist() + tokens(model, prompt, n, repetition_penalty=1.2, **sampling)
    return covered, ids


def test_the_penalty_covers_what_comes_after_its_start_and_no_earlier_turn(tiny_model, monkeypatch):
    covered, ids = penalized(monkeypatch, tiny_model(), PROMPT, 6, penalty_start=3)
    assert covered == [ids[3 : 5 + n] for n in range(6)]


@pytest.mark.parametrize("window", [0, 1, 4, 100])
def test_repeat_last_n_is_a_window_over_the_last_tokens(tiny_model, monkeypatch, window):
    covered, ids = penalized(monkeypatch, tiny_model(), PROMPT, 6, repeat_last_n=window)
    assert covered == [ids[max(0, 5 + n - window) : 5 + n] for n in range(6)]


def test_the_start_of_the_penalty_moves_with_the_context(tiny_model, monkeypatch):
    """At 32 tokens the last 16 of 33 are read again."""
    prompt = torch.arange(30)[None]
    covered, ids = penalized(monkeypatch, tiny_model(), prompt, 8, penalty_start=20)
    assert covered[2] == ids[20:32] and covered[3] == ids[20:33] and covered[7] == ids[20:37]
    monkeypatch.undo()
    covered, ids = penalized(monkeypatch, tiny_model(), prompt, 8, penalty_start=2)
    assert covered[2] == ids[2:32] and covered[3] == ids[17:33]


def test_temperature_zero_is_deterministic_and_takes_the_likeliest(tiny_model):
    model = tiny_model()
    runs = {tuple(tokens(model, seed=seed, temperature=0)) for seed in range(3)}
    assert len(runs) == 1
    assert runs.pop()[0] == model(PROMPT)[0][0, -1].argmax()


def test_low_temperature_sharpens_and_high_temperature_flattens():
    cold, one, hot = (logits_to_probs(LOGITS, temperature=t)[0, 0] for t in (0.5, 1.0, 2.0))
    assert cold > one > hot
    torch.testing.assert_close(logits_to_probs(LOGITS, 1.0), LOGITS.softmax(-1))


def test_top_k_leaves_exactly_the_k_likeliest():
    for k, kept in ((1, 1), (3, 3), (6, 6), (100, 6), (0, 6)):
        probs = logits_to_probs(LOGITS, top_k=k)
        assert probs.count_nonzero() == kept and (probs[0, :kept] > 0).all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(1))


def test_top_p_leaves_the_fewest_tokens_that_reach_p():
    cumulative = LOGITS.softmax(-1).cumsum(-1)[0]
    for p in (0.05, 0.5, 0.8, 0.95, 0.999):
        kept = int((cumulative < p).sum()) + 1
        probs = logits_to_probs(LOGITS, top_p=p)
        assert probs.count_nonzero() == kept and (probs[0, :kept] > 0).all(), p
        torch.testing.assert_close(probs.sum(-1), torch.ones(1))
    assert logits_to_probs(LOGITS, top_p=1.0).count_nonzero() == 6


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 1e-300, 1e300])
@pytest.mark.parametrize("logits", [LOGITS, LOGITS * 1000, LOGITS - 500, LOGITS.bfloat16().float()])
def test_the_smallest_and_largest_temperatures_give_probabilities(temperature, logits):
    probs = logits_to_probs(logits, temperature)
    torch.testing.assert_close(probs.sum(-1), torch.ones(1))
    if temperature < 1:
        assert probs[0, 0] == 1
    else:
        torch.testing.assert_close(probs, torch.full((1, 6), 1 / 6))


@pytest.mark.parametrize("temperature", [1e-5, 1e-40])
def test_a_tiny_temperature_generates_what_temperature_zero_does(tiny_model, temperature):
    model = tiny_model()
    assert tokens(model, temperature=temperature, top_k=5, repetition_penalty=1.2) == \
        tokens(model, temperature=0, repetition_penalty=1.2)


def test_samples_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    draws = sample(LOGITS.expand(20000, -1), torch.zeros(20000, 1, dtype=torch.long), temperature=1.5,
                   top_k=4, generator=generator)
    share = torch.bincount(draws, minlength=6) / 20000
    torch.testing.assert_close(share, logits_to_probs(LOGITS, 1.5, 4)[0], atol=0.015, rtol=0)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tiny_model):
    model = tiny_model()
    assert tokens(model, seed=5) == tokens(model, seed=5)
    assert tokens(model, seed=5) != tokens(model, seed=6)


def test_the_global_random_state_plays_no_part(tiny_model):
    model = tiny_model()
    torch.manual_seed(1)
    first = tokens(model, seed=5)
    torch.manual_seed(2)
    assert tokens(model, seed=5) == first


@pytest.mark.parametrize("n_prev", [0, 3])
def test_generation_equals_uncached_decoding(tiny_model, n_prev):
    model = tiny_model(n_kv_head=2, qk_norm=True, n_prev=n_prev)
    idx = PROMPT
    for token in tokens(model, n=27, temperature=0):
        expected = model(idx)[0][0, -1].argmax()
        assert token == expected
        idx = torch.cat([idx, expected.view(1, 1)], dim=1)
    assert idx.size(1) == 32  # to the last place of the context


def test_prefill_and_decode_give_the_logits_of_the_whole(tiny_model):
    model = tiny_model()
    cache = KVCache(model.config, 1, 6)
    torch.testing.assert_close(prefill(model, PROMPT, cache), model(PROMPT)[0][:, -1])
    idx = torch.cat([PROMPT, torch.tensor([[42]])], dim=1)
    torch.testing.assert_close(decode_one_token(model, idx[:, -1], cache), model(idx)[0][:, -1])


def test_generation_stops_with_the_stop_token(tiny_model):
    model = tiny_model()
    free = tokens(model, n=20, seed=1)
    stop = free[7]
    assert tokens(model, n=20, seed=1, stop_ids=(stop,)) == free[: free.index(stop) + 1]


def test_a_sequence_that_has_stopped_repeats_its_stop_token_until_all_have(tiny_model):
    model = tiny_model()
    prompts = torch.tensor([[1, 2, 3], [7, 8, 9], [20, 30, 40]])
    free = torch.stack(list(generate(model, prompts, 12, generator=torch.Generator().manual_seed(0))))
    stop = int(free[2, 0])
    steps = list(generate(model, prompts, 12, stop_ids=(stop,), generator=torch.Generator().manual_seed(0)))
    assert all(int(step[0]) == stop for step in steps[2:])
    assert len(steps) > 3


@pytest.mark.parametrize("n_prev", [0, 3])
def test_generation_goes_on_past_the_end_of_the_context(tiny_model, n_prev):
    """When the context is full, the later half of it is read again."""
    model = tiny_model(n_prev=n_prev)
    got = tokens(model, n=100, temperature=0)
    assert len(got) == 100
    ids = PROMPT[0].tolist() + got
    window = ids[32 - 15 : 33]  # the 33rd token drops all but the last 16, and is itself read with them
    assert ids[33] == model(torch.tensor([window]))[0][0, -1].argmax()


def test_a_context_of_one_token_still_generates(tiny_model):
    assert len(tokens(tiny_model(block_size=1), torch.tensor([[3]]), n=5)) == 5


def test_an_empty_prompt_and_one_beyond_the_context_are_refused(tiny_model):
    with pytest.raises(InputError, match="empty"):
        tokens(tiny_model(), torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match="block_size"):
        tokens(tiny_model(), torch.zeros(1, 40, dtype=torch.long))


def test_complete_equals_one_prompt_at_a_time(tiny_model):
    model = tiny_model()
    prompts = [[5, 6, 7], [9], [8, 8, 8], [1, 2, 3, 4, 5, 6], [7, 7]]
    stop = tokens(model, torch.tensor([prompts[3]]), temperature=0)[4]
    expected = []
    for prompt in prompts:
        ids = tokens(model, torch.tensor([prompt]), n=15, temperature=0, stop_ids=(stop,))
        expected.append(ids[:-1] if ids[-1] == stop else ids)
    assert complete(model, prompts, 15, stop_ids=(stop,), temperature=0) == expected
    assert len({len(ids) for ids in expected}) > 1


def in_one_padded_batch(model, monkeypatch):
    """Let `complete` treat a model on the CPU as if it were on a GPU."""
    groups = []

    def padded(model, idx, n, **options):
        groups.append((len(idx), options.get("padding")))
        return generate(model, idx, n, **options)
    monkeypatch.setattr("scoring.answers.generate", padded)
    monkeypatch.setattr("scoring.answers.goes_together", lambda device: True)
    return groups


@pytest.mark.parametrize("values", [{}, dict(n_kv_head=2, n_prev=3, qk_norm=True), dict(use_rope=False)],
                         ids=str)
def test_prompts_of_different_lengths_in_one_padded_batch_give_the_same_answers(
        tiny_model, monkeypatch, values):
    """Also where the answer of a short prompt ends later than the context of a long one."""
    model = tiny_model(**values)
    prompts = [[5, 6, 7], [9], [8] * 28, [1, 2, 3, 4, 5, 6], [7, 7]]
    sampling = dict(temperature=0, repetition_penalty=1.3)
    expected = complete(model, prompts, 100, **sampling)
    groups = in_one_padded_batch(model, monkeypatch)
    assert complete(model, prompts, 100, **sampling) == expected
    assert [len(ids) for ids in expected] == [29, 31, 4, 26, 30]
    assert len(groups) == 1 and groups[0][1].tolist() == [25, 27, 0, 22, 26]
    stop = expected[3][4]
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in expected]
    assert complete(model, prompts, 100, stop_ids=(stop,), **sampling) == cut


def test_complete_reads_its_tokens_from_the_device_once(tiny_model, monkeypatch):
    read, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(tensor.shape) or tolist(tensor))
    monkeypatch.setattr("generate.decode.usable_library", lambda model: None)  # decode.c reads each token
    assert [len(ids) for ids in complete(tiny_model(), [[5, 6], [7, 8]], 9, temperature=0)] == [9, 9]
    assert read == [(2, 9)]


def test_an_empty_prompt_among_others_is_refused(tiny_model):
    with pytest.raises(InputError, match="empty"):
        complete(tiny_model(), [[1, 2], []], 5)


def test_complete_stays_inside_the_context(tiny_model):
    answers = complete(tiny_model(), [[1] * 30, [1] * 32], 10, temperature=0)
    assert [len(ids) for ids in answers] == [2, 0]


@pytest.mark.parametrize("name, value", [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1),
    ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")), ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0), ("repetition_penalty", float("inf")), ("repeat_last_n", -2)])
def test_a_sampling_parameter_out_of_range_is_named(tiny_model, name, value):
    good = dict(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, repeat_last_n=-1)
    check_sampling(**good)
    with pytest.raises(InputError, match=f"^{name} is "):
        check_sampling(**{**good, name: value})
    with pytest.raises(InputError, match=f"^{name} is "):
        tokens(tiny_model(), **{name: value})


@pytest.mark.parametrize("length", [1, 12], ids=["a token", "a prompt"])
@pytest.mark.parametrize("values", [{}, dict(bias=True, activation="swiglu", n_kv_head=1)], ids=[0, 1])
def test_int8_weights_change_the_logits_by_their_rounding_alone(tiny_model, values, length):
    model, idx = tiny_model(**values), torch.arange(length).view(1, -1)
    exact = model(idx)[0]
    quantize(model)
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert (model(idx)[0] - exact).std() < 0.02 * exact.std()
    assert tokens(model, n=20, temperature=0)


def test_int8_weights_are_for_the_cpu(tiny_model):
    model = tiny_model().to("meta")
    with pytest.raises(InputError, match="the model is on meta"):
        quantize(model)
