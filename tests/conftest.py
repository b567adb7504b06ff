"""Shared by the tests: a real workspace (the scripts, small prepared data), real processes, a tiny GPT."""

import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: many small processes share few cores

import torch

import config
import metrics
import train
from config import ModelConfig
from cpu import native
from model import GPT
from script import run_script
from tokenizer import Tokenizer, encode_conversation

# A busy machine is slow, which says nothing about the program.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

PACKAGES = ("corpus", "cpu", "exports", "problems", "scoring", "studies", "web")
TINY = dict(block_size=32, n_layer=2, n_head=4, n_embd=32)
TEXT = "".join(f"<|bos|>The letter {a} follows {b}. 字母{a}在{b}后面。<|eos|>\n"
               for a, b in zip("BCDEFGHIJKLMNOPQRSTUVWXYZ" * 8, "ABCDEFGHIJKLMNOPQRSTUVWXY" * 8, strict=True))
PAIRS = [(f"after {b}{mark}", f"{a}.") for mark in ("", "?", "!", "？")
         for a, b in zip("BCDEFGHIJKLMNOPQRSTUVWXYZ", "ABCDEFGHIJKLMNOPQRSTUVWXY", strict=True)]


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """decode.c is compiled before anything generates, so that each run of the tests takes the same way."""
    assert native.wait("decode.c") or native.start("decode.c") is None, "decode.c does not compile"


class Workspace:
    """A folder with a copy of the scripts, tiny configs and prepared data; runs scripts in it."""

    def __init__(self, folder):
        self.path = Path(folder)
        self.stamps = itertools.count()
        for path in [*REPO.glob("*.py"), *REPO.glob("*.json")]:
            shutil.copy(path, self.path)
        for name in PACKAGES:
            shutil.copytree(REPO / name, self.path / name)  # with the compiled decode.c in cpu/__pycache__
        for name in ("dataset", "checkpoint"):
            (self.path / name).mkdir()
        self.configure("model_config.json", **TINY)
        for name in ("config_pretrain.json", "config_sft.json"):
            self.configure(name, batch_size=4, gradient_accumulation_steps=2, max_steps=6, warmup_iters=2,
                           eval_interval=3, eval_iters=2, device="cpu", dtype="float32")
        self.prepare()

    def configure(self, name, **values):
        path = self.path / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def prepare(self):
        """Write the tokenizer and prepared files as data.py does, without its process."""
        tokenizer = Tokenizer.build([TEXT, *(q + a for q, a in PAIRS)])
        tokenizer.save(self.path / "dataset" / "tokenizer.json")
        ids = tokenizer.encode(TEXT, allow_special=True)
        for part, name in ((ids[:-600], "train"), (ids[-600:], "val")):
            np.save(self.path / "dataset" / f"pretrain_{name}.npy", part)
        for pairs, name in ((PAIRS[:-12], "train"), (PAIRS[-12:], "val")):
            rows = []
            for pair in pairs:
                ids, mask = encode_conversation(tokenizer, [pair])
                rows += [np.stack([ids, mask], axis=1), np.zeros((1, 2))]
            np.save(self.path / "dataset" / f"sft_{name}.npy", np.concatenate(rows).astype(tokenizer.dtype))

    def run(self, *words, status=0, stdin="", timeout=120, env=None):
        """Run `python WORDS…` there; assert its exit status; return the CompletedProcess (text)."""
        result = subprocess.run([sys.executable, *map(str, words)], cwd=self.path, input=stdin, text=True,
                                capture_output=True, timeout=timeout, env={**os.environ, **(env or {})})
        assert result.returncode == status, f"{words}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    @contextlib.contextmanager
    def here(self, *words):
        """In this context a script's main() works in this folder, with WORDS as its command line.

        Runs are numbered instead of dated, so that none waits for the next second."""
        before = os.getcwd()
        os.chdir(self.path)
        try:
            with mock.patch.object(sys, "argv", list(map(str, words or ["script"]))), \
                    mock.patch.object(metrics.time, "strftime", lambda _: f"{next(self.stamps):04}"):
                yield
        finally:
            os.chdir(before)

    def arguments(self, *words):
        """train.py's parsed command line WORDS… for this folder."""
        return config.command_line(None, argv=list(map(str, words)), root=str(self.path))

    def train(self, *words):
        """train.py WORDS… in this process, which spares the import of torch; returns what train.train does."""
        with self.here():
            return train.train(self.arguments(*words), train.SingleProcess())

    def refused(self, main, *words):
        """Call `main` in this folder as a script does, with WORDS as its command line.

        Asserts that it ends with status 2 and one line on standard error; returns the line."""
        stderr = io.StringIO()
        with self.here("script", *words), contextlib.redirect_stderr(stderr), \
                pytest.raises(SystemExit) as ended:
            run_script(main)
        lines = [line for line in stderr.getvalue().splitlines() if "error" in line.lower()]
        assert ended.value.code == 2 and len(lines) == 1, stderr.getvalue()
        return lines[0]

    def refused_training(self, *words):
        """train.py WORDS… in this process, which must be refused; returns the line (see `refused`)."""
        return self.refused(lambda: train.train(self.arguments(*words), train.SingleProcess()))

    def load(self, name):
        """A checkpoint file of the workspace as the dict that it holds."""
        return torch.load(self.path / "checkpoint" / name, weights_only=True)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


@pytest.fixture
def tiny_model():
    """Makes a real tiny GPT in evaluation mode: tiny_model(n_kv_head=2, …)."""
    def make(**values):
        torch.manual_seed(0)
        return GPT(ModelConfig(**{**TINY, "vocab_size": 50, **values})).eval()
    return make
