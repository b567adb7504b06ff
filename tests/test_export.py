"""Exports compute what the checkpoint does: transformers and llama.cpp give the same answers."""

import contextlib
import io
import json
import os
import sys
import urllib.request
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, Workspace
from fixtures import make_fixtures
from hypothesis import given
from hypothesis import strategies as st

import checkpoint as ckpt
import export
import inference
from config import ModelConfig
from export import DTYPES
from exports import portable
from model import GPT
from scoring.answers import complete
from tokenizer import Tokenizer, encode_conversation, encode_prompt

transformers = pytest.importorskip("transformers", reason="make test-export")
gguf = pytest.importorskip("gguf", reason="make test-export")
xllamacpp = pytest.importorskip("xllamacpp", reason="make test-export")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="make test-export")

PAIRS = [("你是谁", "我是業余无线电台，呼号 é😀。"), ("who are you?", "a radio\n station <|eos|>"),
         ("Q怎么拼读", "Quebec."), ("7+3", "10"), (" a  b\n", "  two\n\n lines "), ("再见😀", "73!")]
QUESTIONS = [question for question, _ in PAIRS] + [
    "", " ", "\n", "你是谁？", "🫨", "ñQ怎么拼读", "你是誰🫨🫨", "who\tare \U0010abcd you", "a<|eos|>b",
    "<|InstructMark|>7+3<|ResponseMark|>", "<|unknown|>", "<| |>"]
ARCHITECTURES = {"qwen3": dict(activation="swiglu", qk_norm=True),
                 "llama": dict(activation="swiglu", n_kv_head=0, n_hidden=80),
                 "apertus": dict(activation="relu2", qk_norm=True, rope_theta=500.0),
                 "arcee": dict(activation="relu2", norm_eps=1e-3)}
CHAT_API = {"max_tokens": 60, "temperature": 0}


def save(path, model, tokenizer, task="sft"):
    values = {"format": ckpt.FORMAT, "model": model.state_dict(), "step": 1, "task": task, "train_config": {},
              "model_config": asdict(model.config), "tokenizer_config": tokenizer.to_dict(),
              "best_val_loss": 1.0}
    ckpt.save(str(path), {**dict.fromkeys(ckpt.KEYS), **values})


def chat_model(**values):
    """A tiny GPT that has learned PAIRS by heart, alone and after each other, in about a second."""
    tokenizer = Tokenizer.build(["".join(q + a for q, a in PAIRS)])
    torch.manual_seed(1)
    values = {"vocab_size": tokenizer.vocab_size + 3, "block_size": 128, "n_layer": 2, "n_head": 4,
              "n_embd": 48, "n_kv_head": 2, **values}
    model = GPT(ModelConfig(**values)).train()
    with torch.no_grad():  # else what is never trained on would have next to no influence
        model.transformer["wte"].weight.normal_(std=0.3)
        for block in model.transformer["h"]:
            for norm in (block.ln_1, block.ln_2):
                norm.weight.uniform_(0.5, 1.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [encode_conversation(tokenizer, [pair, PAIRS[(i * 5 + 3) % len(PAIRS)]])
            for i, pair in enumerate(PAIRS)]
    width = max(len(ids) for ids, _ in rows)
    x = torch.full((len(rows), width), tokenizer.pad_id)
    y = torch.full((len(rows), width), -1)
    for i, (ids, mask) in enumerate(rows):
        x[i, : len(ids)] = torch.from_numpy(ids.astype("i8"))
        y[i, : len(ids) - 1] = torch.where(torch.from_numpy(mask[1:]) == 1, x[i, 1 : len(ids)], -1)
    for _ in range(120):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A workspace with one trained chat model an architecture, and the models and tokenizers by name."""
    workspace = Workspace(tmp_path_factory.mktemp("chats"))
    models = {}
    for name, values in ARCHITECTURES.items():
        models[name] = chat_model(**values)
        save(workspace.path / f"{name}.pt", *models[name])
    return workspace, models


def export_to(workspace, checkpoint, target, out, *words):
    """Run export.py in this process; returns the dict that is its last line, and the lines before."""
    printed = io.StringIO()
    with workspace.here("export.py", "-m", checkpoint, "--to", target, out, *words), \
            contextlib.redirect_stdout(printed):
        export.main()
    *lines, last = printed.getvalue().splitlines()
    return json.loads(last), lines


def refusal(workspace, *words):
    """The line with which the script refuses, flags read as in a process of its own."""
    return workspace.refused(export.main, *words)


def our_answer(model, tokenizer, turns, question):
    ids = complete(model, [encode_prompt(tokenizer, turns, question)], 60, (tokenizer.eos_id,), temperature=0)
    return tokenizer.decode(ids[0])


def conversations(model, tokenizer):
    """Every question alone, and two that follow an answered one."""
    for question in QUESTIONS:
        yield [], question
    first = ("你是谁", our_answer(model, tokenizer, [], "你是谁"))
    yield [first], "7+3"
    yield [first, (" x<|eos|>\n", " \n")], "ñ 🫨"


@contextlib.contextmanager
def served(path):
    """llama.cpp's server on a file as a person starts it, with its defaults; yields post(route, body)."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.cpuparams.n_threads = 1
    params.n_parallel = 1
    params.verbosity = -1
    server = xllamacpp.Server(params)
    address = server.listening_address

    def post(route, body):
        request = urllib.request.Request(address + route, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request))
    yield post
    del server


