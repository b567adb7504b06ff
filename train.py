"""Pretraining and supervised fine-tuning in one process. This file holds the project's only training loop.

    python train.py -t pretrain
    python train.py -t sft
    python train.py -t pretrain --max_steps 500 --learning_rate 1e-3      any setting, over the JSON files
    python train.py -t pretrain --from_checkpoint checkpoint/pretrain_last.pt      continue
    python train.py -t sft --from_checkpoint latest
    python train.py -t pretrain --verify_resume      is a run that is cut and continued the same, bit for bit?

Settings come from config_pretrain.json or config_sft.json and model_config.json. Checkpoints go to
checkpoint/, the log to train_<date>_<time>.log. Ctrl-C finishes the step, saves and exits.
"""

import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, replace

from config import IGNORE, ROOT, InputError, TrainConfig, before_imports, command_line, run_script


def add_flags(cli):
    cli.add_argument("--verify_resume", action="store_true",
                     help="show that a run which is cut and continued equals one that is not, and exit")


if __name__ == "__main__":
    before_imports(lambda: command_line(__doc__, add_flags))

import numpy as np
import torch
from tqdm import tqdm

import checkpoint as ckpt
from dataloader import DataLoader
from device import DTYPES, pick_device, pick_dtype, rng_state, set_rng_state, set_sdp_kernel
from metrics import Log, train_line, val_line
from model import GPT, documents_of
from optimizer import build_optimizer, learning_rate
from tokenizer import Tokenizer

CHECKPOINTS = os.path.join(ROOT, "checkpoint")


class SingleProcess:
    """How one process trains. DDP and DeepSpeed differ from it in these verbs and facts alone."""

    rank, local_rank, world_size, is_main = 0, 0, 1, True
    saved_as = "checkpoint/{}.pt"

    def setup(self, config: TrainConfig):
        self.config = config
        self.device = pick_device(config.device, self.local_rank)
        self.dtype = pick_dtype(config.dtype, self.device, self.say)
        set_sdp_kernel(config.sdp_kernel)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def say(self, text):
        if self.is_main:
            tqdm.write(text)

    def wrap(self, model, optimizer):
        """Take the model (already on the device) and its optimizer; return what the loop calls."""
        self.model, self.optimizer = model, optimizer
        if self.config.compile:
            model.compile(dynamic=False)  # in place: parameter names stay as they are
        return model

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def to_device(self, batch):
        """numpy int64 → tensor on the device, without waiting for the copy where that is possible."""
        tensor = torch.from_numpy(np.ascontiguousarray(batch))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def micro_step(self, last):
        """A context for the forward and backward pass of one micro-step; before the `last` one of a step,
        processes need not exchange gradients."""
        return contextlib.nullcontext()

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, lr):
        """Clip, step, clear the gradients. Returns the gradient norm; if it is not finite, no step is taken.

        Under float16 an overflow only means that the loss scale is too high: the scaler lowers it, norm 0."""
        self.optimizer.set_lr(lr)
        for optimizer in self.optimizer.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.config.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if math.isfinite(norm):
            for optimizer in self.optimizer.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm if math.isfinite(norm) or not self.scaler.is_enabled() else 0.0

    def skip_step(self):
        """Clear the gradients of a loss that is not finite. Returns NaN in the place of their norm."""
        self.model.zero_grad()
        return math.nan

    def sum_over_ranks(self, *values):
        """The sums of some numbers over all processes; of true and false, whether one is true."""
        return values

    def state(self):
        """What a checkpoint needs of model, optimizer and random state."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "rng": [rng_state(self.device)]}

    def load(self, state):
        """Undo `state`, but for the model's weights, which are there before it is wrapped."""
        if state["optimizer"] is None:
            raise InputError(f"{self.config.from_checkpoint}: was written by DeepSpeed, and the state of its "
                             "optimizer can be continued by train_deepspeed.py alone")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == self.world_size:
            set_rng_state(state["rng"][self.rank], self.device)
        else:  # another number of processes: dropout cannot go on as it was
            torch.manual_seed(self.config.random_seed + 1000 * self.rank + 1)

    def save(self, path, checkpoint, fixed_name=None):
        """Write the loop's part of a checkpoint and this `state` to `path`, and let `fixed_name` mean it."""
        ckpt.save(path, {**checkpoint, **self.state()})
        if fixed_name:
            ckpt.alias(path, fixed_name)

    def close(self):
        pass


