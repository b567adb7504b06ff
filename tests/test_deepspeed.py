"""DeepSpeed in two real processes: every ZeRO stage trains as DDP does, resumes, converts and answers."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import deepspeed  # noqa: F401  (its import takes seconds and logs: once, before the tests)
import numpy as np
import pytest
import soak
import torch
from conftest import Workspace, exact, forks, free_port, wait_for

import checkpoint as ckpt
import inference
import train
from config import TrainConfig
from metrics import parse_log
from script import InputError
from train_deepspeed import Zero, count_slots
from verify_resume import differences

OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
STAGES = {"0": {"stage": 0}, "1": {"stage": 1}, "2": {"stage": 2},
          "3": {"stage": 3, "stage3_param_persistence_threshold": 0},
          "3_offload": {"stage": 3, "stage3_param_persistence_threshold": 0, **OFFLOAD}}

# Every stage in one launch, which spares the start of Python, torch and DeepSpeed: for each stage a training
# with a checkpoint after step 3, and another one that continues it; then DDP.
MANY = """
import glob, json, os, shutil, sys
import train, train_ddp, train_deepspeed

class DataParallel(train_ddp.DataParallel):  # the last one: its close() leaves the process group
    init_process_group = lambda self, backend, timeout: None

class Zero(train_deepspeed.Zero):
    def init_process_group(self, backend, timeout):
        if not train_ddp.dist.is_initialized():
            super().init_process_group(backend, timeout)
        import deepspeed
        self.deepspeed = deepspeed
    def close(self):
        self.engine.destroy()
        train_ddp.dist.barrier()

FLAGS = ["--optimizer", "adamw", "--dropout", "0.2", "--save_interval", "3"]

def run(make_strategy, *flags):
    sys.argv[1:] = [*FLAGS, *flags]
    assert train.train_and_close(train_deepspeed.command_line(), make_strategy()) == 0

def main():
    stages = json.loads(sys.argv[1])
    for name, stage in stages.items():
        zero = {"zero_optimization": stage, "zero_force_ds_cpu_optimizer": False}
        if os.environ["RANK"] == "0":  # what a save that was killed has left
            os.makedirs("checkpoint/ds/pretrain_20260101_120000_step_3.tmp/part.pt")
            os.symlink("pretrain_20260101_120000_step_3", "checkpoint/ds/pretrain_last.1234.tmp")
        for continued in (False, True):
            flags = []
            if continued:
                (folder,) = glob.glob("checkpoint/ds_" + name + "/*_step_3")
                flags = ["--from_checkpoint", folder]
            run(lambda: Zero(zero, "deepspeed_config.json"), *flags)
            train_ddp.dist.barrier()
            if os.environ["RANK"] == "0":
                os.rename("checkpoint/ds", "checkpoint/ds_" + name + "_continued" * continued)
            train_ddp.dist.barrier()
    run(DataParallel)

train_ddp.run_rank(main)
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("stages"))
    workspace.configure("config_pretrain.json", gradient_accumulation_steps=4, embedding_lr=2.0)
    (workspace.path / "many.py").write_text(MANY)
    ranks = workspace.start_ranks(2, "many.py", json.dumps(STAGES), server=forks("deepspeed"))
    assert [rank.wait(300) for rank in ranks] == [0, 0], workspace.output()
    logs = sorted(workspace.path.glob("train_*.log"))
    workspace.logs = dict(zip([name + end for name in STAGES for end in ("", "_continued")] + ["ddp"], logs,
                              strict=True))
    return workspace