# ---- transformers ----

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_gives_our_answers_word_for_word(chats, name):
    workspace, models = chats
    model, tokenizer = models[name]
    result, _ = export_to(workspace, f"{name}.pt", "hf", f"{name}_hf")
    folder = str(workspace.path / f"{name}_hf")
    assert result["largest_difference"] < 1e-4
    pipe = transformers.pipeline("text-generation", folder)
    assert type(pipe.model).__name__.lower() == f"{name}forcausallm"
    assert type(pipe.model).__module__.startswith("transformers.models.")  # no code of ours
    for turns, question in conversations(model, tokenizer):
        messages = portable.as_messages(turns, question)
        answer = pipe(messages, max_new_tokens=60, max_length=None, do_sample=False, return_full_text=False)
        ours = our_answer(model, tokenizer, turns, question)
        assert answer[0]["generated_text"] == ours, (turns, question)


def test_transformers_continues_a_text_as_inference_does(chats, capsys):
    workspace, _ = chats
    export_to(workspace, "qwen3.pt", "hf", "continue_hf")
    pipe = transformers.pipeline("text-generation", str(workspace.path / "continue_hf"))
    text = "我是業余无线"
    theirs = pipe(text, max_new_tokens=20, max_length=None, do_sample=False)[0]["generated_text"]
    with workspace.here("inference.py", "-m", "qwen3.pt", "-p", text, "-t", 0, "-r", 1,
                        "-l", len(text) + 20):
        inference.main()
    assert text + capsys.readouterr().out.removesuffix("\n") == theirs


@pytest.fixture(scope="module")
def reader(chats):
    """The exported tokenizer in transformers, and ours."""
    workspace, models = chats
    export_to(workspace, "llama.pt", "hf", "reader_hf")
    return transformers.AutoTokenizer.from_pretrained(str(workspace.path / "reader_hf")), models["llama"][1]


PIECES = st.sampled_from([*"你是谁 Q7+3\n\t😀é🫨ñ\U0010abcd\0<|>", "  ", "<|eos|>", "<|InstructMark|>",
                          "<|unknown|>"])
TEXTS = st.one_of(st.lists(PIECES).map("".join), st.text(st.characters(exclude_categories=["Cs"])))


@given(turns=st.lists(st.tuples(TEXTS, TEXTS), max_size=2), question=TEXTS)
def test_the_chat_template_renders_our_ids(reader, turns, question):
    theirs, ours = reader
    if any(portable.separator_of(ours) in text for text in [question, *sum(turns, ())]):
        return
    ids = theirs.apply_chat_template(portable.as_messages(turns, question), tokenize=True, return_dict=False)
    assert ids == encode_prompt(ours, turns, question).tolist()


@given(text=TEXTS)
def test_text_is_encoded_as_ours_and_comes_back_exactly(reader, text):
    theirs, ours = reader
    ids = theirs(text.replace(portable.separator_of(ours), ""))["input_ids"]
    text = text.replace(portable.separator_of(ours), "")
    assert ids == ours.encode(text, allow_special=True).tolist()
    assert theirs.decode(ids) == ours.decode(ids)


def test_a_system_message_becomes_the_first_line_of_the_question(reader):
    theirs, ours = reader
    messages = [{"role": "system", "content": "who"}, {"role": "user", "content": "are you?"},
                {"role": "assistant", "content": "a"}, {"role": "user", "content": "7+3"}]
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == encode_prompt(ours, [("who\nare you?", "a")], "7+3").tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_weights_have_the_type_that_was_asked_for(chats, dtype):
    workspace, _ = chats
    result, _ = export_to(workspace, "apertus.pt", "hf", f"{dtype}_hf", "--dtype", dtype)
    folder = workspace.path / f"{dtype}_hf"
    weights = safetensors_torch.load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    assert "lm_head.weight" not in weights  # tied
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    assert 0 < result["largest_difference"] < 1