class StopRequest:
    """SIGINT or SIGTERM, noted for the loop to finish its step; a second one ends the process at once."""

    def __enter__(self):
        self.signum, self.since = 0, 0.0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, signum, frame):
        if self.signum and time.monotonic() - self.since < 1:
            return  # a launcher passes on what the terminal has sent already
        if self.signum:
            os._exit(128 + signum)
        self.signum, self.since = signum, time.monotonic()
        print("\nfinishing this step, then saving; once more to exit at once", file=sys.stderr, flush=True)

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def batch_loss(model, strategy, config, tokenizer, x, y):
    """The mean loss of one micro-batch x, y (B, T), a scalar tensor."""
    x, y = strategy.to_device(x), strategy.to_device(y)
    documents = documents_of(x, tokenizer.bos_id, tokenizer.eos_id) if config.document_mask else None
    with strategy.autocast():
        return model(x, y, documents=documents)[1]


@torch.no_grad()
def validation_loss(model, loader, strategy, config, tokenizer):
    """Loss averaged over the tokens of a fixed set of batches, the same at every call and on every rank."""
    model.eval()
    total = tokens = 0
    for x, y in loader.fixed_batches(config.eval_iters):
        n = int((y != IGNORE).sum())
        total += float(batch_loss(model, strategy, config, tokenizer, x, y)) * n
        tokens += n
    model.train()
    total, tokens = strategy.sum_over_ranks(total, tokens)
    return total / max(1, tokens)


def fit(model, tokenizer, loader, val_loader, config, strategy, task, start=None):
    """Train until max_steps, max_minutes or a signal; the loop of every task and every way to run.

    model: a GPT on the strategy's device. loader, val_loader: DataLoaders or alike. start: a checkpoint to
    continue exactly, or None. Returns a dict: step, val_loss, best_val_loss, tokens, seconds, signal, log."""
    raw_model, accumulation = model, config.gradient_accumulation_steps // strategy.world_size
    model = strategy.wrap(model, build_optimizer(model, config))
    step, best_val_loss, val_loss, tokens, skipped = 0, math.inf, None, 0, 0
    losses = []  # of the steps since the last log line
    torch.manual_seed(config.random_seed + 1000 * strategy.rank + 1)  # dropout: another one on each rank
    if start:
        strategy.load(start)
        loader.load_state_dict(start["dataloader"])
        step, best_val_loss, tokens = start["step"], start["best_val_loss"], start["dataloader"]["tokens"]
        losses, skipped = list(start["dataloader"].get("losses", [])), start["dataloader"].get("skipped", 0)

    def save(name, fixed_name=None):
        path = os.path.join(CHECKPOINTS, f"{task}_{log.stamp}_{name}.pt")
        strategy.save(path, {
            "format": ckpt.FORMAT, "task": task, "step": step, "best_val_loss": best_val_loss,
            "model_config": asdict(raw_model.config), "train_config": asdict(config),
            "tokenizer_config": tokenizer.to_dict(),
            "dataloader": {**loader.state_dict(), "tokens": tokens, "losses": losses, "skipped": skipped},
        }, f"{task}_{fixed_name}.pt" if fixed_name else None)

    model.train()
    began = clock = time.perf_counter()
    steps_since, tokens_since, seconds = 0, 0, 0.0  # since the last log line of this run
    with Log(os.path.dirname(CHECKPOINTS), enabled=strategy.is_main) as log, StopRequest() as stop, tqdm(
            total=config.max_steps or None, initial=step, desc=task, unit="step", dynamic_ncols=True,
            disable=not strategy.is_main, mininterval=0.2 if sys.stderr.isatty() else 15) as bar:
        while True:
            # All processes leave at the same step, whichever of them was told to.
            elapsed = time.perf_counter() - began
            late = bool(config.max_minutes) and elapsed + seconds > 60 * config.max_minutes
            signalled, late = strategy.sum_over_ranks(stop.signum > 0, late)
            last_step = signalled or late or (config.max_steps and step >= config.max_steps)

            # A run cut short must leave no trace when it is continued: it is not validated where it was cut.
            if not (signalled or late) and (step % config.eval_interval == 0 or last_step):
                val_loss = validation_loss(model, val_loader, strategy, config, tokenizer)
                improved, best_val_loss = val_loss < best_val_loss, min(val_loss, best_val_loss)
                log.write(val_line(step, val_loss, best_val_loss, tokens, elapsed))
                strategy.say(f"step {step}: validation loss {val_loss:.4f}, best {best_val_loss:.4f}")
                if improved and step:
                    save("best", fixed_name="best")
                clock = time.perf_counter()
            if step % config.save_interval == 0 and step and not last_step:
                save(f"step_{step}")
            if last_step:
                save("last", fixed_name="last")
                break

            lr = learning_rate(step, config)
            batches = [loader.next_batch() for _ in range(accumulation)]
            counts = [int((y != IGNORE).sum()) for _, y in batches]
            n_counted, n_read = strategy.sum_over_ranks(sum(counts), sum(x.size for x, _ in batches))
            loss = 0.0
            for i, ((x, y), n) in enumerate(zip(batches, counts, strict=True)):
                # The mean over the tokens of all micro-batches and processes, whose gradients are averaged.
                share = n * strategy.world_size / max(1, n_counted)
                with strategy.micro_step(last=i == accumulation - 1):
                    micro_loss = share * batch_loss(model, strategy, config, tokenizer, x, y)
                    strategy.backward(micro_loss)
                loss += micro_loss.detach()
            (loss,) = strategy.sum_over_ranks(float(loss) / strategy.world_size)
            norm = strategy.step(lr) if math.isfinite(loss) else strategy.skip_step()
            if math.isfinite(norm):
                losses.append(loss)
            else:
                skipped += 1
                refuse_nonfinite(step, batches, loss, norm, skipped, config, strategy)

            step, tokens, steps_since = step + 1, tokens + n_read, steps_since + 1
            tokens_since += n_read
            if step % config.log_interval == 0:
                now = time.perf_counter()
                seconds, rate = (now - clock) / steps_since, tokens_since / (now - clock)
                flops = rate * raw_model.flops_per_token(batches[0][0].shape[1])
                mean = sum(losses) / len(losses) if losses else math.nan
                log.write(train_line(loader.epoch, step, mean, lr, seconds, rate, flops, tokens, now - began))
                bar.set_postfix_str(f"loss {mean:.3f}, lr {lr:.1e}, {rate:,.0f} tokens/s, "
                                    f"{flops / 1e12:.3f} TFLOPS", refresh=False)
                clock, steps_since, tokens_since, losses = now, 0, 0, []
            bar.update()
    return {"task": task, "step": step, "val_loss": val_loss, "best_val_loss": best_val_loss,
            "tokens": tokens, "seconds": round(time.perf_counter() - began, 1), "log": log.name,
            "signal": int(stop.signum or (signal.SIGTERM if signalled else 0))}


