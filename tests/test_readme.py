"""The README's commands run as they stand, and its tables say what the code and the JSON files say."""

import json
import re
from dataclasses import fields

import pytest
from conftest import PAIRS, REPO, TEXT

from config import ModelConfig, TrainConfig

READMES = ["README.md", "README_zh.md"]
SCRIPTS = ("data", "train", "inference", "evaluate", "plot_loss")


def commands(name):
    """The lines of a README's code blocks that run one of the stages' scripts, without a comment behind.

    What follows a training by DeepSpeed is run where one is: in test_deepspeed.py."""
    blocks = re.findall(r"```\w*\n(.*?)```", (REPO / name).read_text(encoding="utf-8"), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines
            if re.match(rf"python ({'|'.join(SCRIPTS)})\.py", line) and "checkpoint/ds" not in line]


def words_of(command):
    """The words of a command after `python`; quoted text is one word."""
    return [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', command)][1:]


def test_the_commands_of_the_readme_run_in_their_order(workspace):
    for path in (workspace.path / "dataset").iterdir():
        path.unlink()
    rows = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in PAIRS]
    (workspace.path / "dataset" / "pretrain.txt").write_text(TEXT, encoding="utf-8")
    (workspace.path / "dataset" / "sft.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (workspace.path / "dataset" / "sample_heldout.jsonl").write_text("\n".join(rows[:8]), encoding="utf-8")
    (workspace.path / "tinyshakespeare").mkdir()
    (workspace.path / "tinyshakespeare" / "input.txt").write_text(TEXT, encoding="utf-8")
    ran = commands("README.md")
    assert ran[:3] == ["python data.py", "python train.py -t pretrain", "python train.py -t sft"]
    for command in ran:
        words = ["60" if word == "2000" else word for word in words_of(command)]  # fewer steps
        if words[0] == "plot_loss.py":  # the README's log has somebody else's date
            newest = sorted(workspace.path.glob("train_*.log"))[-1]
            words = [newest if word.endswith(".log") else word for word in words]
        result = workspace.run(*words, stdin="after B\n/reset\nafter C\n")
        assert "Traceback" not in result.stderr
    for name in ("pretrain_best.pt", "pretrain_last.pt", "sft_best.pt", "sft_last.pt"):
        assert workspace.load(name)["format"]


def test_both_readmes_give_the_same_commands():
    assert commands("README.md") == commands("README_zh.md")


def test_the_tests_that_the_docs_name_exist():
    known = [name for path in (REPO / "tests").glob("*.py")
             for name in [path.stem, *re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))]]
    for path in (REPO / "docs").glob("*.md"):
        for name, goes_on in re.findall(r"`(test_[a-z0-9_]+)(…?)", path.read_text(encoding="utf-8")):
            found = [test for test in known if test == name or goes_on and test.startswith(name)]
            assert found, f"{path.name}: {name}"


@pytest.mark.parametrize("name", READMES)
@pytest.mark.parametrize("cls, files", [(ModelConfig, ["model_config.json"]),
                                        (TrainConfig, ["config_pretrain.json", "config_sft.json"])])
def test_the_tables_of_settings_match_the_code_and_the_files(name, cls, files):
    text = (REPO / name).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", text, re.M)
    shipped = [json.loads((REPO / file).read_text()) for file in files]
    for f in fields(cls):
        default = f.default if isinstance(f.default, (int, float, str)) else f.default_factory()
        here = [json.dumps(values[f.name]) if f.name in values else "–" for values in shipped]
        found = [row for row in rows if row[0] == f.name and row[2] == json.dumps(default)]
        assert found, f"{name}: no row for {f.name} with the default {json.dumps(default)}"
        if f.name != "dataset_path":
            assert " / ".join(here) in [row[3] for row in found], f"{name}: {f.name} is shipped as {here}"


@pytest.mark.parametrize("name", READMES)
def test_every_file_that_a_readme_links_to_exists(name):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (REPO / name).read_text(encoding="utf-8")):
        assert (REPO / target).exists(), f"{name} links to {target}"
