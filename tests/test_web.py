"""The page of exports/html.py: its engine against PyTorch in Node, and the page itself in Chromium."""

import json
import os
import shutil
import subprocess
from urllib.parse import quote

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import REPO, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint as ckpt
from config import ModelConfig
from exports.html import CHUNK, read_page, unpack_tensors, write_html
from generate import generate, logits_to_probs, penalize_repetition
from inference import fit_prompt, prompt_ids
from model import GPT
from script import InputError
from tokenizer import SPECIAL_TOKENS, Tokenizer, encode_prompt

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
CHARACTERS = Tokenizer.build("abcdefghijklmnopqrstuvwxyz ABCXYZ?<|>=_/\"'\n你是谁我😀é。")
IS_DONE = "document.body.dataset.busy === 'false' && document.querySelector('.note').textContent"
OPTIONS = {
    "plain": {},
    "learned positions": dict(use_rope=False),
    "n_prev": dict(n_prev=3),
    "qk_norm": dict(qk_norm=True),
    "grouped heads": dict(n_kv_head=2, qk_norm=True),
    "one key head": dict(n_kv_head=1),
    "relu2": dict(activation="relu2"),
    "swiglu": dict(activation="swiglu"),
    "width": dict(activation="swiglu", n_hidden=50),
    "biases": dict(bias=True, activation="relu2"),
    "biases of swiglu": dict(bias=True, activation="swiglu", n_kv_head=2),
    "layernorm": dict(final_norm="layernorm"),
    "theta and eps": dict(rope_theta=500.0, norm_eps=0.01),
    "odd width": dict(n_embd=18, n_head=3),
    "one layer": dict(n_layer=1, n_head=1),
    "all": dict(use_rope=False, n_prev=2, qk_norm=True, bias=True, n_kv_head=2, final_norm="layernorm"),
}