def refuse_nonfinite(step, batches, loss, norm, skipped, config, strategy):
    """No step was taken for this batch: write it down, and stop unless skip_nonfinite allows one more."""
    path = os.path.join(CHECKPOINTS, f"nonfinite_step_{step}_rank_{strategy.rank}.npz")
    arrays = {f"{name}_{i}": array for i, batch in enumerate(batches)
              for name, array in zip("xy", batch, strict=True)}
    with contextlib.suppress(OSError):
        os.makedirs(CHECKPOINTS, exist_ok=True)
        np.savez(path, **arrays)
    what = f"step {step}: loss {loss:g}, gradient norm {norm:g}; no step taken, batch written to {path}"
    if skipped > config.skip_nonfinite:
        raise InputError(f"{what}; continue from the last checkpoint with a lower learning_rate, or set "
                         "skip_nonfinite")
    strategy.say(what)


def starting_point(args, strategy):
    """The checkpoint to start from (or None), and whether training continues it exactly."""
    path = args.train.from_checkpoint
    if not path:
        return None, False
    if path == "latest":
        path, start = ckpt.latest(args.task, CHECKPOINTS, strategy.say)
    else:
        path, start = ckpt.find(path), ckpt.load(path)
    for name, value in args.model_flags.items():
        if name != "dropout" and start["model_config"].get(name, value) != value:
            raise InputError(f"--{name} {value}: {path} has {start['model_config'][name]}, and a model's "
                             "shape cannot change")
    resume = start["task"] == args.task
    for name, before in (("optimizer", args.train.optimizer), ("embedding_lr", 1.0)):
        now, then = getattr(args.train, name), start["train_config"].get(name, before)
        if resume and now != then:
            raise InputError(f"{name} {now}: {path} was trained with {then}, and holds the optimizer's "
                             f"state; set --{name} {then}")
    strategy.say(f"{'continuing' if resume else 'weights from'} {path} (step {start['step']})")
    return start, resume


