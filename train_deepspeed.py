"""Training on several processes and machines: the loop of train.py under DeepSpeed's ZeRO.

    deepspeed train_deepspeed.py --deepspeed --deepspeed_config deepspeed_config.json
    deepspeed --num_gpus 4 train_deepspeed.py --deepspeed --deepspeed_config deepspeed_config.json -t sft
    deepspeed --hostfile=hostfile.txt train_deepspeed.py --deepspeed --deepspeed_config deepspeed_config.json

deepspeed_config.json sets the ZeRO stage and offloading; batch sizes, learning rate, clipping and precision
come from config_pretrain.json or config_sft.json and the flags of train.py. Checkpoints go to checkpoint/ds/,
one folder each, written by all processes (on several machines: to a file system that they share).
"""

import contextlib
import glob
import importlib.util
import logging
import math
import os
import re
import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace

import flags
from config import ROOT, find, read_json
from script import InputError, atomic_write, before_imports, replacing, sync_folder

LAUNCH = "deepspeed {}train_deepspeed.py --deepspeed --deepspeed_config deepspeed_config.json"


def add_flags(cli):
    group = cli.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="customary; DeepSpeed is always used")
    group.add_argument("--deepspeed_config", default=os.path.join(ROOT, "deepspeed_config.json"),
                       metavar="FILE", help="ZeRO stage and offloading")
    group.add_argument("--hostfile", metavar="FILE", help="goes before the script; here it is only checked")
    group.add_argument("--local_rank", type=int, help="from the launcher")


def command_line():
    args = flags.command_line(__doc__, add_flags)
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("DeepSpeed is not installed: pip install deepspeed, or use train_ddp.py")
    if "RANK" not in os.environ:
        raise InputError(f"start it with: {LAUNCH.format('')}")
    listed = count_slots(args.hostfile)
    started = int(os.environ["WORLD_SIZE"])
    if started < listed:
        raise InputError(f"{args.hostfile} lists {listed} processes, but {started} were started, since "
                         f"--hostfile is for the launcher: {LAUNCH.format(f'--hostfile={args.hostfile} ')}")
    args.zero = read_json(args.deepspeed_config)
    if args.train.from_checkpoint == "latest":
        args.train.from_checkpoint = "checkpoint/ds"
    return args


