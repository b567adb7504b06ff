"""Pretraining and supervised fine-tuning in one process. This file holds the project's only training loop.

    python train.py -t pretrain
    python train.py -t sft
    python train.py -t pretrain --max_steps 500 --learning_rate 1e-3      any setting, over the JSON files
    python train.py -t pretrain --from_checkpoint checkpoint/pretrain_last.pt      continue
    python train.py -t sft --from_checkpoint latest
    python train.py -t pretrain --verify_resume      does a run that is cut and continued give the same bits?

Settings come from config_pretrain.json or config_sft.json and model_config.json. Checkpoints go to
checkpoint/, the log to train_<date>_<time>.log. Ctrl-C finishes the step, saves and exits.
"""

import contextlib
import math
import os
import signal
import time
from dataclasses import asdict

from config import IGNORE_INDEX
from flags import command_line
from script import InputError, before_imports, guarded_output, run_script


def add_flags(cli):
    cli.add_argument("--verify_resume", action="store_true",
                     help="show that a run which is cut and continued equals one that is not, and exit")


if __name__ == "__main__":
    before_imports(lambda: command_line(__doc__, add_flags))

import numpy as np
import torch

import checkpoint as ckpt
from dataloader import DataLoader
from metrics import Speed
from model import batch_loss
from optimizer import build_optimizer, learning_rate
from run import build_run
from stats import LayerStats
from strategy import WIDTHS, SingleProcess, load_step, shrink_passes
from tokenizer import Tokenizer
from verify_resume import verify_resume


@torch.no_grad()
def validation_loss(model, loader, strategy, config, tokenizer, n_batches=None):
    """Loss averaged over the tokens of a fixed set of batches, the same at every call and on every rank.

    n_batches: about how many (default: config.eval_iters)."""
    model.eval()
    total = 0.0
    tokens = 0
    for x, y in loader.fixed_batches(n_batches or config.eval_iters):
        n = int((y != IGNORE_INDEX).sum())
        with strategy.autocast():
            loss = batch_loss(model, strategy.to_device(x), strategy.to_device(y), config.document_mask,
                              tokenizer.bos_id, tokenizer.eos_id)
        total += float(loss) * n
        tokens += n
    model.train()
    total, tokens = strategy.all_reduce(total, tokens)
    return total / max(1, tokens)


def accumulate_gradients(model, data, n_loss_tokens, strategy, config, tokenizer):
    """Forward and backward pass of each micro-batch of a step. Returns the loss, a scalar tensor.

    The loss is the mean over the n_loss_tokens tokens of all micro-batches and processes. Each micro-batch's
    mean is weighted with its share of them, times the number of processes, since DDP averages gradients."""
    loss = 0.0
    for i, ((x, y), n) in enumerate(zip(data.passes, data.n_loss_tokens, strict=True)):
        share = n * strategy.world_size / max(1, n_loss_tokens)
        with strategy.micro_step(last=i == len(data.passes) - 1):
            with strategy.autocast():
                micro_loss = share * batch_loss(model, x, y, config.document_mask, tokenizer.bos_id,
                                                tokenizer.eos_id)
            strategy.backward(micro_loss)
        loss += micro_loss.detach()
    return loss / strategy.world_size


