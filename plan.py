"""Plan a pretraining run: which model, batch, steps and learning rate suit the time, on this machine.

    python plan.py --minutes 60                    for an hour
    python plan.py --minutes 60 --write            and put it into the JSON files
    python plan.py --minutes 60 --memory_gb 8      in at most 8 GB of memory
    python plan.py --tokens 10000000               for so many tokens, however long they take
    python plan.py --memory_gb 8                   the largest model that fits, on the tokens that suit it

Times a few training steps of models of growing size on the text that data.py prepared, for at most 30
seconds, and chooses the one with the lowest loss by a scaling law: the one that studies.scaling fitted to
this text, else a shipped one. After --write, `python train.py -t pretrain` trains it; the learning rate
follows the clock, so that it ends in time on a machine whose speed changes. The last line on standard output
is one JSON object.
"""

import time

START = time.perf_counter()

import contextlib
import json
import math
import os
import statistics
from dataclasses import dataclass, replace

from config import ROOT, ModelConfig, TrainConfig, load_config, read_json
from flags import Parser, check_files
from script import InputError, atomic_write, before_imports, count, print_json, run_script

# The models to choose from, layers and width. Heads are 64 wide where the width allows it.
LADDER = ((1, 32), (1, 64), (2, 96), (3, 128), (4, 192), (4, 256), (5, 320), (6, 384), (8, 512), (10, 640),
          (12, 768), (16, 1024), (24, 1536))
# What the laws were fitted with, and what other programs can run (see export.py).
SHAPE = dict(n_kv_head=0, activation="relu2", qk_norm=True, use_rope=True, n_prev=0, bias=False,
             is_causal=True, final_norm="rmsnorm", n_hidden=0)
RECIPE = dict(optimizer="muon", decay_lr=True, lr_schedule="linear", min_lr=0.0, lr_decay_iters=0,
              embedding_lr=1.0, dropout=0.0)
MEASURING_SECONDS = 30
VALIDATIONS = 10  # in a run


def command_line(argv=None, root=ROOT):
    cli = Parser(__doc__)
    length = cli.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="time from the start of train.py to its end")
    length.add_argument("--tokens", type=int, help="tokens to train on, instead of --minutes")
    cli.add_argument("--memory_gb", type=float, help="largest memory to use (default: 0.9 of a GPU's)")
    cli.add_argument("--write", action="store_true", help="write the plan into the JSON files")
    cli.add_argument("--model_config", default=os.path.join(root, "model_config.json"), metavar="FILE")
    cli.add_argument("--train_config", default=os.path.join(root, "config_pretrain.json"), metavar="FILE")
    cli.add_config(TrainConfig, [name for name in TrainConfig.__dataclass_fields__
                                 if name not in ("device", "dtype", "random_seed", "dataset_path")])
    args = cli.parse_args(argv)
    args.root = root
    if args.minutes is None and args.tokens is None and args.memory_gb is None:
        raise InputError("give --minutes (or --tokens, or --memory_gb), such as --minutes 60")
    for name in ("minutes", "tokens", "memory_gb"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} {value}: must be above 0")
    if args.minutes is not None and args.minutes < 0.5:
        raise InputError(f"--minutes {args.minutes:g}: must be at least 0.5; starting takes some seconds")
    if args.tokens is not None and args.tokens >= 2**63:
        raise InputError(f"--tokens {str(args.tokens)[:20]}…: must be below 2**63")
    args.flags = cli.overrides(args, TrainConfig)
    overrides = {**args.flags, **RECIPE, "max_steps": 1, "warmup_iters": 0, "from_checkpoint": ""}
    args.train = load_config(TrainConfig, args.train_config, overrides)
    args.model = load_config(ModelConfig, args.model_config, SHAPE)
    check_files(args.train, args.train_config, root)
    return args


if __name__ == "__main__":
    before_imports(command_line)

import torch

from dataloader import DataLoader
from model import GPT
from optimizer import build_optimizer
from run import build_run
from scaling_law import (
    AT_WIDTH,
    LAWS,
    choose_law,
    effective,
    learning_rate_at,
    predict,
    step_tokens,
    weight_decay_for,
)
from strategy import FOLDED_TOKENS, SingleProcess, load_step
from tokenizer import Tokenizer
from train import accumulate_gradients

