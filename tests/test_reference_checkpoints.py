"""Checkpoints of the reference project since October 2024: loaded, talked to, continued, scored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import make_fixtures

import checkpoint as ckpt
import evaluate
import export
import inference
from generate import generate
from script import InputError

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["reference_llama.pt", "reference_llama_learned.pt"]


class Reference:
    """The reference project's tokenizer and newer model, written down from the facts of its format alone."""

    def __init__(self, path):
        with torch.serialization.safe_globals(ckpt.stand_ins()):
            content = torch.load(path, weights_only=True)
        self.weights = content["model"]
        self.config = vars(content["model_config"])
        self.itos = content["tokenizer_config"]["itos"]
        self.stoi = content["tokenizer_config"]["stoi"]

    def encode(self, text):
        """The longest entry that matches, again and again."""
        ids = []
        while text:
            longest = max((entry for entry in self.itos if text.startswith(entry)), key=len, default=None)
            ids.append(1 if longest is None else self.stoi[longest])
            text = text[len(longest or "?") :]
        return ids

    def rms(self, x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["norm_eps"]).rsqrt()
        return x * scale * self.weights[name + ".weight"]

    def rotate(self, x):
        """x (heads, T, hs): position t turns the pair (2i, 2i + 1) by t / 10000^(2i / hs)."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        angle = torch.arange(x.size(1))[:, None] / 10000 ** (torch.arange(0, x.size(2), 2) / x.size(2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def logits(self, ids):
        w, c = self.weights, self.config
        nkv = c["n_kv_head"] or c["n_head"]
        x = w["tok_embeddings.weight"][ids]
        if not c["use_rope"]:
            x = x + w["wpe.weight"][: len(ids)]
        for n in range(c["n_layer"]):
            layer = f"layers.{n}."
            h = self.rms(x, layer + "attention_norm")
            q, k, v = ((h @ w[f"{layer}attention.{name}.weight"].T).view(len(ids), heads, -1).transpose(0, 1)
                       for name, heads in (("wq", c["n_head"]), ("wk", nkv), ("wv", nkv)))
            if c["use_rope"]:
                q, k = self.rotate(q), self.rotate(k)
            k, v = (t.repeat_interleave(c["n_head"] // nkv, dim=0) for t in (k, v))
            score = q @ k.transpose(1, 2) / q.size(-1) ** 0.5
            score = score + w[layer + "attention.mask"][0, :, : len(ids), : len(ids)]
            y = (score.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
            x = x + y @ w[layer + "attention.wo.weight"].T
            h = self.rms(x, layer + "ffn_norm")
            gate, up = (h @ w[f"{layer}feed_forward.{name}.weight"].T for name in ("w1", "w3"))
            x = x + (gate * gate.sigmoid() * up) @ w[layer + "feed_forward.w2.weight"].T
        return self.rms(x, "norm") @ w["output.weight"].T

    def greedy(self, ids, n):
        for _ in range(n):
            ids = [*ids, int(self.logits(ids)[-1].argmax())]
        return ids[-n:]


@pytest.mark.parametrize("name", NAMES)
def test_a_newer_checkpoint_gives_the_tokens_that_the_reference_would(name):
    reference = Reference(FIXTURES / name)
    model, tokenizer = ckpt.build_model(ckpt.load(FIXTURES / name), name)
    for text in ("你好", "hello the radio 73 de", "无线电he无x台€"):
        ids = reference.encode(text)
        assert tokenizer.encode(text).tolist() == ids
        torch.testing.assert_close(model(torch.tensor([ids]))[0][0], reference.logits(ids), atol=1e-4,
                                   rtol=1e-4)
        got = [int(token) for token in generate(model, torch.tensor([ids]), 12, temperature=0)]
        assert got == reference.greedy(ids, 12)


def test_a_hidden_width_of_none_is_eight_thirds_rounded_up_to_256():
    content = ckpt.load(FIXTURES / "reference_llama.pt")
    assert content["model_config"]["n_hidden"] == 256 and content["model_config"]["n_embd"] == 16
    assert ckpt.load(FIXTURES / "reference_llama_learned.pt")["model_config"]["n_hidden"] == 24


@pytest.mark.parametrize("instruct", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_inference_talks_to_and_continues_text_with_a_newer_checkpoint(workspace, capsys, name, instruct):
    reference = Reference(FIXTURES / name)
    words = ["-m", FIXTURES / name, "-p", "你好", "-t", 0, "-r", 1, "-l", 20]
    with workspace.here("inference.py", *words, *["-i"] * instruct):
        inference.main()
    prompt = reference.encode("你好")
    if instruct:
        prompt = [reference.stoi["<|instruct_mark|>"], *prompt, reference.stoi["<|response_mark|>"]]
    expected = reference.greedy(prompt, 20 - len(prompt))
    expected = expected[: expected.index(3)] if 3 in expected else expected
    assert capsys.readouterr().out == "".join(reference.itos[i] for i in expected) + "\n"


def test_training_continues_from_a_newer_checkpoint(workspace):
    path = FIXTURES / "reference_llama.pt"
    _, tokenizer = ckpt.build_model(ckpt.load(path), path)
    tokenizer.save(workspace.path / "dataset" / "tokenizer.json")
    for part in ("train", "val"):
        ids = tokenizer.encode("呼叫无线电台CQ CQ，hello" * 60)
        np.save(workspace.path / "dataset" / f"pretrain_{part}.npy", ids.astype(tokenizer.dtype))
    workspace.train("--from_checkpoint", path, "--max_steps", 3, "--batch_size", 2)
    after = workspace.load("pretrain_last.pt")
    assert after["step"] == 3 and after["model_config"]["n_hidden"] == 256
    before = ckpt.load(path)["model"]
    moved = max((after["model"][key] - before[key]).abs().max() for key in before)
    assert after["model"].keys() == before.keys() and 0 < moved < 0.02


def test_evaluate_scores_a_newer_checkpoint(workspace, capsys):
    reference = Reference(FIXTURES / "reference_llama.pt")
    text = "hello the radio 你好，呼叫 73 de"
    (workspace.path / "text.txt").write_text(text, encoding="utf-8")
    with workspace.here("evaluate.py", "-m", FIXTURES / "reference_llama.pt", "--text", "text.txt"):
        evaluate.main()
    ids = reference.encode(text)
    logprobs = reference.logits(ids[:-1]).log_softmax(-1)
    expected = -float(logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean())
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["text"]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_lora_file_is_refused_in_one_line(tmp_path):
    make_fixtures.save_newer(tmp_path / "lora.pt", make_fixtures.NewerModelConfig(), is_lora=True)
    with pytest.raises(InputError, match="lora.pt: holds LoRA weights, not a model; merge them") as error:
        ckpt.load(tmp_path / "lora.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("layers.1.feed_forward.w3.weight"), "but without 'layers.1.feed_forward.w3.weight'"),
    (lambda w: w.update({"extra.weight": torch.ones(1)}), "the weight extra.weight is not known"),
    (lambda w: w.update({"output.weight": w["output.weight"] + 1}), "here they are tied"),
    (lambda w: w.update({"layers.0.attention.wk.weight": torch.ones(3, 5)}), "do not fit together"),
], ids=range(4))
def test_a_newer_checkpoint_that_contradicts_itself_is_named(change, message):
    path = FIXTURES / "reference_llama.pt"
    with torch.serialization.safe_globals(ckpt.stand_ins()):
        content = torch.load(path, weights_only=True)
    change(content["model"])
    with pytest.raises(InputError, match=message) as error:
        ckpt.from_reference(content, "here.pt")
    assert str(error.value).startswith("here.pt: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_a_vocabulary_of_words_is_exported_to_html_only(workspace, target):
    message = workspace.refused(export.main, "-m", FIXTURES / "reference_llama.pt", "--to", target, "out")
    assert "a vocabulary of words such as 'hello'" in message and "use --to html" in message


def test_newer_fixtures_are_what_their_script_writes(tmp_path):
    for name, values in (("reference_llama.pt", {}),
                         ("reference_llama_learned.pt",
                          dict(n_kv_head=None, n_hidden=24, use_rope=False, n_layer=1))):
        make_fixtures.save_newer(tmp_path / name, make_fixtures.NewerModelConfig(**values))
        made, shipped = ckpt.load(tmp_path / name), ckpt.load(FIXTURES / name)
        assert made["tokenizer_config"] == shipped["tokenizer_config"]
        assert {k: v.shape for k, v in made["model"].items()} == \
            {k: v.shape for k, v in shipped["model"].items()}