def train(args, strategy):
    """Set up model, data and strategy from the parsed command line and train. Returns fit()'s dict."""
    config = args.train
    strategy.setup(config)
    if not config.dataset_path:
        raise InputError(f'{args.train_config}: dataset_path is not set; give [["train.npy", "val.npy"]]')
    if config.gradient_accumulation_steps % strategy.world_size:
        raise InputError(f"gradient_accumulation_steps {config.gradient_accumulation_steps} is for all "
                         f"processes together and must be a multiple of their number, {strategy.world_size}")
    paths = [[os.path.join(ROOT, path) for path in pair] for pair in config.dataset_path]
    tokenizer = Tokenizer.load(os.path.join(os.path.dirname(paths[0][0]), "tokenizer.json"))

    start, resume = starting_point(args, strategy)
    torch.manual_seed(config.random_seed)
    if start:
        model, own_tokenizer = ckpt.build_model(start, config.from_checkpoint, dropout=config.dropout)
        if own_tokenizer.to_dict() != tokenizer.to_dict():
            raise InputError(
                f"{paths[0][0]}: prepared with another vocabulary than {config.from_checkpoint}; run python "
                f"checkpoint.py {config.from_checkpoint} tokenizer.json, then data.py --tokenizer that file")
    else:
        args.model.vocab_size, args.model.dropout = tokenizer.vocab_size, config.dropout
        model = GPT(args.model)
    model.to(strategy.device)

    shared = dict(task=args.task, block_size=model.config.block_size, batch_size=config.batch_size,
                  seed=config.random_seed, rank=strategy.rank, world_size=strategy.world_size,
                  vocab_size=tokenizer.vocab_size)
    loader = DataLoader([pair[0] for pair in paths], **shared)
    val_loader = DataLoader([pair[1] for pair in paths], **shared)
    loader.require_full_batches()
    if strategy.is_main:
        ckpt.prepare_folder(CHECKPOINTS)
    c = model.config
    strategy.say(f"{args.task}: {model.n_params() / 1e6:.2f} M parameters ({c.n_layer} layers, {c.n_embd} "
                 f"wide, vocabulary {c.vocab_size}), {strategy.world_size} × {strategy.device}, "
                 f"{next(name for name, dtype in DTYPES.items() if dtype is strategy.dtype)}; "
                 f"{loader.batches_per_epoch / config.gradient_accumulation_steps:.1f} steps an epoch")
    result = fit(model, tokenizer, loader, val_loader, config, strategy, args.task, start if resume else None)
    strategy.say(f"{result['step']} steps in {result['seconds']:.0f} s, best validation loss "
                 f"{result['best_val_loss']:.4f}; {strategy.saved_as.format(args.task + '_best')}, "
                 f"{strategy.saved_as.format(args.task + '_last')}, {result['log']}")
    return result


def train_and_close(args, strategy):
    """Train, and take leave of the other processes. Returns the exit status."""
    result = train(args, strategy)
    strategy.close()  # here, where the loop's hold on the model has ended
    return 128 + result["signal"] if result["signal"] else 0


class CutAt(SingleProcess):
    """A process to which Ctrl-C comes in the middle of step `cut`."""

    def __init__(self, cut):
        self.steps_left = cut

    def step(self, lr):
        self.steps_left -= 1
        if self.steps_left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().step(lr)


def differences(a, b, name):
    """Names of the values in which two checkpoints differ in a single bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True))
                for found in differences(*pair, f"{name}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [name]


def verify_resume(args, steps=6, cut=3):
    """Train `steps` steps; train again, cut after `cut`, and continue; compare all that was saved.

    Works in a folder of its own, which is removed. Returns the exit status, 1 if anything differs."""
    global CHECKPOINTS
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # else CUDA adds up in an order left to chance
    schedule_end = args.train.lr_decay_iters or args.train.max_steps
    args.train = replace(args.train, max_steps=steps, max_minutes=0.0, from_checkpoint="",
                         lr_decay_iters=schedule_end)
    with tempfile.TemporaryDirectory() as folder:
        saved = []
        for run_name, strategy, start in (("whole", SingleProcess(), ""), ("cut", CutAt(cut), ""),
                                          ("cut", SingleProcess(), f"{args.task}_last.pt")):
            CHECKPOINTS = os.path.join(folder, run_name, "checkpoint")
            os.makedirs(CHECKPOINTS, exist_ok=True)
            args.train.from_checkpoint = start and os.path.join(CHECKPOINTS, start)
            train(args, strategy)
            saved.append(ckpt.load(os.path.join(CHECKPOINTS, f"{args.task}_last.pt")))
    whole, _, continued = saved
    whole["train_config"] = continued["train_config"]  # which checkpoint it started from, in a folder removed
    found = differences(whole, continued, "checkpoint")
    print(f"{steps} steps, and {cut} + {steps - cut}: " + (
        f"different in {len(found)} values, {', '.join(found[:5])}" if found else
        "the same weights, optimizer, data position, random state and losses, bit for bit"))
    print(json.dumps({"steps": steps, "cut_after": cut, "identical": not found, "different": found}))
    return 1 if found else 0


def main():
    args = command_line(__doc__, add_flags)
    return verify_resume(args) if args.verify_resume else train_and_close(args, SingleProcess())


if __name__ == "__main__":
    run_script(main)