CPU_TOKENS = 8192  # at most so many in a pass on a CPU; with 65,536, planning took 4 GB (docs/log.md)
PASSES = 20  # over the text, at most; many more bring nothing but memorising (docs/scaling.md)
MEMORISING = 6  # parameters per training token, at most; with more, the same happens sooner


def with_shape(model_config, layers, width):
    """model_config with another depth and width, and heads of the same size as far as the width allows."""
    heads = max(1, width * model_config.n_head // model_config.n_embd)
    return replace(model_config, n_layer=layers, n_embd=width, n_head=heads).validate()


def memory_bytes(model_config, tokens, is_half):
    """An estimate of the bytes that training takes with `tokens` tokens in a pass, without Python itself:
    weights, gradients, two moments, and what a pass keeps for its backward pass; the factors are measured.
    is_half: are matrix products in bfloat16 or float16?"""
    c = model_config
    per_token = c.n_embd * (c.n_layer * (40 if is_half else 62) + 50) + c.vocab_size * (12 if is_half else 16)
    return on_meta(c).n_params() * (18 if is_half else 16) + tokens * per_token


def on_meta(model_config):
    """A GPT without memory, for its numbers: n_params(), n_matmul_params(), flops_per_token()."""
    with torch.device("meta"):
        return GPT(model_config)


@dataclass
class Candidate:
    """A model and its step, and what to expect of them."""
    model: ModelConfig
    train: TrainConfig
    tokens_per_second: float
    is_measured: bool  # False: as many operations a second as the largest measured model
    tokens: float  # that the run reads
    loss: float  # by the law
    memory: float  # bytes


class PreparedText:
    """The text that data.py prepared for a TrainConfig: its tokenizer, its size, and loaders for it."""

    def __init__(self, config, root, block_size):
        self.pairs = [[os.path.join(root, path) for path in pair] for pair in config.dataset_path]
        self.seed = config.random_seed
        folder = os.path.dirname(self.pairs[0][0])
        self.tokenizer = Tokenizer.load(os.path.join(folder, "tokenizer.json"))
        loader, val_loader = self.loaders(block_size, 1)
        self.n_tokens = sum(len(source.tokens) for source in loader.sources)
        self.n_rows = min(source.n_rows for source in loader.sources)  # of the shortest file
        self.n_val_rows = sum(source.n_rows for source in val_loader.sources)

    def loaders(self, block_size, batch_size, val_batch_size=None):
        """Loaders of the training and the validation text."""
        files, val_files = zip(*self.pairs, strict=True)
        return [DataLoader(paths, "pretrain", block_size, rows, self.seed, tokenizer=self.tokenizer)
                for paths, rows in ((files, batch_size), (val_files, val_batch_size or batch_size))]


class Planner:
    """Times candidates on one text and one device, and judges them by one law."""

    def __init__(self, args):
        self.args = args
        self.text = PreparedText(args.train, args.root, args.model.block_size)
        self.law, self.which_law = choose_law(args.root, self.text.tokenizer.vocab_size, self.text.n_tokens,
                                              SHAPE)
        strategy = SingleProcess()
        strategy.setup(args.train)  # says what the device lacks, once
        self.device = strategy.device
        self.is_half = strategy.dtype is not torch.float32
        self.memory = math.inf  # a CPU's is never what limits a plan
        if args.memory_gb:
            self.memory = args.memory_gb * 1e9
        elif self.device.type == "cuda":
            self.memory = 0.9 * torch.cuda.get_device_properties(self.device).total_memory
        if args.minutes and self.training_seconds() < 10:
            raise InputError(f"--minutes {args.minutes:g}: starting alone takes {STARTING_SECONDS:.0f} s")
        self.deadline = time.perf_counter() + MEASURING_SECONDS
        self.flops = None  # per second, of the last model that was measured
        self.limit = "the largest shape that plan.py tries, not the memory"  # of the last model of all

    def training_seconds(self):
        """Seconds of --minutes that are left for training steps; 4 % are for validation."""
        return 0.96 * (60 * self.args.minutes - STARTING_SECONDS)

    def tokens_for(self, n, tokens_per_second):
        """How many tokens a model of n parameters reads."""
        most = PASSES * self.text.n_tokens
        if self.args.minutes:
            return min(most, self.training_seconds() * tokens_per_second)
        if self.args.tokens:
            return self.args.tokens
        law = self.law  # compute-optimal: there more parameters and more tokens are worth the same
        d = (law["beta"] * law["B"] / (law["alpha"] * law["A"]) * n ** law["alpha"]) ** (1 / law["beta"])
        return min(d, most)

    def split_step(self, model, tokens):
        """Rows in a pass and passes in a step, as large as a run of `tokens` wants and the memory allows;
        None if not even one row fits."""
        rows = step_tokens(tokens, model.block_size) // model.block_size
        passes = 1
        most = CPU_TOKENS if self.device.type == "cpu" else FOLDED_TOKENS
        while rows > 1 and (rows * model.block_size > most or rows > self.text.n_rows
                            or memory_bytes(model, rows * model.block_size, self.is_half) > self.memory):
            lacks_memory = rows * model.block_size <= most and rows <= self.text.n_rows
            rows //= 2
            # CUDA joins passes again (see strategy.py), so there less memory means a smaller step.
            passes *= 1 if lacks_memory and self.device.type == "cuda" else 2
        needed = memory_bytes(model, rows * model.block_size, self.is_half)
        return (rows, passes) if needed <= self.memory else None

    def measure(self, model, config):
        """Tokens per second of the training loop with this model and config, from real steps on the real
        text, for a second or two; and on CUDA the memory that they took, in bytes.

        A step of several passes is measured with one of them."""
        passes = config.gradient_accumulation_steps
        config = replace(config, gradient_accumulation_steps=1)
        strategy = SingleProcess()
        strategy.say = lambda text: None
        strategy.setup(replace(config, compile="false"))  # compiling alone would take longer than planning
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        setup = build_run(config, strategy, "pretrain", self.text.tokenizer, model,
                          lambda c, _: self.text.loaders(c.block_size, config.batch_size), None, quiet=True)
        trained = strategy.wrap(setup.model, build_optimizer(setup.model, config, strategy.fast_bfloat16))
        data = load_step(setup.loader, strategy, model.block_size)
        times = []  # pairs: of the pass, of the rest of the step
        while len(times) < 3 or sum(map(sum, times)) < 1.5 and len(times) < 200:
            start = time.perf_counter()
            loss = accumulate_gradients(trained, data, sum(data.n_loss_tokens), strategy, config,
                                        self.text.tokenizer)
            strategy.read(loss, loss)  # waits for the device
            middle = time.perf_counter()
            norm = strategy.clip_gradients()
            data = load_step(setup.loader, strategy, model.block_size)
            strategy.optimizer_step(config.learning_rate, strategy.read(loss, norm)[1])
            times.append((middle - start, time.perf_counter() - middle))
        of_pass, of_rest = map(statistics.median, zip(*times[1:], strict=True))
        speed = passes * data.n_tokens / (passes * of_pass + of_rest)
        return speed, torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def candidate(self, layers, width):
        """The Candidate with this shape, or None if it is too large for the memory or the text."""
        base = replace(self.args.model, n_embd=AT_WIDTH, n_head=4, vocab_size=self.text.tokenizer.vocab_size)
        model = with_shape(base, layers, width)
        n = on_meta(model).n_matmul_params()
        unique = self.text.n_tokens
        if n > MEMORISING * unique and (layers, width) != LADDER[0]:
            self.limit = (f"the text, not the memory: with more than {MEMORISING} parameters for each of its "
                          f"{unique:,} training tokens, a model would learn it by heart")
            return None
        flops_per_token = on_meta(model).flops_per_token()
        speed = (self.flops or 1e10) / flops_per_token  # a guess, to begin with
        step = None
        is_measured = False
        for _ in range(4):  # the step depends on the tokens, these on the speed, and the speed on the step
            tokens = self.tokens_for(n, speed)
            before = step
            step = self.split_step(model, tokens)
            if step is None:
                self.limit = "the memory"
                return None
            rows, passes = step
            rate = learning_rate_at(width)
            config = replace(self.args.train, batch_size=rows, gradient_accumulation_steps=passes,
                             learning_rate=rate)
            memory = memory_bytes(model, rows * model.block_size, self.is_half)
            seconds = 4 * rows * model.block_size / speed
            is_late = self.flops and time.perf_counter() + max(2, seconds) > self.deadline
            if step == before or is_late:
                break
            speed, peak = self.measure(model, config)
            memory = peak or memory
            self.flops = speed * flops_per_token
            is_measured = True
        tokens = self.tokens_for(n, speed)
        config.weight_decay = weight_decay_for(n, tokens, unique, rate, rows * passes * model.block_size)
        # A law holds for runs of some length. Guessing gives ln(vocabulary), and training is never worse.
        loss = min(float(predict(self.law, *effective(n, tokens, unique))), math.log(model.vocab_size))
        return Candidate(model, config, speed, is_measured, tokens, loss, memory)

    def candidates(self):
        """Candidates of growing size, until two more do not lower the loss or the next one is too large."""
        found = []
        for layers, width in LADDER:
            c = self.candidate(layers, width)
            if c is None:
                break
            found.append(c)
            print(f"{layers:3} x {width:<5}{on_meta(c.model).n_params():14,}{c.tokens_per_second:12,.0f}"
                  f"{' ' if c.is_measured else '*'}{c.tokens:14,.0f}{c.tokens / self.text.n_tokens:9.1f}"
                  f"{c.loss:9.3f}{c.memory / 1e9:9.2f}", flush=True)
            losses = [c.loss for c in found]
            lowest_before = min(losses[:-2], default=math.inf)
            if (self.args.minutes or self.args.tokens) and min(losses[-2:]) >= lowest_before:
                break
        if not found:
            raise InputError(f"{self.memory / 1e9:g} GB of memory are too little for the smallest model")
        return found


STARTING_SECONDS = time.perf_counter() - START + 2  # train.py imports as much, and then reads and saves


def finish(candidate, planner):
    """Settings for the two JSON files: the dicts of ModelConfig and TrainConfig fields, and the steps."""
    minutes = planner.args.minutes - STARTING_SECONDS / 60 if planner.args.minutes else 0.0
    # A run that the text ends long before the time goes by steps: a faster machine, or a compiled model, must
    # not read more of it. Near the time it goes by the clock, so that a slower one decays to the end.
    seconds = candidate.tokens / candidate.tokens_per_second
    by_steps = not minutes or seconds < 0.7 * planner.training_seconds()
    model = {name: getattr(candidate.model, name) for name in (*SHAPE, "n_layer", "n_head", "n_embd")}
    config = candidate.train
    in_a_step = config.batch_size * config.gradient_accumulation_steps * candidate.model.block_size
    steps = max(1, round(candidate.tokens / in_a_step))
    # A forward pass takes a third of a step; all validations together 4 % of the time.
    tokens = 0.04 * 3 * candidate.tokens / (VALIDATIONS + 2)
    rows = min(planner.text.n_val_rows, max(1, tokens // candidate.model.block_size))
    train = {**RECIPE, **planner.args.flags,
             "learning_rate": float(f"{config.learning_rate:.3g}"),
             "batch_size": config.batch_size, "warmup_iters": min(20, steps // 10),
             "gradient_accumulation_steps": config.gradient_accumulation_steps,
             "weight_decay": float(f"{config.weight_decay:.2g}"),
             "max_steps": steps if by_steps else 0, "max_minutes": round(minutes, 3),
             "eval_interval": max(1, steps // VALIDATIONS),
             "eval_iters": math.ceil(rows / config.batch_size),
             "log_interval": max(1, steps // 2000), "from_checkpoint": ""}  # the plan is for a new model
    return model, train, steps


def clock_after(seconds):
    """The date and time `seconds` from now, as text; None if no calendar has them."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
    except (OverflowError, ValueError, OSError):
        return None


def write(settings):
    """Set values in JSON files, {path: dict}, in all of them or in none; their other keys stay."""
    with contextlib.ExitStack() as files:
        for path, values in settings.items():
            f = files.enter_context(atomic_write(path, "w"))
            f.write(json.dumps({**read_json(path), **values}, indent=4, ensure_ascii=False) + "\n")
            f.flush()  # a full disk is noticed here, before any file is in its place


def main(args):
    planner = Planner(args)
    law = planner.law
    print(f"{planner.text.n_tokens:,} training tokens, vocabulary of {planner.text.tokenizer.vocab_size}, "
          f"{planner.device}")
    print(f"law: loss = {law['E']:.3g} + {law['A']:.4g} / N^{law['alpha']:.3g} + {law['B']:.4g} / "
          f"D^{law['beta']:.3g}, {planner.which_law}")
    if law in LAWS.values():
        print("on text of another kind the loss may differ much from this law; shape and time still hold")
    print(f"{'shape':11}{'parameters':>14}{'tokens/s':>12} {'tokens':>14}{'epochs':>9}{'loss':>9}{'GB':>9}")
    found = planner.candidates()
    if not all(candidate.is_measured for candidate in found):
        print("* not timed: its speed is estimated from that of the largest model that was timed")
    best = min(found, key=lambda candidate: candidate.loss) if args.minutes or args.tokens else found[-1]
    model, train, steps = finish(best, planner)
    seconds = best.tokens / best.tokens_per_second / 0.96 + STARTING_SECONDS
    ends = clock_after(seconds)
    print(f"\nmodel:  {count(best.model.n_layer, 'layer')}, {best.model.n_embd} wide, "
          f"{count(best.model.n_head, 'head')}: {on_meta(best.model).n_params():,} parameters")
    if not (args.minutes or args.tokens):
        print(f"limit:  {planner.limit}")
    print(f"step:   {train['gradient_accumulation_steps']} x {count(train['batch_size'], 'row')} of "
          f"{best.model.block_size} tokens, learning rate {train['learning_rate']:g}, then linear to 0")
    epochs = best.tokens / planner.text.n_tokens
    print(f"run:    about {count(steps, 'step')}, {best.tokens:,.0f} tokens, {epochs:.1f} epochs; weight "
          f"decay {train['weight_decay']}; {best.memory / 1e9:.2f} GB of memory, without Python's own")
    print(f"expect: validation loss {best.loss:.3f} after {seconds / 60:,.1f} minutes"
          + (f"; if started now, it ends at {ends}" if ends else ""))
    if args.minutes and seconds < 59 * args.minutes:
        print("this text is too short to use all of the time: read more often, it would be learnt by heart")
    if not (args.minutes or args.tokens) and best.tokens >= PASSES * planner.text.n_tokens:
        print("this text is too short for as many tokens as suit the model: read more than "
              f"{PASSES} times, it would be learnt by heart")
    if args.write:
        changed = {args.model_config: model, args.train_config: train}
        sft = os.path.join(args.root, "config_sft.json")
        if os.path.isfile(sft):  # fine-tuning starts from this model: at half its rate, as shipped
            changed[sft] = {"learning_rate": train["learning_rate"] / 2}
        write(changed)
        names = [path.removeprefix(args.root + os.sep) for path in changed]
        print(f"written to {', '.join(names)}; now run python train.py -t pretrain")
        if os.path.exists(os.path.join(args.root, ".git")):
            print(f"the shipped settings come back with git checkout {' '.join(names)}")
    else:
        print("add --write to put this into the JSON files")
    print_json({"model": model, "train": train, "parameters": on_meta(best.model).n_params(), "steps": steps,
                "tokens": best.tokens, "epochs": epochs, "tokens_per_second": best.tokens_per_second,
                "expected_loss": best.loss, "memory_gb": best.memory / 1e9, "minutes": seconds / 60,
                "ends_at": ends, "law": law, "which_law": planner.which_law, "device": str(planner.device),
                "losses": {f"{c.model.n_layer}x{c.model.n_embd}": c.loss for c in found},
                "written": args.write})


if __name__ == "__main__":
    run_script(lambda: main(command_line()))