def count_slots(path):
    """The number of processes that a hostfile asks for; lines like `192.168.10.52 slots=2`."""
    if not path:
        return 0
    try:
        with open(path, encoding="utf-8") as f:
            return sum(map(int, re.findall(r"^\s*[^#\s]+\s+slots=(\d+)", f.read(), re.MULTILINE)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


if __name__ == "__main__":
    before_imports(command_line)

import psutil  # comes with DeepSpeed
import torch
import torch.distributed as dist

import checkpoint as ckpt
import device
import train
from optimizer import build_optimizer, set_lr
from run import DATED_NAME
from train_ddp import DataParallel, run_rank


class Zero(DataParallel):
    """Optimizer state, gradients and weights split over the processes (ZeRO; Rajbhandari et al. 2020).

    zero: the dict in deepspeed_config.json, and where it stands."""

    launch_command = LAUNCH.format("")
    saved_as = "checkpoint/ds/{}"

    def __init__(self, zero, where):
        super().__init__()
        self.zero, self.where = zero, where

    def init_process_group(self, backend, timeout):
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        import deepspeed  # here, where the kind of device is known

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Avoids a C++ build at the first start on a CPU: of a shared-memory all-reduce for inference.
        deepspeed.ops.__compatible_ops__ = {}
        super().init_process_group(backend, timeout)  # DeepSpeed's own does not pass device_id on
        deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
        self.deepspeed = deepspeed

    def setup(self, config, widths=1):
        refused = {"skip_nonfinite": config.skip_nonfinite, "compile": config.compile == "true",
                   "log_stats": config.log_stats}
        for name in (name for name, is_set in refused.items() if is_set):
            raise InputError(f"{name}: not under DeepSpeed, which takes the step itself; use train_ddp.py")
        super().setup(config, widths)
        self.compiles = False
        threading.Thread(target=leave_with_launcher, daemon=True).start()

    def wrap(self, model, optimizer):
        if self.config.optimizer == "muon":
            self.say("optimizer: muon needs whole matrices, which ZeRO splits, so adamw is used")
        groups = build_optimizer(model, replace(self.config, optimizer="adamw"))
        groups = groups.optimizers[0].param_groups
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        n_params = model.n_params()
        self.model = model
        self.fold = 1  # the engine counts micro-batches
        self.engine = self.deepspeed.initialize(model=model, optimizer=self.build_adamw(groups),
                                                config=self.engine_config())[0]
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name]  # RoPE's angles stay in float32 where the weights are in bfloat16
        model.n_params = lambda: n_params  # stage 3 leaves each process with empty parameters
        return self.engine

    def validated(self, trained):
        return self.engine  # which collects the weights that stage 3 splits

    def build_adamw(self, groups):
        """AdamW for whole parameters; DeepSpeed's for the CPU where deepspeed_config.json offloads to it."""
        zero = self.zero.get("zero_optimization", {})
        options = dict(lr=self.config.learning_rate, betas=(self.config.beta1, self.config.beta2))
        groups = [{key: group[key] for key in ("params", "weight_decay", "lr_factor") if key in group}
                  for group in groups]
        if zero.get("offload_optimizer") and self.zero.get("zero_force_ds_cpu_optimizer", True):
            from deepspeed.ops.adam import DeepSpeedCPUAdam
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        return torch.optim.AdamW(groups, fused=True, **options)

    def engine_config(self):
        """deepspeed_config.json with our settings in it. Raises InputError where it says something else."""
        c = self.config
        ours = {  # DeepSpeed's key: its value, and the setting of ours that it follows from
            "train_micro_batch_size_per_gpu": (c.batch_size, "batch_size"),
            "gradient_accumulation_steps": (self.accumulation, "gradient_accumulation_steps / processes"),
            "train_batch_size": (c.batch_size * c.gradient_accumulation_steps,
                                 "batch_size × gradient_accumulation_steps"),
            "gradient_clipping": (c.grad_clip, "grad_clip"),
            "bf16": (self.dtype is torch.bfloat16, "dtype"),
            "fp16": (self.dtype is torch.float16, "dtype"),
        }
        for key in ("optimizer", "scheduler"):
            if key in self.zero:
                raise InputError(f"{self.where}: {key} follows from the training settings (optimizer, "
                                 "learning_rate, lr_schedule, …); leave it out there")
        merged = {key: {"enabled": value} if "16" in key else value for key, (value, _) in ours.items()}
        for key, given in self.zero.items():
            value = given.get("enabled") if key in ("bf16", "fp16") else given
            if key in ours and value != ours[key][0]:
                raise InputError(f"{self.where}: {key} is {value}, but {ours[key][1]} in the training "
                                 f"settings makes it {ours[key][0]}; leave it out there")
            merged[key] = given
        zero = merged.get("zero_optimization", {})
        if zero.get("stage", 0):  # stage 0 sums gradients in the type of the weights and refuses another
            # Small gradients vanish when they are summed in bfloat16.
            merged.setdefault("data_types", {"grad_accum_dtype": "fp32"})
            if self.device.type == "cuda":
                merged["zero_optimization"] = {"overlap_comm": True, **zero}
        return merged

    def autocast(self):
        return contextlib.nullcontext()  # the engine keeps the weights themselves in the lower precision

    def micro_step(self, last):
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss):
        self.engine.backward(loss, scale_wrt_gas=False)  # the loop has divided it already

    def clip_gradients(self):
        """The engine computes the norm, and clips, in its step. Returns 0."""
        return torch.zeros((), device=self.device)

    def optimizer_step(self, lr, norm):
        """Returns the gradient norm; NaN, and no step taken, if it is not finite. An overflow under float16
        is 0, as in SingleProcess."""
        set_lr(self.engine.optimizer.param_groups, lr)
        norm = None
        if self.stage == 0 and self.dtype is torch.float32:  # DeepSpeed then neither keeps nor checks a norm
            norm = float(torch.nn.utils.get_total_norm(p.grad for p in self.model.parameters()))
            if not math.isfinite(norm):
                return math.nan
        self.engine.step()
        if getattr(self.engine.optimizer, "overflow", False):  # the norm was not finite: no step was taken
            return 0.0 if self.dtype is torch.float16 else math.nan
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def save(self, run, kind, content):
        """Write the folder checkpoint/ds/<task>_<date>_<time>_step_<n>, whole or not at all; then let the
        file `latest`, and the link <task>_<kind>, mean it."""
        folder = os.path.join(run.checkpoints, "ds")
        run.stamp = self.broadcast(run.stamp)  # only the first process has one
        tag = os.path.basename(run.path(f"step_{content['step']}")).removesuffix(".pt")
        state = {"nano": {**content, "rng": self.all_gather_rng()}, "zero_stage": self.stage}
        temporary = os.path.join(folder, tag + ".tmp")
        try:
            if not self.broadcast(os.path.exists(os.path.join(folder, tag))):
                if self.is_main:
                    remove_leftovers(folder)
                dist.barrier()
                self.engine.save_checkpoint(folder, tag + ".tmp", client_state=state, save_latest=False)
                if self.is_main:
                    publish(temporary, os.path.join(folder, tag))
            if self.is_main:
                update_links(folder, tag, run.fixed_name(kind), run, self.config.save_interval)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(f"{temporary}: could not be saved ({reason}); earlier ones are whole") from None
        dist.barrier()

    @property
    def stage(self):
        return self.engine.zero_optimization_stage()

    def load(self, state):
        path = find(self.config.from_checkpoint)
        if not os.path.isdir(path):
            raise InputError(f"{path}: not written by DeepSpeed, and its optimizer state cannot be split; "
                             "continue it with train.py or train_ddp.py")
        folder = ckpt.find_deepspeed(path)
        stage = ckpt.read_deepspeed(folder)[1]
        if len(state["rng"]) != self.world_size or stage != self.stage:
            raise InputError(
                f"{path}: written by {len(state['rng'])} processes at ZeRO stage {stage}, but now there are "
                f"{self.world_size} at stage {self.stage}; its parts fit that number and stage alone. The "
                "weights without the optimizer's state: python checkpoint.py checkpoint/ds OUTPUT.pt")
        with ckpt.deepspeed_weights_only():
            self.engine.load_checkpoint(*os.path.split(folder))
        device.set_rng_state(state["rng"][self.rank], self.device)

    def close(self):
        self.engine.destroy()
        self.engine = None
        super().close()