def fit(model, tokenizer, loader, val_loader, config, strategy, run):
    """Train until max_steps, max_minutes or a signal; the loop of every task and every way to run.

    model: a GPT on the strategy's device. loader, val_loader: DataLoaders or alike. run: a Run; it is opened
    here. Returns a dict: task, step, val_loss, best_val_loss, tokens, seconds, saved, log, signal."""
    # What the loop works with, and where it stands: at the beginning, or where a checkpoint was saved.
    optimizer = build_optimizer(model, config, strategy.fast_bfloat16, strategy.rank, strategy.world_size)
    trained = strategy.wrap(model, optimizer)  # compiled or distributed; `model` shares its weights
    torch.manual_seed(config.random_seed + 1000 * strategy.rank + 1)  # dropout: another one on each rank
    step = 0
    tokens = 0  # read so far, by all processes
    skipped = 0  # steps whose gradient was not finite
    losses = []  # of the steps since the last log line
    before = 0.0  # seconds that the run has taken until it was cut
    saved = set()  # kinds of checkpoints
    val_loss = None
    best_val_loss = math.inf
    if run.start:
        strategy.load(run.start)
        loader.load_state_dict(run.start["dataloader"])
        step = run.start["step"]
        best_val_loss = run.start["best_val_loss"]
        tokens = run.start["dataloader"]["tokens"]
        losses = list(run.start["dataloader"].get("losses", []))
        skipped = run.start["dataloader"].get("skipped", 0)
        before = run.start["dataloader"].get("seconds", 0.0)
        run.start = None  # its tensors are copied: free them
    data = load_step(loader, strategy, model.config.block_size)  # always one step ahead

    def save(kind):
        # The position is that before `data` was read, so that a continued run reads it again.
        strategy.save(run, kind, {
            "format": ckpt.FORMAT, "task": run.task, "step": step, "best_val_loss": best_val_loss,
            "model_config": asdict(model.config), "train_config": asdict(config),
            "tokenizer_config": tokenizer.to_dict(),
            "dataloader": {**data.position, "tokens": tokens, "losses": losses, "skipped": skipped,
                           "seconds": before + elapsed, "stamp": run.stamp},
        })
        saved.add(kind)

    trained.train()
    began = time.perf_counter()
    speed = Speed()
    follows_clock = config.decay_lr and not (config.lr_decay_iters or config.max_steps)
    with run, run.progress(config.max_steps, step) as bar:
        stats = LayerStats(model, config.log_stats, run.stats_path())
        while True:
            # Stop here? All processes leave at the same step, whichever of them was asked to. The token
            # counts travel in the same message, and the first process's clock, to which the others add 0.
            paused = time.perf_counter()
            elapsed = paused - began
            used = before + elapsed if follows_clock else elapsed
            late = 0 < 60 * config.max_minutes < used + speed.shortest_step  # would a step end too late?
            clock = before + elapsed if strategy.is_main else 0.0
            stopped, late, n_loss_tokens, n_tokens, clock = strategy.all_reduce(
                run.stop.signum > 0, late, sum(data.n_loss_tokens), data.n_tokens, clock)
            is_last = stopped or late or 0 < config.max_steps <= step

            # Validate and save. A run that is cut must leave no trace when it is continued, so it is not
            # validated where it was cut.
            is_cut = stopped or (late and not follows_clock)
            if not is_cut and (step % config.eval_interval == 0 or is_last):
                val_loss = validation_loss(strategy.validated(trained), val_loader, strategy, config,
                                           tokenizer)
                improved = val_loss < best_val_loss  # never true of NaN
                best_val_loss = val_loss if improved else best_val_loss
                run.log.validation(step=step, val_loss=val_loss, best_val_loss=best_val_loss, tokens=tokens,
                                   elapsed=elapsed)
                run.say(f"step {step}: validation loss {val_loss:.4f}, best {best_val_loss:.4f}")
                if improved and step:  # at step 0 nothing has been learnt
                    save("best")
            if step % config.save_interval == 0 and step and not is_last:
                save(f"step_{step}")
            if is_last:
                save("last")
                break
            speed.exclude(time.perf_counter() - paused)

            # Forward and backward. The device is still at work when the next batches are read; only then
            # is it waited for.
            lr = learning_rate(step, config, clock)
            loss = None
            while loss is None:
                with contextlib.suppress(torch.OutOfMemoryError):
                    loss = accumulate_gradients(trained, data, n_loss_tokens, strategy, config, tokenizer)
                if loss is None:  # the error is gone, and what it held of the device's memory
                    data = shrink_passes(data, strategy)
                    trained = strategy.compiled()
            norm = strategy.clip_gradients()
            done = data
            data = load_step(loader, strategy, model.config.block_size)  # while the device works
            loss, norm = strategy.read(loss, norm)

            # Step, unless a number is not finite: then no weight has changed, and the batch is kept.
            stats.before_step(step)
            norm = strategy.optimizer_step(lr, norm) if math.isfinite(loss) else strategy.skip_step()
            stats.after_step(step, done.passes[0][0])
            if math.isfinite(norm):
                losses.append(loss)
            else:
                skipped += 1
                refuse_nonfinite(step, done.passes, loss, norm, skipped, config, strategy, run)

            # Log.
            step += 1
            tokens += n_tokens
            speed.count(n_tokens)
            if step % config.log_interval == 0:
                speed.read()
                flops = speed.tokens_per_second * model.flops_per_token(done.passes[0][0].size(1))
                mean_loss = sum(losses) / len(losses) if losses else math.nan
                if config.max_minutes:  # the time left, in steps
                    left = max(0.0, 60 * config.max_minutes - used) / speed.seconds_per_step
                    bar.total = min(config.max_steps or math.inf, step + math.ceil(left))
                run.log.training(epoch=data.epoch, step=step, loss=mean_loss, lr=lr,
                                 seconds=speed.seconds_per_step, tokens_per_second=speed.tokens_per_second,
                                 flops_per_second=flops, tokens=tokens,
                                 elapsed=time.perf_counter() - began, norm=norm)
                bar.set_postfix_str(f"loss {mean_loss:.3f}, lr {lr:.1e}, {speed.tokens_per_second:,.0f} "
                                    f"tokens/s, {flops / 1e12:.3f} TFLOPS", refresh=False)
                losses = []
            bar.update()
    stats.close()
    return {"task": run.task, "step": step, "val_loss": val_loss, "best_val_loss": best_val_loss,
            "tokens": tokens, "seconds": round(time.perf_counter() - began, 1),
            "saved": [kind for kind in ("best", "last") if kind in saved], "log": run.log.name,
            "signal": int(run.stop.signum or (signal.SIGTERM if stopped else 0))}