def random_model(tokenizer=CHARACTERS, **values):
    """A GPT whose norms and biases differ from their initial values too, so that each has an effect."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**TINY, "vocab_size": tokenizer.vocab_size, **values})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)
    return model


def node(page, **request):
    result = subprocess.run([NODE, REPO / "tests" / "web_engine.js", page], input=json.dumps(request),
                            capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def tiny_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("web") / "tiny.html"
    write_html(random_model(), CHARACTERS, path, weights="float32")
    return path


def expected_ids(model, ids, n, penalty_start=0, stop_ids=(), penalty=1.0):
    steps = generate(model, torch.tensor([ids]), n, temperature=0, repetition_penalty=penalty,
                     stop_ids=stop_ids, penalty_start=penalty_start)
    return [int(token) for token in steps]


@needs_node
@pytest.mark.parametrize("option", OPTIONS)
def test_the_engine_computes_the_logits_of_pytorch(tmp_path, option):
    model = random_model(**OPTIONS[option])
    ids = [(7 * i + i * i) % CHARACTERS.vocab_size for i in range(model.config.block_size)]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0][0].numpy()
    for weights, loops, tolerance in [("float32", False, 1e-4), ("float32", True, 1e-4),
                                      ("float16", False, 1e-2)]:
        difference = write_html(model, CHARACTERS, tmp_path / "page.html", weights=weights)
        logits = np.array(node(tmp_path / "page.html", action="logits", ids=ids, loops=loops))
        tolerance *= max(1, np.abs(expected).max())
        assert np.abs(logits - expected).max() < tolerance
        assert difference < tolerance


@needs_node
@pytest.mark.parametrize("option", ["n_prev", "grouped heads", "all"])
def test_the_engine_computes_with_int8_what_pytorch_does_with_the_same_rounded_weights(tmp_path, option):
    model = random_model(**OPTIONS[option])
    reported = write_html(model, CHARACTERS, tmp_path / "page.html")
    description, data = read_page(tmp_path / "page.html")
    rounded = unpack_tensors(description["tensors"], data)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2 and name != "lm_head.weight":
            step = tensor.abs().amax(1, keepdim=True) / 127
            assert ((rounded[name] - tensor).abs() <= step * 0.501).all()
    with torch.no_grad():
        idx = torch.arange(32)[None] * 7 % CHARACTERS.vocab_size
        exact = model(idx)[0]
        model.load_state_dict({**rounded, "lm_head.weight": rounded["transformer.wte.weight"]})
        expected = model(idx)[0]
    for loops in (False, True):
        logits = np.array(node(tmp_path / "page.html", action="logits", ids=idx[0].tolist(), loops=loops))
        assert np.abs(logits - expected[0].numpy()).max() < 1e-4 * max(1, float(expected.abs().max()))
    assert reported == pytest.approx(float((exact - expected).abs().max()), rel=1e-3)


@needs_node
@pytest.mark.parametrize("option", ["plain", "n_prev", "learned positions"])
def test_generation_equals_ours_even_after_the_context_is_full(tmp_path, option):
    model = random_model(**OPTIONS[option])
    write_html(model, CHARACTERS, tmp_path / "page.html", weights="float32")
    ids = list(range(6, 16))
    for penalty_start, penalty in ((0, 1.0), (0, 1.5), (8, 1.5)):
        got = node(tmp_path / "page.html", action="generate", ids=ids, length=90, penaltyStart=penalty_start,
                   stopId=-1, temperature=0, topK=5, topP=1, penalty=penalty)
        assert got == expected_ids(model, ids, 80, penalty_start, penalty=penalty)


@needs_node
def test_a_cache_that_is_kept_between_answers_changes_none_of_them(tmp_path):
    model = random_model(n_prev=2)
    write_html(model, CHARACTERS, tmp_path / "page.html", weights="float32")
    prompts = [[6, 7, 8], [6, 7, 8, 9, 10], [6, 7], [6, 7], [11, 7, 8], list(range(6, 30))]
    got = node(tmp_path / "page.html", action="turns", prompts=prompts, length=40, penaltyStart=0, stopId=-1,
               temperature=0, topK=0, topP=1, penalty=1)
    assert got == [expected_ids(model, ids, 40 - len(ids)) for ids in prompts]


@needs_node
def test_generation_ends_with_the_stop_token(tiny_page):
    model = random_model()
    free = expected_ids(model, [6, 7, 8], 20)
    stop = next(token for token in free if token != free[0])
    got = node(tiny_page, action="generate", ids=[6, 7, 8], length=23, penaltyStart=0, stopId=stop,
               temperature=0, topK=0, topP=1, penalty=1)
    assert got == free[:free.index(stop) + 1]


@needs_node
def test_probabilities_and_penalty_equal_those_of_generate(tiny_page):
    logits = (torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) * 3).tolist()
    cases = [dict(logits=row, settings=s) for row in logits
             for s in ([1, 0, 1], [0.5, 5, 1], [2.0, 0, 0.8], [1.3, 12, 0.5], [1e-9, 5, 1], [1, 1000, 0.01])]
    got = np.array(node(tiny_page, action="probs", cases=cases))
    expected = [logits_to_probs(torch.tensor([c["logits"]]).double(), *c["settings"])[0] for c in cases]
    np.testing.assert_allclose(got, torch.stack(expected), atol=1e-6)

    seen = [0, 3, 3, 7, 39]
    for penalty in (1.0, 1.5, 0.5):
        got = node(tiny_page, action="penalize", logits=logits[0], seen=seen, penalty=penalty)
        expected = penalize_repetition(torch.tensor([logits[0]]), torch.tensor([seen]), penalty)[0]
        np.testing.assert_allclose(got, expected, atol=1e-5)


@needs_node
def test_a_draw_follows_its_probabilities(tiny_page):
    randoms = [(i + 0.5) / 1000 for i in range(1000)]
    draws = node(tiny_page, action="draws", probs=[0.1, 0, 0.6, 0.3], randoms=randoms)
    assert np.bincount(draws).tolist() == [100, 0, 600, 300]
    assert node(tiny_page, action="draws", probs=[0.4, 0.5999, 0], randoms=[0.99999]) == [1]


@needs_node
def test_prompts_that_are_too_long_are_cut_as_inference_does(tiny_page):
    cases = [dict(ids=list(range(n)), length=length, block=32, keep=keep)
             for n in (1, 20, 24, 25, 100) for length in (2, 10, 32, 100) for keep in (0, 1)]
    got = node(tiny_page, action="fit", cases=cases)
    for case, ids in zip(cases, got, strict=True):
        room = max(1, min(case["length"] - 1, 24))
        assert ids == fit_prompt(case["ids"], room, case["keep"])


@needs_node
def test_candidates_are_the_ten_likeliest_with_their_probabilities(tiny_page):
    model = random_model()
    common = dict(action="candidates", ids=[6, 7, 8], length=4, penaltyStart=0, stopId=-1, topP=1, penalty=1)
    with torch.no_grad():
        probs = model(torch.tensor([[6, 7, 8]]))[0][0, -1].softmax(-1)
    top = probs.topk(10)
    (greedy,) = node(tiny_page, temperature=0, topK=0, **common)
    assert [c[0] for c in greedy] == top.indices.tolist()
    np.testing.assert_allclose([c[1] for c in greedy], top.values, atol=1e-5)
    assert [c[2] for c in greedy] == [1] + [0] * 9
    (drawn,) = node(tiny_page, temperature=1, topK=3, **common)
    np.testing.assert_allclose([c[2] for c in drawn[:3]], top.values[:3] / top.values[:3].sum(), atol=1e-5)
    assert [c[2] for c in drawn[3:]] == [0] * 7


WORDS = Tokenizer([*SPECIAL_TOKENS, "<|BD4SUR|>", *sorted(set("helo wrdabc你好，😀<|>bsBD4SUR")), "hello",
                   "hell", "world", "你好", "😀😀", "ab", "abc", "BD4SUR", "<|", " w"], [*SPECIAL_TOKENS])
TEXTS = ["", "hello world", "helloworl", "abcab", "😀😀😀", "你好，你好", "<|eos|>", "<|BD4SUR|>",
         "🫨x\ud800y", "a<|InstructMark|>b", "é", "\udfff", "\x00", "hellhello"]


@needs_node
@pytest.mark.parametrize("tokenizer", [CHARACTERS, WORDS], ids=["characters", "words"])
def test_text_is_encoded_as_by_the_tokenizer(tmp_path, tokenizer):
    write_html(random_model(tokenizer), tokenizer, tmp_path / "page.html")

    @given(st.lists(st.text(st.sampled_from("helo wrdabc你好😀<|>eosBD4SURé🫨\ud800\udfff\n"), max_size=40),
                    min_size=50, max_size=50))
    @settings(max_examples=3)
    def check(texts):
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
                 for text in TEXTS + texts]  # as in a browser, two halves side by side are one character
        got = node(tmp_path / "page.html", action="encode", texts=texts)
        assert got == [tokenizer.encode(text).tolist() for text in texts]
    check()
    turns = [("你好", "hello <|eos|>"), ("", "")]
    assert node(tmp_path / "page.html", action="prompt", turns=turns, question="<|ResponseMark|>ab") == \
        encode_prompt(tokenizer, turns, "<|ResponseMark|>ab").tolist()


@needs_node
def test_models_of_the_reference_project_run_on_the_page(tmp_path):
    for name in ("reference_llama.pt", "reference_llama_learned.pt", "reference_rope.pt"):
        path = REPO / "tests" / "fixtures" / name
        model, tokenizer = ckpt.build_model(ckpt.load(path), path)
        write_html(model, tokenizer, tmp_path / "page.html", weights="float32")
        ids = [i * 5 % tokenizer.vocab_size for i in range(model.config.block_size // 2)]
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0][0].numpy()
        logits = np.array(node(tmp_path / "page.html", action="logits", ids=ids))
        assert np.abs(logits - expected).max() < 1e-3


def test_a_model_with_full_attention_is_refused(tmp_path):
    with pytest.raises(InputError, match="full attention"):
        write_html(random_model(is_causal=False), CHARACTERS, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_weights_beyond_float16_are_refused_and_nothing_is_left(tmp_path):
    model = random_model()
    with torch.no_grad():
        model.transformer["wte"].weight[3, 3] = 1e6
    with pytest.raises(InputError, match="wte.weight.*int8"):
        write_html(model, CHARACTERS, tmp_path / "page.html", weights="float16")
    with pytest.raises(InputError, match="cannot be written"):
        write_html(model, CHARACTERS, tmp_path / "missing" / "page.html")
    assert not list(tmp_path.iterdir())


def test_weights_in_several_pieces_are_put_together(tmp_path):
    model = random_model(n_embd=512, n_layer=3, n_hidden=1500)
    assert write_html(model, CHARACTERS, tmp_path / "page.html", weights="float32") == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count('class="weights"') == -(-read_page(tmp_path / "page.html")[0]["bytes"] // CHUNK) > 1


def test_a_vocabulary_cannot_end_a_script_of_the_page(tmp_path):
    itos = [*SPECIAL_TOKENS, "</script><script>alert(1)</script>", "<!--", "a"]
    tokenizer = Tokenizer(itos, SPECIAL_TOKENS)
    write_html(random_model(tokenizer), tokenizer, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "alert(1)" in text
    assert "</script><script>alert" not in text
    assert "<!--" not in text.split("<script", 1)[1].split("</script>", 1)[0]
    assert read_page(tmp_path / "page.html")[0]["tokenizer"]["itos"] == tokenizer.itos


# ---- the page in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    browser = Browser("--lang=en-US")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def chat_model():
    return random_model(block_size=64, n_prev=1)


@pytest.fixture(scope="module")
def page(tmp_path_factory, chat_model):
    path = tmp_path_factory.mktemp("web") / "chat.html"
    write_html(chat_model, CHARACTERS, path, weights="float32", steps=7)
    return f"file://{path}"


@pytest.fixture
def visit(browser, page):
    """Opens the page at a link; afterwards it must have logged nothing and asked for nothing."""
    def open_page(link="", done=True, address=page):
        browser.open(f"{address}#{link}")
        browser.wait("document.body.dataset.ready === 'true'")
        if done:
            browser.wait(IS_DONE)
        return browser
    yield open_page
    assert browser.errors == []
    foreign = [url for url in browser.requests if not url.startswith(("file://", "blob:", "about:"))]
    assert foreign == []


def answer_of(model, question, turns=(), length=64, penalty=1.0):
    ids = prompt_ids(CHARACTERS, list(turns), question, instruct=True)
    ids = fit_prompt(ids, min(length - 1, 48), keep_first=1)
    turn = len(prompt_ids(CHARACTERS, [], question, instruct=True))
    start = max(0, len(ids) - turn)
    tokens = expected_ids(model, ids, length - len(ids), start, [CHARACTERS.eos_id], penalty)
    return "".join(CHARACTERS.decode([token]) for token in tokens if token != CHARACTERS.eos_id)


@needs_browser
@pytest.mark.parametrize("question", [
    "abc你是谁?", "<img src=x onerror=alert(1)>", "é 🫨&t=9", "a+b <|eos|>", " "])
def test_a_link_asks_its_question_and_the_page_answers_as_inference_does(visit, chat_model, question):
    browser = visit(f"q={quote(question, safe='+')}&t=0&r=1")
    shown = browser.run("[...document.querySelectorAll('.asked, .answer')].map(e => e.textContent)")
    assert shown == [question, answer_of(chat_model, question)]
    assert browser.run("document.querySelectorAll('img').length") == 0


@needs_browser
def test_a_second_question_continues_the_conversation_and_is_penalized_alone(visit, chat_model):
    browser = visit("q=abc&t=0&r=1.3&l=40")
    browser.run("document.getElementById('input').value = ' xyz '; fitInput()")
    browser.run("document.getElementById('send').click()")
    browser.wait("entries.chat.length === 2 && entries.chat[1].done")
    shown = browser.run("[...document.querySelectorAll('.answer')].map(e => e.textContent)")
    first = answer_of(chat_model, "abc", length=40, penalty=1.3)
    assert shown == [first, answer_of(chat_model, "xyz", [("abc", first)], length=40, penalty=1.3)]
    browser.run("document.getElementById('new').click()")
    assert browser.run("document.querySelectorAll('.entry').length") == 0


@needs_browser
def test_a_text_is_continued_as_inference_does(visit, chat_model):
    browser = visit("mode=continue&t=0&r=1&l=100&q=" + quote("abc 你"))
    ids = prompt_ids(CHARACTERS, [], "abc 你", instruct=False)
    tokens = expected_ids(chat_model, ids, 100 - len(ids), stop_ids=[CHARACTERS.eos_id])
    text = "".join(CHARACTERS.decode([token]) for token in tokens if token != CHARACTERS.eos_id)
    assert browser.run("document.querySelector('.answer').textContent") == text


@needs_browser
def test_what_the_model_writes_is_never_html(visit, tmp_path):
    """Each token of this vocabulary is an element; the candidates show them as well."""
    itos = [*SPECIAL_TOKENS, "<img src=x onerror=document.title='bad'>", "<b>", "</script>", "&lt;"]
    tokenizer = Tokenizer(itos, SPECIAL_TOKENS)
    write_html(random_model(tokenizer), tokenizer, tmp_path / "page.html")
    browser = visit("t=1&k=0&l=30", done=False, address=f"file://{tmp_path}/page.html")
    browser.run("tokenizer.eos_id = -1; ask('a')")
    browser.wait(IS_DONE)
    tokens = browser.run("[...document.querySelectorAll('.token')].map(e => e.textContent)")
    assert len(tokens) > 5
    browser.run("document.querySelector('.token').click()")
    assert browser.run("document.querySelectorAll('img, b').length") == 0
    assert browser.run("document.title") == "Nano"


@needs_browser
def test_stop_ends_an_answer_at_once(visit):
    browser = visit("t=1&k=0&r=1&l=1000000&mode=continue", done=False)
    browser.run("tokenizer.eos_id = -1; ask('abc')")  # the model shall not stop by itself
    browser.wait("document.querySelectorAll('.token').length > 20")
    browser.run("document.getElementById('send').click()")
    browser.wait("document.body.dataset.busy === 'false'")
    assert browser.run("entries.continue[0].reason") == "stopped"
    assert "stopped" in browser.run("document.querySelector('.note').textContent")
    assert browser.run("""(async () => {
        const count = () => document.querySelectorAll('.token').length;
        const before = count();
        await new Promise(done => setTimeout(done, 300));
        return count() - before;
    })()""") == 0


@needs_browser
def test_pressing_a_token_shows_ten_candidates_by_mouse_and_keyboard(visit):
    browser = visit("q=abc&t=0.8&k=6&r=1.1&l=40")
    browser.run("document.querySelectorAll('.token')[1].click()")
    rows = "[...document.querySelectorAll('#rows tr')].map(r => [...r.cells].map(c => c.textContent))"
    assert len(browser.run(rows)) == 10
    sums = browser.run("[1, 2].map(i => inspected.token.candidates.reduce((sum, c) => sum + c[i], 0))")
    assert 0.2 < sums[0] <= 1.000001
    assert sums[1] == pytest.approx(1, abs=1e-6)  # six tokens could be drawn, all among the ten
    assert sum(row[3] != "–" for row in browser.run(rows)) == 6
    chosen = "document.querySelector('#rows .chosen th').textContent"
    assert browser.run("document.querySelectorAll('#rows .chosen').length") == 1

    browser.press("ArrowRight")
    assert browser.run("[...document.querySelectorAll('.token')].indexOf(inspected)") == 2
    assert browser.run("document.activeElement === inspected")
    assert browser.run(f"{chosen} === tokenLabel(inspected.token.id)")
    browser.press("Escape")
    assert browser.run("document.getElementById('inspector').hidden")
    assert browser.run("[...document.querySelectorAll('.token')].indexOf(document.activeElement)") == 2
    browser.press("Enter")
    assert not browser.run("document.getElementById('inspector').hidden")


@needs_browser
def test_language_theme_and_settings_can_be_changed(visit):
    browser = visit(done=False)
    assert browser.run("document.documentElement.lang") == "en"
    browser.run("document.getElementById('language').click()")
    assert browser.run("document.querySelector('button[data-mode=chat]').textContent") == "对话"
    assert browser.run("[...document.querySelectorAll('[data-text]')].every(e => e.textContent)")
    before = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.run("document.getElementById('theme').click()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") != before
    browser.run("localStorage.clear()")
    for text, expected in (("0.35", 0.35), ("-3", 0), ("", 0), ("x", 0), ("1e999", 0)):
        browser.run(f"setField(FIELDS[0], '{text}')")
        assert browser.run("settings.temperature") == expected
    assert "7" in browser.run("document.getElementById('card').textContent")


@needs_browser
def test_without_a_worker_the_page_answers_all_the_same(browser, page, chat_model):
    script = browser.call("Page.addScriptToEvaluateOnNewDocument",
                          source="window.Worker = function () { throw new Error('none'); };")["identifier"]
    browser.open(f"{page}#q=abc&t=0&r=1")
    browser.wait(IS_DONE)
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    assert browser.run("document.querySelector('.answer').textContent") == answer_of(chat_model, "abc")
    assert browser.errors == []


@needs_browser
def test_a_page_that_lost_its_end_says_so(browser, page, tmp_path):
    with open(page.removeprefix("file://"), encoding="utf-8") as f:
        text = f.read()
    (tmp_path / "cut.html").write_text(text[:text.index('class="weights"') + 500], encoding="utf-8")
    browser.open(f"file://{tmp_path}/cut.html#q=abc")
    browser.wait("document.getElementById('card').textContent.includes('cannot be loaded')")
    assert browser.errors == []


@needs_browser
def test_the_policy_forbids_scripts_and_network_even_if_text_became_html(browser, page):
    browser.open(page)
    browser.wait("document.body.dataset.ready === 'true'")
    browser.run("document.getElementById('thread').innerHTML = '<img src=x onerror=\"window.bad = 1\">'")
    assert browser.run("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
    assert browser.run("window.bad === undefined")
    assert any("Content Security Policy" in error for error in browser.errors)


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800), (320, 568)])
def test_nothing_is_wider_than_the_screen_and_inputs_do_not_zoom(visit, width, height):
    browser = visit("q=abc&t=0&r=1")
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 500)
    browser.run("document.querySelector('.token').click()")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("Math.min(...[...document.querySelectorAll('textarea, input[type=number]')].map("
                       "e => parseFloat(getComputedStyle(e).fontSize)))") >= 16
    if width < 500:
        small = browser.run("[...document.querySelectorAll('header button, #send')].map("
                            "e => e.getBoundingClientRect()).filter("
                            "r => r.width && (r.height < 40 || r.width < 40)).length")
        assert small == 0
        assert browser.run("inspected.getBoundingClientRect().bottom < "
                           "document.getElementById('inspector').getBoundingClientRect().top")
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_every_word_exists_in_both_languages():
    text = (REPO / "web" / "words.js").read_text(encoding="utf-8")
    if NODE is None:
        pytest.skip("needs Node")
    keys = subprocess.run([NODE, "-e", text + ";console.log(JSON.stringify(Object.values(WORDS).map(w => "
                                              "Object.keys(w).sort())))"], capture_output=True, text=True)
    english, chinese = json.loads(keys.stdout)
    assert english == chinese
    assert os.path.getsize(REPO / "web" / "words.js") < 20000