def remove_leftovers(folder):
    """Remove the unfinished folders and links of saves that were killed. One run at a time writes here."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.tmp")):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def publish(temporary, folder):
    """Give a folder that all processes have written its name, once it is on the disk."""
    for path in [os.path.join(temporary, name) for name in os.listdir(temporary)]:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    os.rename(temporary, folder)
    sync_folder(folder)


def update_links(folder, tag, fixed_name, run, save_interval):
    """Let the file `latest` and the symbolic link of `fixed_name` (or None) mean the folder `tag`; remove the
    folder that the link meant before, if this run has no other use for it."""
    with atomic_write(os.path.join(folder, "latest"), "w") as f:
        f.write(tag)
    if not fixed_name:
        return
    link = os.path.join(folder, fixed_name.removesuffix(".pt"))
    before = os.readlink(link) if os.path.islink(link) else ""
    with replacing(link) as temporary:
        os.symlink(tag, temporary)
    name = DATED_NAME.fullmatch(before)
    if name and before != tag and name["stamp"] == run.stamp and int(name["step"]) % save_interval:
        shutil.rmtree(os.path.join(folder, before))


def leave_with_launcher():
    """Ask this process to save and exit when a launcher above it is gone.

    `deepspeed` starts `deepspeed.launcher.launch`, which starts us; the first does not pass SIGTERM on."""
    def ancestors():
        parent = psutil.Process().ppid()
        return parent, psutil.Process(parent).ppid()

    try:
        before = ancestors()
        while ancestors() == before:
            time.sleep(1)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main():
    args = command_line()
    return train.train_and_close(args, Zero(args.zero, args.deepspeed_config))


if __name__ == "__main__":
    run_rank(main)
