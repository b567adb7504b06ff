"""Shared by the tests: a real workspace (the scripts, small prepared data), real processes, a tiny GPT."""

import atexit
import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: many small processes share few cores

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton: the kernels of gpu/ then run on the CPU

from forks import Fork, Forks

import flags
import metrics
import strategy
import train
from config import ModelConfig
from cpu import native
from model import GPT
from script import run_script
from tokenizer import Tokenizer, encode_conversation

# A busy machine is slow, which says nothing about the program.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

PACKAGES = ("corpus", "cpu", "exports", "gpu", "scoring", "studies", "web")
TINY = dict(block_size=32, n_layer=2, n_head=4, n_embd=32)
TEXT = "".join(f"<|bos|>The letter {a} follows {b}. 字母{a}在{b}后面。<|eos|>\n"
               for a, b in zip("BCDEFGHIJKLMNOPQRSTUVWXYZ" * 8, "ABCDEFGHIJKLMNOPQRSTUVWXY" * 8, strict=True))
PAIRS = [(f"after {b}{mark}", f"{a}.") for mark in ("", "?", "!", "？")
         for a, b in zip("BCDEFGHIJKLMNOPQRSTUVWXYZ", "ABCDEFGHIJKLMNOPQRSTUVWXY", strict=True)]


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """decode.c is compiled before anything generates, so that each run of the tests takes the same way."""
    assert native.wait("decode.c") or native.start("decode.c") is None, "decode.c does not compile"


@functools.cache
def forks(*more):
    """The process that forks scripts, one for the whole session. more: modules that it imports besides."""
    server = Forks("numpy", "torch._dynamo", "tqdm", *more)
    atexit.register(server.close)
    return server


class Workspace:
    """A folder with a copy of the scripts, tiny configs and prepared data; runs scripts in it."""

    def __init__(self, folder):
        self.path = Path(folder)
        self.stamps = itertools.count()
        for path in [*REPO.glob("*.py"), *REPO.glob("*.json")]:
            shutil.copy(path, self.path)
        shutil.copytree(REPO / "problems", self.path / "problems")  # a test adds a problem
        for name in PACKAGES:
            os.symlink(REPO / name, self.path / name)  # with the compiled decode.c in cpu/__pycache__
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
        """Run `python WORDS…` there; assert its exit status; return the CompletedProcess (text).

        A script is forked from a process that has imported torch (forks.py), unless `env` has settings of
        Python itself."""
        words = list(map(str, words))
        is_ours = words[0].endswith(".py") or words[:2][-1].startswith("studies.")
        if is_ours and not any(name.startswith("PYTHON") for name in env or {}):
            return self.run_fork(words, status, stdin, timeout, env)
        result = subprocess.run([sys.executable, *words], cwd=self.path, input=stdin, text=True,
                                capture_output=True, timeout=timeout, env={**os.environ, **(env or {})})
        assert result.returncode == status, f"{words}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def run_fork(self, words, status, stdin, timeout, env):
        with tempfile.TemporaryDirectory() as folder:
            streams = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
            streams["stdin"].write_text(stdin, encoding="utf-8")
            ended = forks().start(self.path, words, **streams, env=env).wait(timeout)
            output = [streams[name].read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        assert ended == status, f"{words}: {ended}\n{output[0]}\n{output[1]}"
        return subprocess.CompletedProcess(words, ended, *output)

    def start(self, *words, **streams):
        """Run a script there in a fork, and return it when it has taken its first step of training."""
        seen = set(self.path.glob("train_*.log"))
        fork = forks().start(self.path, words, **streams)
        wait_for(lambda: any("Loss: " in log.read_text()
                             for log in set(self.path.glob("train_*.log")) - seen), fork)
        return fork

    def start_ranks(self, n, *words, server=None):
        """Run a script there in `n` processes that train together; returns their forks.

        What they print goes to output.txt."""
        shared = {"WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        return [(server or forks()).start(self.path, words, stdout="output.txt", stderr="output.txt",
                                          env={**shared, "RANK": rank, "LOCAL_RANK": rank})
                for rank in range(n)]

    def output(self):
        return (self.path / "output.txt").read_text(encoding="utf-8")

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
        return flags.command_line(None, argv=list(map(str, words)), root=str(self.path))

    def train(self, *words):
        """train.py WORDS… in this process, which spares the import of torch; returns the loop's dict."""
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


class CountedGraphs:
    """A backend of torch.compile that runs what it is given and counts the graphs."""

    def __init__(self):
        self.n = 0

    def __call__(self, graph, inputs):
        self.n += 1
        return graph.forward


def exact(checkpoint):
    """What checkpoints of equal runs have in common: all but the settings, and when the runs took place."""
    position = {key: value for key, value in checkpoint["dataloader"].items() if key not in
                ("stamp", "seconds")}
    return {**checkpoint, "dataloader": position, "train_config": None}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def bfloat16_that_is(fast):
    """A machine whose bfloat16 is fast, or is not."""
    return mock.patch.object(strategy, "has_fast_bfloat16", return_value=fast)


def wait_for(condition, process, seconds=60):
    """Wait until `condition()` holds; assert that the process (a Fork or a Popen) still runs."""
    end = time.monotonic() + seconds
    while not condition():
        is_running = process.running() if isinstance(process, Fork) else process.poll() is None
        assert is_running and time.monotonic() < end
        time.sleep(0.01)


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
