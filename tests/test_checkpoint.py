"""Checkpoints: what is in them, that they are whole, that nothing in them runs, older formats."""

import io
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, Workspace

import checkpoint as ckpt
import inference
import train
from generate import generate
from run import Run
from script import InputError
from verify_resume import differences

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = ["reference_rope.pt", "reference_learned.pt"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace with one pretrained model, which tests only read."""
    workspace = Workspace(tmp_path_factory.mktemp("trained"))
    workspace.train()
    return workspace


@pytest.fixture
def saved(trained):
    """The path of a checkpoint that train.py wrote."""
    return trained.path / "checkpoint" / "pretrain_last.pt"


def plain(value):
    """Does a value consist of strings, numbers, booleans, None, lists, dicts and tensors alone?"""
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)


def test_a_checkpoint_holds_plain_values_only(saved):
    """No pickled class, so that no later version of this program is needed to read it."""
    content = torch.load(saved, weights_only=True)  # with nothing allowed beyond torch's own
    assert set(content) == set(ckpt.KEYS) and plain(content)
    with zipfile.ZipFile(saved) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        globals_ = set(re.findall(rb"c([\w.]+\n[\w.]+)\n", archive.read(name)))
    assert all(name.startswith((b"torch", b"collections\nOrderedDict")) for name in globals_)


def test_a_checkpoint_says_with_which_settings_it_was_made(saved):
    content = ckpt.load(saved)
    assert content["model_config"]["n_embd"] == 32 and content["train_config"]["batch_size"] == 4
    assert content["task"] == "pretrain" and content["step"] == 6
    assert content["tokenizer_config"]["itos"][:2] == ["<|Padding|>", "<|unknown|>"]


def test_the_tied_embedding_is_stored_once(saved):
    content = torch.load(saved, weights_only=True)["model"]
    assert content["lm_head.weight"].data_ptr() == content["transformer.wte.weight"].data_ptr()


def test_no_file_of_the_project_names_one_persons_machine():
    """Absolute paths, in whatever git would take in."""
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.json", "*.md",
                            "Makefile"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    personal = re.compile(r"(?:/home/|/Users/|/root/|[A-Z]:\\)\w")
    named = [name for name in found if (REPO / name).exists() and name != "tests/test_checkpoint.py"
             and personal.search((REPO / name).read_text(encoding="utf-8"))]
    assert found and not named


def test_every_torch_load_and_np_load_of_the_project_is_safe():
    """What a hostile file does is tested below; this finds a call that no test reaches."""
    sources = [path for folder in ("", "cpu", "studies", "problems") for path in (REPO / folder).glob("*.py")]
    assert len(sources) > 30
    for path in sources:
        source = path.read_text(encoding="utf-8")
        for call in re.findall(r"torch\.load\([^)]*\)", source):
            assert "weights_only=True" in call, (path.name, call)
        assert "allow_pickle=True" not in source and "import pickle" not in source, path.name
        assert "shell=True" not in source and "os.system" not in source, path.name


def test_the_fixed_name_stands_for_the_dated_file(trained, saved):
    (dated,) = trained.path.glob("checkpoint/pretrain_0*_last.pt")
    assert os.path.samefile(saved, dated)


def test_the_fixed_name_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    (tmp_path / "a.pt").write_bytes(b"new")
    (tmp_path / "best.pt").write_bytes(b"old")
    ckpt.alias(str(tmp_path / "a.pt"), "best.pt")
    assert (tmp_path / "best.pt").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "best.pt"]


def test_a_link_that_a_killed_run_left_is_not_written_through(tmp_path):
    """Process numbers come round again: the name of the temporary link may be taken, by another file."""
    (tmp_path / "older.pt").write_bytes(b"older")
    (tmp_path / "new.pt").write_bytes(b"new")
    os.link(tmp_path / "older.pt", tmp_path / f"best.pt.{os.getpid()}.tmp")
    ckpt.alias(str(tmp_path / "new.pt"), "best.pt")
    assert (tmp_path / "older.pt").read_bytes() == b"older"
    assert (tmp_path / "best.pt").read_bytes() == b"new"
    assert not list(tmp_path.glob("*.tmp"))


def test_what_a_killed_run_left_half_written_goes_after_an_hour(tmp_path):
    old, young, mine = (tmp_path / name for name in ("a.pt.1.tmp", "b.pt.2.tmp", "notes.tmp"))
    for path in (old, young, mine):
        path.write_bytes(b"half")
    hours_ago = time.time() - 7200
    for path in (old, mine):
        os.utime(path, (hours_ago, hours_ago))
    ckpt.prepare_folder(str(tmp_path))
    assert not old.exists() and young.exists() and mine.exists()


def test_the_command_line_tells_what_is_in_a_file(trained):
    out = trained.run("checkpoint.py", "checkpoint/pretrain_last.pt").stdout
    assert "pretrain, step 6" in out and "n_embd 32" in out and "parameters" in out


def test_a_missing_file_says_what_there_is(trained):
    said = trained.run("checkpoint.py", "checkpoint/gone.pt", status=2).stderr
    assert re.fullmatch(r"error: \S+/checkpoint/gone.pt: no such file; "
                        r"there are .*checkpoint/pretrain_last.pt.*\n", said)


# ---- Damaged files ----

def refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        ckpt.load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_cut_at_every_kilobyte_is_refused(saved, tmp_path):
    content = saved.read_bytes()
    for length in range(0, len(content), 1024):
        refusal(tmp_path / "cut.pt", content[:length])
    refusal(tmp_path / "cut.pt", content[:-1])


def test_a_flipped_bit_is_refused_or_changes_nothing(saved, tmp_path):
    """300 random places: the file is refused, or (in a time stamp, say) it reads as before."""
    content, rng, refused = saved.read_bytes(), random.Random(0), 0
    expected = torch.load(saved, weights_only=True)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path = tmp_path / "flipped.pt"
        path.write_bytes(damaged)
        try:
            got = ckpt.load(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert not differences(got, expected, "checkpoint")
    assert refused > 200


def test_a_flipped_bit_in_a_weight_is_named_as_damage(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    weights = torch.load(saved, weights_only=True)["model"]["lm_head.weight"].numpy().tobytes()
    content[content.index(weights) + 100] ^= 1
    assert "damaged (in " in refusal(tmp_path / "flipped.pt", bytes(content))


def test_a_flipped_bit_that_makes_a_folder_of_a_tensor_is_named_as_damage(saved, tmp_path):
    """One bit of each entry of the archive's directory, which no checksum covers: torch would then return
    memory that nobody has written to."""
    content = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        entries, at = len(archive.infolist()), archive.start_dir
    for _ in range(entries):
        at = content.index(b"PK\x01\x02", at)
        damaged = bytearray(content)
        damaged[at + 38] ^= 0x10  # external attributes
        assert "damaged (in " in refusal(tmp_path / "flipped.pt", bytes(damaged))
        at += 46


def as_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [
    b"", b"\0" * 5000, b"hello", "无线电".encode(), b"PK\x03\x04", as_file([1, 2]), as_file({"a": 1}),
    as_file({"step_count": 3}), as_file({"format": "nano-2"}), as_file(torch.ones(3)),
    as_file(dict.fromkeys(ckpt.KEYS) | {"format": ckpt.FORMAT}), pickle.dumps({"a": 1}),
    (FIXTURES / "make_fixtures.py").read_bytes()], ids=range(13))
def test_a_file_of_the_wrong_kind_is_refused(tmp_path, content):
    refusal(tmp_path / "wrong.pt", content)


def test_a_zip_archive_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("letter.txt", "hello")
    refusal(tmp_path / "wrong.pt", (tmp_path / "x.zip").read_bytes())


@pytest.mark.parametrize("change, message", [
    (lambda c: c["model"].pop("lm_head.weight"), "weights do not fit"),
    (lambda c: c["model"].update(extra=torch.ones(1)), "weights do not fit"),
    (lambda c: c["model_config"].update(n_layer=3), "weights do not fit"),
    (lambda c: c["model_config"].update(n_head=5), "not divisible by n_head 5"),
    (lambda c: c["model_config"].update(n_heads=5), 'unknown key "n_heads"; did you mean "n_head"'),
    (lambda c: c["model_config"].update(n_embd="32"), "n_embd is '32', but must be of type int"),
    (lambda c: c["tokenizer_config"].pop("itos"), 'the key "itos" is missing'),
    (lambda c: c["tokenizer_config"].update(itos=["a"]), "vocab_size is"),
    (lambda c: c["tokenizer_config"].update(itos=c["tokenizer_config"]["itos"] + ["€"],
                                            vocab_size=c["tokenizer_config"]["vocab_size"] + 1),
     "is larger than the model's"),
], ids=range(9))
def test_contents_that_contradict_each_other_are_named(saved, change, message):
    content = torch.load(saved, weights_only=True)
    change(content)
    with pytest.raises(InputError, match=message) as error:
        ckpt.build_model(content, "here.pt")
    assert str(error.value).startswith("here.pt") and "\n" not in str(error.value)


# ---- Hostile files ----

class Attack:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def hostile_zip(saved, path, mark):
    """A good checkpoint whose data.pkl has been replaced by one that runs code; its checksums are right."""
    with zipfile.ZipFile(saved) as good, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as bad:
        for entry in good.namelist():
            is_pickle = entry.endswith("data.pkl")
            bad.writestr(entry, pickle.dumps(Attack(mark), protocol=2) if is_pickle else good.read(entry))


def test_the_attack_works_where_nothing_guards_against_it(saved, tmp_path):
    """Else the tests below could not fail."""
    hostile_zip(saved, tmp_path / "bad.pt", tmp_path / "mark")
    torch.load(tmp_path / "bad.pt", weights_only=False).close()
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("make", [
    lambda saved, path, mark: hostile_zip(saved, path, mark),
    lambda saved, path, mark: torch.save({"model": Attack(mark)}, path),
    lambda saved, path, mark: torch.save(Attack(mark), path, _use_new_zipfile_serialization=False),
    lambda saved, path, mark: path.write_bytes(pickle.dumps(Attack(mark)))],
    ids=["zip", "inside", "legacy", "pickle"])
def test_a_checkpoint_that_would_run_code_never_does(trained, saved, tmp_path, make):
    mark, bad = tmp_path / "mark", trained.path / "bad.pt"
    make(saved, bad, mark)
    with pytest.raises(InputError, match="bad.pt: not a checkpoint that can be loaded safely"):
        ckpt.load(bad)
    assert "bad.pt: not a checkpoint" in trained.refused_training("--from_checkpoint", "bad.pt")
    assert "bad.pt: not a checkpoint" in trained.refused(inference.main, "-m", "bad.pt", "-p", "x")
    assert not mark.exists()


def test_the_stand_ins_for_the_reference_projects_classes_run_nothing(tmp_path):
    """They are allowed in a pickle: calling them, or setting their state, must have no effect beyond that."""
    for stand_in, _ in ckpt.stand_ins():
        assert not {"__setstate__", "__init__", "__new__", "__call__", "__setattr__"} & set(vars(stand_in))


def test_data_files_that_would_run_code_never_do(workspace, tmp_path):
    mark, path = tmp_path / "mark", workspace.path / "dataset" / "pretrain_train.npy"
    array = np.empty(1, dtype=object)
    array[0] = Attack(mark)
    np.save(path, array, allow_pickle=True)
    assert "pretrain_train.npy: not a prepared .npy file" in workspace.refused_training()
    path.write_bytes(pickle.dumps(Attack(mark)))
    assert "pretrain_train.npy: not a prepared .npy file" in workspace.refused_training()
    with open(path, "wb") as f:
        np.savez(f, tokens=array)
    assert "pretrain_train.npy: not what data.py writes" in workspace.refused_training()
    assert not mark.exists()


def test_a_data_file_cut_at_every_kilobyte_is_refused(workspace):
    path = workspace.path / "dataset" / "pretrain_train.npy"
    content = path.read_bytes()
    for length in [*range(0, 128, 7), *range(1024, len(content), 1024)]:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="pretrain_train.npy: ") as error:
            train.DataLoader([str(path)], "pretrain", 32, 4)
        assert "\n" not in str(error.value), length


# ---- The newest valid one ----

def test_latest_takes_the_newest_valid_one_and_says_which_it_skipped(workspace, capsys):
    folder = workspace.path / "checkpoint"
    workspace.train("--save_interval", 2)
    for minutes, name in enumerate(["*_step_2.pt", "*_step_4.pt", "*_0000_best.pt", "*_0000_last.pt"]):
        (path,) = folder.glob(name)
        os.utime(path, (1e9 + minutes * 60,) * 2)
    (newest,) = folder.glob("*_0000_last.pt")
    (folder / "pretrain_last.pt").unlink()
    newest.write_bytes(newest.read_bytes()[:5000])
    os.utime(newest, (1e9 + 300,) * 2)
    capsys.readouterr()
    path, content = Run(str(workspace.path)).latest()
    assert path.endswith("_best.pt") and content["step"] == 6
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"skipped: {newest}: ")
    result = workspace.train("--from_checkpoint", "latest", "--max_steps", 9)
    assert result["step"] == 9


def test_latest_looks_for_the_same_task(workspace):
    workspace.train()
    message = workspace.refused_training("-t", "sft", "--from_checkpoint", "latest")
    assert '"latest": no valid sft checkpoint in' in message
    workspace.train("-t", "sft")
    workspace.train("--max_steps", 7)
    assert workspace.train("-t", "sft", "--from_checkpoint", "latest", "--max_steps", 8)["step"] == 8


# ---- Formats that have shipped ----

def test_our_first_format_still_loads_and_continues(workspace):
    path = FIXTURES / "nano1.pt"
    content = ckpt.load(path)
    model, tokenizer = ckpt.build_model(content, path)
    assert content["step"] == 6 and model.config.n_embd == 16
    assert tokenizer.to_dict() == content["tokenizer_config"]
    result = workspace.train("--from_checkpoint", path, "--max_steps", 8, "--dropout", 0.1,
                             "--embedding_lr", 1)
    assert result["step"] == 8


class Reference:
    """The reference project's tokenizer and model, written down from the facts of its format alone."""

    def __init__(self, path):
        with torch.serialization.safe_globals(ckpt.stand_ins()):
            content = torch.load(path, weights_only=True)
        self.weights, self.config = content["model"], vars(content["model_config"])
        self.itos, self.stoi = content["tokenizer_config"]["itos"], content["tokenizer_config"]["stoi"]

    def encode(self, text):
        ids, i = [], 0
        while i < len(text):
            for length in range(max(map(len, self.stoi)), 0, -1):
                if text[i : i + length] in self.stoi and len(text[i : i + length]) == length:
                    break
            else:
                length = 1
            ids.append(self.stoi.get(text[i : i + length], 1))
            i += length
        return ids

    def rms(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config["norm_eps"]).sqrt() * self.weights[name]

    def rotate(self, x):
        """Position t turns the pair (2i, 2i + 1) by t / 10000^(2i / head size)."""
        out = x.clone()
        for t in range(x.size(-2)):
            for i in range(x.size(-1) // 2):
                angle = torch.tensor(t / 10000 ** (2 * i / x.size(-1)))
                a, b = x[..., t, 2 * i], x[..., t, 2 * i + 1]
                out[..., t, 2 * i] = a * angle.cos() - b * angle.sin()
                out[..., t, 2 * i + 1] = a * angle.sin() + b * angle.cos()
        return out

    def logits(self, ids):
        w, c = self.weights, self.config
        x = w["transformer.wte.weight"][ids]
        if not c["use_rope"]:
            x = x + w["transformer.wpe.weight"][: len(ids)]
        for n in range(c["n_layer"]):
            p = f"transformer.h.{n}."
            qkv = (self.rms(x, p + "ln_1.weight") @ w[p + "attn.c_attn.weight"].T).split(c["n_embd"], dim=-1)
            q, k, v = (t.view(len(ids), c["n_head"], -1).transpose(0, 1) for t in qkv)
            if c["use_rope"]:
                q, k = self.rotate(q), self.rotate(k)
            score = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
            score = score.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
            y = (score.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
            x = x + y @ w[p + "attn.c_proj.weight"].T
            h = self.rms(x, p + "ln_2.weight") @ w[p + "mlp.c_fc.weight"].T
            x = x + (0.5 * h * (1 + torch.erf(h / 2**0.5))) @ w[p + "mlp.c_proj.weight"].T
        x = F.layer_norm(x, (c["n_embd"],), w["transformer.ln_f.weight"], None, 1e-5)
        return x @ w["lm_head.weight"].T

    def greedy(self, ids, n):
        for _ in range(n):
            ids = [*ids, int(self.logits(ids)[-1].argmax())]
        return ids[-n:]


@pytest.mark.parametrize("name", REFERENCE)
def test_a_reference_checkpoint_gives_the_tokens_that_the_reference_would(name):
    reference = Reference(FIXTURES / name)
    model, tokenizer = ckpt.build_model(ckpt.load(FIXTURES / name), name)
    for text in ("你好", "呼叫无线电台CQ CQ", "hello BD4SUR", "无线x台€"):
        ids = reference.encode(text)
        assert [int(i) for i in tokenizer.encode(text)] == ids
        torch.testing.assert_close(model(torch.tensor([ids]))[0][0], reference.logits(ids), atol=1e-4,
                                   rtol=1e-4)
        got = [int(t) for t in generate(model, torch.tensor([ids]), 12, temperature=0)]
        assert got == reference.greedy(ids, 12)


@pytest.mark.parametrize("name", REFERENCE)
def test_inference_runs_a_reference_checkpoint(workspace, capsys, name):
    """python inference.py -i -m file.pt, with the template's marks as that project spells them."""
    reference = Reference(FIXTURES / name)
    words = ["-i", "-m", FIXTURES / name, "-p", "你好", "-t", 0, "-r", 1, "-l", 20]
    with workspace.here("inference.py", *words):
        inference.main()
    marks = [reference.stoi[mark] for mark in ("<|instruct_mark|>", "<|response_mark|>")]
    prompt = [marks[0], *reference.encode("你好"), marks[1]]
    expected = reference.greedy(prompt, 20 - len(prompt))
    expected = expected[: expected.index(3)] if 3 in expected else expected
    assert capsys.readouterr().out == "".join(reference.itos[i] for i in expected) + "\n"


@pytest.mark.parametrize("name", REFERENCE)
def test_training_continues_from_a_reference_checkpoint(workspace, name):
    path = FIXTURES / name
    _, tokenizer = ckpt.build_model(ckpt.load(path), name)
    tokenizer.save(workspace.path / "dataset" / "tokenizer.json")
    for part in ("train", "val"):
        ids = tokenizer.encode("呼叫无线电台CQ CQ，hello" * 60)
        np.save(workspace.path / "dataset" / f"pretrain_{part}.npy", ids.astype(tokenizer.dtype))
    workspace.train("--from_checkpoint", path, "--max_steps", 3, "--batch_size", 2)
    after = workspace.load("pretrain_last.pt")
    assert after["step"] == 3 and after["model_config"]["final_norm"] == "layernorm"
    before = ckpt.load(path)["model"]
    moved = max((after["model"][key] - before[key]).abs().max() for key in before)
    assert after["model"].keys() == before.keys() and 0 < moved < 0.02
    result = workspace.train("--from_checkpoint", "checkpoint/pretrain_last.pt", "--batch_size", 2)
    assert result["step"] == 6


def test_fixtures_are_what_their_script_writes(tmp_path):
    """They can be made again: the same names, shapes and vocabulary."""
    shutil.copy(FIXTURES / "make_fixtures.py", tmp_path / "make.py")
    (tmp_path / "nano1.pt").write_bytes(b"kept")
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path, check=True, capture_output=True)
    for name in REFERENCE:
        made, shipped = ckpt.load(tmp_path / name), ckpt.load(FIXTURES / name)
        assert made["tokenizer_config"] == shipped["tokenizer_config"]
        assert {k: v.shape for k, v in made["model"].items()} == \
            {k: v.shape for k, v in shipped["model"].items()}