# ---- llama.cpp ----

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_gives_our_answers_word_for_word(chats, name):
    """Through /completion with the prompt as text, and through the OpenAI-style chat API."""
    workspace, models = chats
    model, tokenizer = models[name]
    result, _ = export_to(workspace, f"{name}.pt", "gguf", f"{name}.gguf")
    assert result["largest_difference"] < 1e-4
    with served(workspace.path / f"{name}.gguf") as post:
        for turns, question in conversations(model, tokenizer):
            ours = our_answer(model, tokenizer, turns, question)
            messages = portable.as_messages(turns, question)
            chat = post("/v1/chat/completions", {"messages": messages, **CHAT_API})
            assert chat["choices"][0]["message"]["content"] == ours, (turns, question)
            if "<|" in question + "".join(map("".join, turns)):
                continue  # in a prompt given as text these are special tokens
            units = [f"<|InstructMark|>{q}<|ResponseMark|>{a}<|eos|>" for q, a in turns]
            prompt = "".join(units) + f"<|InstructMark|>{question}<|ResponseMark|>"
            plain = post("/completion", {"prompt": prompt, "n_predict": 60, "temperature": 0})
            assert plain["content"] == ours, (turns, question)


def test_an_answer_is_the_one_that_inference_prints(chats, capsys):
    workspace, _ = chats
    export_to(workspace, "apertus.pt", "gguf", "printed.gguf")
    with served(workspace.path / "printed.gguf") as post:
        for question in ("你是谁", "你是誰🫨🫨", "a<|eos|>b"):
            with workspace.here("inference.py", "-i", "-m", "apertus.pt", "-p", question, "-t", 0, "-r", 1):
                inference.main()
            reply = post("/v1/chat/completions", {"messages": portable.as_messages([], question), **CHAT_API})
            assert reply["choices"][0]["message"]["content"] + "\n" == capsys.readouterr().out


@given(turns=st.lists(st.tuples(TEXTS, TEXTS), max_size=2), question=TEXTS)
def test_llama_cpp_reads_our_ids(server_and_tokenizer, turns, question):
    post, ours, extra = server_and_tokenizer
    if any(portable.separator_of(ours) in text for text in [question, *sum(turns, ())]):
        return
    prompt = post("/apply-template", {"messages": portable.as_messages(turns, question)})["prompt"]
    ids = post("/tokenize", {"content": prompt, "parse_special": True})["tokens"]
    ids = [ours.unknown_id if i >= extra else i for i in ids]
    assert ids == encode_prompt(ours, turns, question).tolist()


@pytest.fixture(scope="module")
def server_and_tokenizer(chats):
    workspace, models = chats
    export_to(workspace, "llama.pt", "gguf", "reader.gguf")
    with served(workspace.path / "reader.gguf") as post:
        model, tokenizer = models["llama"]
        yield post, tokenizer, model.config.vocab_size