def refuse_nonfinite(step, batches, loss, norm, skipped, config, strategy, run):
    """No step was taken for these batches: write them down, and stop unless skip_nonfinite allows more."""
    what = f"step {step}: loss {loss:g}, gradient norm {norm:g}; no step taken"
    if run.folder is not None:
        path = os.path.join(run.checkpoints, f"nonfinite_step_{step}_rank_{strategy.rank}.npz")
        arrays = {f"{name}_{i}": tensor.cpu().numpy() for i, batch in enumerate(batches)
                  for name, tensor in zip("xy", batch, strict=True)}
        with contextlib.suppress(OSError):
            os.makedirs(run.checkpoints, exist_ok=True)
            np.savez(path, **arrays)
        what += f", batch written to {path}"
    if skipped > config.skip_nonfinite:
        raise InputError(f"{what}; continue from the last checkpoint with a lower learning_rate, or set "
                         "skip_nonfinite")
    run.say(what)


def setup_training(args, strategy):
    """Model, data and run from the parsed command line. Returns build_run's Setup."""
    config = args.train
    strategy.setup(config, WIDTHS if args.task == "sft" else 1)
    if config.gradient_accumulation_steps % strategy.world_size:
        raise InputError(f"gradient_accumulation_steps {config.gradient_accumulation_steps} is for all "
                         f"processes together and must be a multiple of their number, {strategy.world_size}")
    paths = [[os.path.join(args.root, path) for path in pair] for pair in config.dataset_path]
    tokenizer = Tokenizer.load(os.path.join(os.path.dirname(paths[0][0]), "tokenizer.json"))

    def make_loaders(model_config, start):
        shared = dict(task=args.task, block_size=model_config.block_size, batch_size=config.batch_size,
                      seed=config.random_seed, rank=strategy.rank, world_size=strategy.world_size,
                      tokenizer=tokenizer)
        loader = DataLoader([pair[0] for pair in paths], **shared)
        loader.require_full_batches()
        return loader, DataLoader([pair[1] for pair in paths], **shared)

    return build_run(config, strategy, args.task, tokenizer, args.model, make_loaders, args.root,
                     args.model_flags, tensorboard=args.tensorboard)


def train(args, strategy):
    """Set up and train as the parsed command line says. Returns fit()'s dict."""
    setup = setup_training(args, strategy)
    config = args.train
    c = setup.model.config
    dtype = str(strategy.dtype).removeprefix("torch.")
    steps_per_epoch = setup.loader.batches_per_epoch / config.gradient_accumulation_steps
    strategy.say(f"{args.task}: {setup.model.n_params() / 1e6:.2f} M parameters ({c.n_layer} layers, "
                 f"{c.n_embd} wide, vocabulary {c.vocab_size}), {strategy.world_size} × {strategy.device}, "
                 f"{dtype}{', compiled' if strategy.compiles else ''}; {steps_per_epoch:.1f} steps an epoch")
    before = setup.run.start["step"] if setup.run.start else 0
    earlier_best = setup.run.dated_name_of_best()
    result = fit(setup.model, setup.tokenizer, setup.loader, setup.val_loader, config, strategy,
                 setup.run)
    if result["step"] == before and not result["signal"]:
        limit = "max_steps" if config.max_steps else "max_minutes"
        strategy.say(f"no step was taken: the checkpoint has reached {limit} {getattr(config, limit)}; to go "
                     f"on, give a higher --{limit}")
        return result
    files = [strategy.saved_as.format(f"{args.task}_{kind}") for kind in result["saved"]]
    strategy.say(f"{result['step']} steps in {result['seconds']:.0f} s, best validation loss "
                 f"{result['best_val_loss']:.4f}; {', '.join([*files, result['log'] or ''])}")
    if earlier_best and setup.run.dated_name_of_best() != earlier_best:
        strategy.say(f"the best of the run before is checkpoint/{earlier_best}")
    return result


def train_and_close(args, strategy):
    """Train, and end together with the other processes. Returns the exit status."""
    with guarded_output():
        result = train(args, strategy)
        strategy.close()  # here, where the loop's references to the model are gone
    return 128 + result["signal"] if result["signal"] else 0


def main():
    args = command_line(__doc__, add_flags)
    return verify_resume(args, train) if args.verify_resume else train_and_close(args, SingleProcess())


if __name__ == "__main__":
    run_script(main)
