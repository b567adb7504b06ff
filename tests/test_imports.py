"""The house: imports point downward only, nothing rebinds a global, and no file grows past 400 lines."""

import ast
import importlib.util
import subprocess
import sys

import pytest
from conftest import REPO

# docs/design.md, "Shape": a module may import those of the lines above its own, and those of its own folder.
LAYERS = [
    "script",
    "config",
    "flags",
    "tokenizer metrics device documents preceding muon cpu gpu",
    "corpus model optimizer",
    "dataloader",
    "data checkpoint generate_gpu scaling_law",
    "generate stats strategy scoring exports problems",
    "run verify_resume inference inference_ds evaluate export plot_loss",
    "train",
    "train_ddp problem plan",
    "train_deepspeed",
    "studies",
]
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}
CODE = sorted(path for path in [*REPO.glob("*.py"), *REPO.glob("*/*.py")]
              if path.parent.name not in ("tests", "dataset") and not path.parent.name.startswith("."))


def imported(tree):
    """Names of the modules and packages that a file imports, at its top or inside of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def room(path):
    """A root script's name, or the name of a file's folder."""
    return path.stem if path.parent == REPO else path.parent.name


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(REPO)))
def test_imports_point_downward(path):
    own = room(path)
    wrong = [name for name in map(lambda name: name.split(".")[0], imported(ast.parse(path.read_text())))
             if name in LEVEL and name != own and LEVEL[name] > LEVEL[own]]
    assert not wrong, f"{path.relative_to(REPO)} imports {', '.join(wrong)}"


def test_every_file_has_its_place_in_the_layers():
    assert {room(path) for path in CODE} == LEVEL.keys()


def test_the_code_for_cpus_and_gpus_imports_nothing_from_the_root_but_script():
    for folder in ("cpu", "gpu"):
        for path in (REPO / folder).glob("*.py"):
            rooms = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
            assert not rooms & LEVEL.keys() - {folder, "script"}, path.name


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(REPO)))
def test_a_file_rebinds_no_global_and_has_at_most_400_lines(path):
    text = path.read_text()
    assert not any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(text)))
    assert len(text.splitlines()) <= 400


def test_importing_a_script_runs_nothing(tmp_path):
    names = [".".join(path.relative_to(REPO).with_suffix("").parts) for path in CODE]
    lines = ["import sys", "sys.argv = ['x', '--no-such-flag']", f"sys.path.insert(0, {str(REPO)!r})"]
    names.remove("train_deepspeed")
    if importlib.util.find_spec("triton") is None:
        names.remove("gpu.fused")
    lines += [f"import {name}" for name in names]
    program = "\n".join(lines)
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