@pytest.mark.parametrize("dtype", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", ["apertus", "llama"])
def test_smaller_types_hold_the_matrices_and_answer_what_was_learned(chats, name, dtype):
    """Rows of n_embd 48, no multiple of 32, stay F16; so do those of Llama's hidden width, not Apertus's."""
    workspace, models = chats
    export_to(workspace, f"{name}.pt", "gguf", f"{name}_{dtype}.gguf", "--dtype", dtype)
    path = workspace.path / f"{name}_{dtype}.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == (dtype if name == "apertus" else "F16")
    with served(path) as post:
        for question, answer in PAIRS:
            reply = post("/v1/chat/completions", {"messages": portable.as_messages([], question), **CHAT_API})
            assert reply["choices"][0]["message"]["content"] == answer


def test_the_modelfile_lies_beside_and_names_the_file(chats):
    workspace, _ = chats
    (workspace.path / "ollama").mkdir()
    _, lines = export_to(workspace, "qwen3.pt", "gguf", "ollama/nano.gguf")
    text = (workspace.path / "ollama" / "Modelfile").read_text(encoding="utf-8")
    assert "\nFROM ./nano.gguf\n" in text and "\nPARAMETER stop <|eos|>\n" in text
    assert "<|InstructMark|>{{ $system }}{{ .Content }}<|ResponseMark|>" in text
    assert text.count("{{ if") + text.count("{{ range") == text.count("{{ end }}") == 2
    assert any("llama-server -m ollama/nano.gguf" in line for line in lines)
    assert any("ollama create nano -f Modelfile" in line for line in lines)
    assert any("vllm serve" in line for line in lines)
    assert any("http://127.0.0.1:8080/v1/chat/completions" in line for line in lines)


# ---- Both ----

@pytest.mark.parametrize("target, out", [("hf", "words_hf"), ("gguf", "words.gguf")])
def test_a_newer_reference_checkpoint_with_a_vocabulary_of_characters_is_exported(chats, target, out):
    workspace, _ = chats
    make_fixtures.save_newer(workspace.path / "newer.pt", make_fixtures.NewerModelConfig(), words=[])
    assert export_to(workspace, "newer.pt", target, out)[0]["largest_difference"] < 1e-3


@pytest.mark.parametrize("target, out", [("hf", "plain_hf"), ("gguf", "plain.gguf")])
def test_a_pretrained_model_has_no_chat_template(chats, target, out):
    workspace, models = chats
    save(workspace.path / "pretrained.pt", *models["qwen3"], task="pretrain")
    _, lines = export_to(workspace, "pretrained.pt", target, out)
    assert any("/v1/completions" in line for line in lines)
    if target == "hf":
        assert transformers.AutoTokenizer.from_pretrained(workspace.path / out).chat_template is None
    else:
        assert "tokenizer.chat_template" not in gguf.GGUFReader(workspace.path / out).fields


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_weights_in_the_wrong_place_are_found_and_not_written(chats, target, monkeypatch):
    workspace, _ = chats
    monkeypatch.setattr(portable, "halves", lambda weight, heads: weight)
    before = sorted(os.listdir(workspace.path))
    message = refusal(workspace, "-m", "qwen3.pt", "--to", target, "wrong")
    assert "wrong: not written, because" in message and "computes other logits" in message
    assert sorted(os.listdir(workspace.path)) == before


@pytest.mark.parametrize("target, dtype", [("hf", "float16"), ("gguf", "F16")])
def test_a_weight_that_the_type_cannot_hold_is_refused(chats, target, dtype):
    workspace, models = chats
    model, tokenizer = chat_model(**ARCHITECTURES["arcee"])
    with torch.no_grad():
        model.transformer["h"][0].mlp.c_fc.weight[0, 0] = 1e6
    save(workspace.path / "large.pt", model, tokenizer)
    before = sorted(os.listdir(workspace.path))
    message = refusal(workspace, "-m", "large.pt", "--to", target, "--dtype", dtype, "large")
    assert f"do not fit into {dtype}; use --dtype {DTYPES[target][0]}" in message
    assert sorted(os.listdir(workspace.path)) == before


@pytest.mark.parametrize("values, named, instead", [
    (dict(n_prev=3), "n_prev 3", "--n_prev 0"),
    (dict(use_rope=False), "use_rope false (learned positions)", "--use_rope true"),
    (dict(final_norm="layernorm"), "final_norm layernorm", "--final_norm rmsnorm"),
    (dict(bias=True), "bias true", "--bias false"),
    (dict(activation="gelu"), "activation gelu", "--activation relu2 (or swiglu)"),
    (dict(is_causal=False), "is_causal false (full attention)", "--is_causal true"),
    (dict(n_prev=2, bias=True), "n_prev 2, bias true", "--n_prev 0 --bias false")],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_an_option_without_a_counterpart_is_named_with_what_works(workspace, values, named, instead, target):
    tokenizer = Tokenizer.build("abc")
    config = ModelConfig(**{**TINY, "vocab_size": tokenizer.vocab_size, "activation": "relu2", **values})
    save(workspace.path / "model.pt", GPT(config), tokenizer)
    message = refusal(workspace, "-m", "model.pt", "--to", target, "out")
    assert f"model.pt: {named}: no counterpart in --to {target}; train with {instead}" in message
    assert ("--to html" in message) == config.is_causal
    assert not (workspace.path / "out").exists()


@pytest.mark.parametrize("target, package", [("hf", "safetensors"), ("gguf", "gguf")])
def test_a_missing_package_is_answered_with_the_pip_command(chats, target, package, monkeypatch):
    workspace, _ = chats
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    message = refusal(workspace, "-m", "qwen3.pt", "--to", target, "missing")
    assert f"--to {target} needs the package {package}: pip install {package}" in message
    assert not (workspace.path / "missing").exists()


@pytest.mark.parametrize("target, package", [("hf", "transformers"), ("gguf", "xllamacpp")])
def test_a_check_that_cannot_run_says_how_to(chats, target, package, monkeypatch):
    workspace, _ = chats
    monkeypatch.setitem(sys.modules, package, None)
    result, lines = export_to(workspace, "qwen3.pt", target, f"unchecked_{target}")
    assert result["largest_difference"] is None
    assert f"not checked: pip install --upgrade {package}, and export again" in lines


def test_an_export_replaces_an_earlier_one_and_nothing_else(chats):
    workspace, _ = chats
    folder = workspace.path / "again_hf"
    export_to(workspace, "qwen3.pt", "hf", folder)
    export_to(workspace, "apertus.pt", "hf", folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "apertus"
    (folder / "notes.txt").write_text("mine")
    message = refusal(workspace, "-m", "qwen3.pt", "--to", "hf", folder)
    assert "again_hf: holds notes.txt, which no export has written" in message
    assert (folder / "notes.txt").read_text() == "mine"
    export_to(workspace, "qwen3.pt", "gguf", "again.gguf")
    _, lines = export_to(workspace, "apertus.pt", "gguf", "again.gguf")
    assert not any("replaced" in line for line in lines)
    _, lines = export_to(workspace, "apertus.pt", "gguf", "other.gguf")
    assert any(line.startswith("Modelfile: replaced, and no longer names again.gguf") for line in lines)
    assert not list(workspace.path.glob("again*.tmp*"))

    foreign = workspace.path / "foreign"
    foreign.mkdir()
    (foreign / "Modelfile").write_text("FROM llama3\n")
    (foreign / "thesis.gguf").write_text("mine")
    kept = {path: path.read_text() for path in foreign.iterdir()}
    for words, message in (
            (("--to", "hf", "foreign"), "holds Modelfile, which no export has written"),
            (("--to", "hf", "foreign/thesis.gguf"), "is a file, but --to hf writes a folder"),
            (("--to", "gguf", "foreign/thesis.gguf"), "a file that no export has written"),
            (("--to", "gguf", "foreign/new.gguf"), "Modelfile: a file that no export has written"),
            (("--to", "gguf", "foreign"), "is a folder, but --to gguf writes a file"),
            (("--to", "html", "foreign/thesis.gguf"), "a file that no export has written"),
            (("--to", "hf", "absent/out"), "there is no folder absent")):
        assert message in refusal(workspace, "-m", "qwen3.pt", *words)
    assert {path: path.read_text() for path in foreign.iterdir()} == kept


def test_a_folder_that_cannot_be_renamed_leaves_the_earlier_export(chats, monkeypatch):
    workspace, _ = chats
    folder = workspace.path / "renamed_hf"
    export_to(workspace, "qwen3.pt", "hf", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)
    monkeypatch.setattr(os, "rename", failing)
    message = refusal(workspace, "-m", "apertus.pt", "--to", "hf", folder)
    assert "renamed_hf: cannot be written (Input/output error)" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(workspace.path.glob("renamed_hf.*"))


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_a_full_disk_leaves_nothing_behind(chats, target):
    """No file may grow beyond 50 kB, less than the weights take."""
    workspace, _ = chats
    before = sorted(os.listdir(workspace.path))
    script = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000));"
              f"sys.argv = ['export.py', '-m', 'qwen3.pt', '--to', '{target}', 'full'];"
              "runpy.run_path('export.py', run_name='__main__')")
    message = workspace.run("-c", script, status=2).stderr
    assert "full: cannot be written (" in message and "Traceback" not in message
    assert sorted(os.listdir(workspace.path)) == before


def test_mistakes_in_flags_are_answered_before_torch_is_imported(workspace):
    for words, message in ((("--to", "hf", "--dtype", "F16", "out"),
                            "--dtype is F16, but --to hf takes float32, float16, bfloat16"),
                           (("--to", "onnx", "out"), "invalid choice: 'onnx'"),
                           (("--to", "hf", "dataset"), "dataset: holds ")):
        script = ("import sys, runpy; sys.modules['torch'] = None;"  # importing it would fail
                  f"sys.argv = ['export.py', '-m', 'model.pt', *{words!r}];"
                  "runpy.run_path('export.py', run_name='__main__')")
        assert message in workspace.run("-c", script, status=2).stderr