def losses(path):
    return [[line.get("loss", line.get("val_loss")) for line in lines] for lines in parse_log(path)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_gives_the_losses_and_weights_of_ddp(stages, stage):
    expected, got = losses(stages.logs["ddp"]), losses(stages.logs[stage])
    assert len(got[0]) == 6 and len(got[1]) == 3
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, abs=2e-5)
    converted = ckpt.load(str(stages.path / "checkpoint" / f"ds_{stage}"))
    expected = stages.load("pretrain_last.pt")["model"]
    torch.testing.assert_close(converted["model"], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_resumes_bit_for_bit(stages, stage):
    straight, continued = (ckpt.load(str(stages.path / "checkpoint" / f"ds_{stage}{end}"))
                           for end in ("", "_continued"))
    assert losses(stages.logs[stage])[0][3:] == losses(stages.logs[f"{stage}_continued"])[0]
    assert not differences(exact(straight), exact(continued), stage)
    assert len(straight["rng"]) == 2 and straight["dataloader"]["rows"] == 6 * 4 * 4


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_converts_to_one_ordinary_file_that_answers(stages, stage, capsys):
    folder = stages.path / "checkpoint" / f"ds_{stage}"
    path = stages.path / "checkpoint" / f"ckpt_{stage}.pt"
    ckpt.save(str(path), ckpt.load(str(folder)))
    file = torch.load(path, weights_only=True)
    weights = file["model"]
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
    assert path.stat().st_size < 1.5 * 4 * sum(w.numel() for w in weights.values())
    model, tokenizer = ckpt.build_model(file)
    assert val_loss(model, stages) == pytest.approx(losses(stages.logs[stage])[1][-1], abs=1e-5)
    answers = []
    for source in (path, folder, folder / "pretrain_last"):
        capsys.readouterr()
        with stages.here("inference.py", "-m", source, "-p", "The letter", "-t", "0", "-l", "20"):
            inference.main()
        answers.append(capsys.readouterr().out)
    assert answers[0].strip("\n") and answers[0] == answers[1] == answers[2]


def val_loss(model, workspace):
    loader = train.DataLoader([str(workspace.path / "dataset" / "pretrain_val.npy")], "pretrain", 32, 4)
    batches = list(loader.fixed_batches(2))
    with torch.no_grad():
        return np.mean([float(model(torch.tensor(x), torch.tensor(y))[1]) for x, y in batches])


def test_a_folder_holds_whole_checkpoints_only(stages):
    folder = stages.path / "checkpoint" / "ds_2"
    (last,) = folder.glob("pretrain_*_step_6")
    assert (folder / "latest").read_text() == last.name == os.readlink(folder / "pretrain_best")
    assert len(list(folder.glob("pretrain_*_step_*"))) == 2  # the periodic one of step 3, and the last
    assert not list(folder.glob("*.tmp"))


def test_the_lines_of_the_reference_convert_and_answer_as_they_stand(stages):
    ds = stages.path / "checkpoint" / "ds"
    os.rename(stages.path / "checkpoint" / "ds_1", ds)
    try:
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        result = subprocess.run(
            "cd checkpoint/ds; python zero_to_fp32.py . ckpt_ds.pt; cd ../..; "
            "python inference_ds.py -p 'The letter' -t 0 -l 20", shell=True, cwd=stages.path,
            capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert result.returncode == 0 and (ds / "ckpt_ds.pt").exists(), result.stderr
        answer = result.stdout.splitlines()[-1]
        shutil.rmtree(ds / "ckpt_ds.pt") if (ds / "ckpt_ds.pt").is_dir() else (ds / "ckpt_ds.pt").unlink()
        words = ("-p", "The letter", "-t", "0", "-l", "20")
        assert stages.run("inference.py", "-m", "checkpoint/ds", *words).stdout.strip("\n") == answer
        stages.run("checkpoint.py", "checkpoint/ds", "checkpoint/ckpt_ds.pt")
        assert stages.load("ckpt_ds.pt")["step"] == 6
    finally:
        os.rename(ds, stages.path / "checkpoint" / "ds_1")


def test_train_py_refuses_to_continue_without_the_optimizer_but_starts_a_new_task(stages):
    line = stages.refused_training("--from_checkpoint", "checkpoint/ds_2", "--optimizer", "adamw")
    assert "train_deepspeed.py" in line
    result = stages.train("-t", "sft", "--from_checkpoint", "checkpoint/ds_2", "--max_steps", "3")
    assert result["step"] == 3


@pytest.mark.parametrize("is_folder", [False, True])
def test_converted_weights_are_used_unless_a_newer_checkpoint_has_been_saved(workspace, is_folder):
    ds = workspace.path / "checkpoint" / "ds"
    ds.mkdir()
    latest, converted = ds / "latest", ds / "ckpt_ds.pt"
    latest.write_text("pretrain_20260101_120000_step_6")
    program = "import inference_ds; print(inference_ds.model_path())"
    assert workspace.run("-c", program).stdout.strip() == str(ds)  # nothing was converted
    written = converted
    if is_folder:  # newer versions of DeepSpeed write one
        converted.mkdir()
        written = converted / "pytorch_model.bin"
    written.write_bytes(b"weights")
    os.utime(latest, (1e9, 1e9))
    result = workspace.run("-c", program)
    assert result.stdout.strip() == str(converted) and not result.stderr
    for path in (written, converted):
        os.utime(path, (1e9 - 60, 1e9 - 60))
    result = workspace.run("-c", program)
    assert result.stdout.strip() == str(ds)
    assert "pretrain_20260101_120000_step_6: ckpt_ds.pt is older; to convert again" in result.stderr


def test_without_deepspeed_its_scripts_say_so_in_one_line(workspace):
    """A machine without the package; where it is, None in sys.modules hides it."""
    program = "import runpy, sys; sys.modules['deepspeed'] = sys.modules['torch'] = None; " \
              "runpy.run_path('train_deepspeed.py', run_name='__main__')"
    for env in (None, alone(0)):
        said = workspace.run("-c", program, status=2, env=env).stderr
        assert said == "error: DeepSpeed is not installed: pip install deepspeed, or use train_ddp.py\n"


def test_without_its_launcher_the_command_is_told(workspace):
    said = workspace.run("train_deepspeed.py", status=2).stderr
    assert said == ("error: start it with: deepspeed train_deepspeed.py --deepspeed --deepspeed_config "
                    "deepspeed_config.json\n")


def test_a_run_killed_in_the_middle_of_its_saves_loses_nothing(workspace):
    found = soak.kill_deepspeed_and_continue(workspace, 3, random.Random(0))
    assert found["kills"] == 3 and found["in_a_save"] == 3


def alone(port):
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


def test_another_number_of_processes_is_explained(stages):
    (rank,) = stages.start_ranks(1, "train_deepspeed.py", "--from_checkpoint", "checkpoint/ds_2",
                                 "--optimizer", "adamw", server=forks("deepspeed"))
    assert rank.wait() == 2
    (line,) = [line for line in stages.output().splitlines() if "error:" in line]
    assert "written by 2 processes at ZeRO stage 2, but now there are 1 at stage 2" in line


def test_a_missing_latest_is_an_error(stages, tmp_path):
    with pytest.raises(InputError, match="`latest` is missing"):
        ckpt.load(str(tmp_path))
    (tmp_path / "latest").write_text("pretrain_1_step_5")
    with pytest.raises(InputError, match="pretrain_1_step_5, which holds no checkpoint"):
        ckpt.load(str(tmp_path))
    result = stages.run("train_deepspeed.py", "--from_checkpoint", "latest", status=2, env=alone(0))
    assert "checkpoint/ds" in result.stderr and not (stages.path / "checkpoint" / "ds").exists()


def test_a_missing_or_hostile_part_is_an_error_and_runs_nothing(stages, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (source,) = (stages.path / "checkpoint" / "ds_2").glob("*_step_6")
    folder = tmp_path / "part"
    folder.mkdir()
    for path in source.iterdir():
        os.link(path, folder / path.name)
    (shard,) = folder.glob("zero_pp_rank_1_*optim_states.pt")
    shard.unlink()
    with pytest.raises(InputError, match="cannot be put together"):
        ckpt.load(str(folder))
    torch.save({"optimizer_state_dict": Hostile()}, shard)
    with pytest.raises(InputError, match="cannot be put together"):
        ckpt.load(str(folder))
    (states,) = folder.glob("*_model_states.pt")
    states.unlink()
    torch.save({"nano": Hostile()}, states)
    with pytest.raises(InputError, match="cannot be loaded safely"):
        ckpt.load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def rank_zero_of_two(monkeypatch):
    for name, value in {**alone(0), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("zero", "words"), [
    ({"train_batch_size": 7}, "batch_size is 7, but batch_size × gradient_accumulation_steps .* it 400"),
    ({"gradient_clipping": 0.5}, "grad_clip"), ({"bf16": {"enabled": True}}, "dtype"),
    ({"gradient_accumulation_steps": 4}, "makes it 2"),
    ({"optimizer": {"type": "AdamW"}}, "optimizer follows"),
])
def test_a_contradiction_with_the_training_settings_is_an_error(rank_zero_of_two, zero, words):
    strategy = Zero(zero, "deepspeed_config.json")
    strategy.config, strategy.dtype = TrainConfig(), torch.float32
    with pytest.raises(InputError, match=f"deepspeed_config.json: .*{words}"):
        strategy.engine_config()


def test_the_engine_gets_our_settings(rank_zero_of_two):
    strategy = Zero({"train_batch_size": 400, "zero_optimization": {"stage": 3}}, "deepspeed_config.json")
    strategy.config, strategy.dtype = TrainConfig(grad_clip=0.7), torch.float16
    strategy.device = torch.device("cpu")
    assert strategy.engine_config() == {
        "train_micro_batch_size_per_gpu": 100, "gradient_accumulation_steps": 2, "train_batch_size": 400,
        "gradient_clipping": 0.7, "bf16": {"enabled": False}, "fp16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 3}}
    strategy.device = torch.device("cuda")
    assert strategy.engine_config()["zero_optimization"] == {"stage": 3, "overlap_comm": True}


def test_a_hostfile_after_the_script_is_answered_with_the_command(workspace):
    (workspace.path / "hostfile.txt").write_text("# two machines\n10.0.0.1 slots=2\n10.0.0.2 slots=2\n")
    assert count_slots(workspace.path / "hostfile.txt") == 4
    result = workspace.run("train_deepspeed.py", "--deepspeed", "--hostfile=hostfile.txt", status=2,
                           env={**alone(0), "WORLD_SIZE": "2"})
    assert "lists 4 processes, but 2 were started" in result.stderr
    assert "deepspeed --hostfile=hostfile.txt train_deepspeed.py --deepspeed" in result.stderr


def test_workers_save_and_leave_when_the_launcher_is_stopped(workspace):
    (workspace.path / "here.txt").write_text("localhost slots=2\n")
    launch = subprocess.Popen(
        [os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--hostfile=here.txt", "--no_ssh",
         "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
         "train_deepspeed.py", "--deepspeed", "--deepspeed_config", "deepspeed_config.json",
         "--max_steps", "100000", "--eval_interval", "100000"],
        cwd=workspace.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    logs = lambda: list(workspace.path.glob("train_2*.log"))  # noqa: E731
    wait_for(lambda: logs() and len(parse_log(logs()[0])[0]) > 2, launch, 90)
    launch.send_signal(signal.SIGTERM)
    output = launch.communicate(timeout=60)[0]  # ends when the workers, which hold the pipe, have ended
    saved, lines = ckpt.load(str(workspace.path / "checkpoint" / "ds")), parse_log(logs()[0])[0]
    assert saved["step"] == lines[-1]["step"] >= 3, output
