"""Talk to a trained model, or let it continue a text.

    python inference.py -i -m checkpoint/sft_best.pt                     a conversation; /reset starts over
    python inference.py -i -m checkpoint/sft_best.pt -p "你是谁"          one answer, then exit
    python inference.py -m checkpoint/pretrain_best.pt -p "无线电"        continue a text
    python inference.py -i -m checkpoint/sft_best.pt -t 0 -r 1           always the likeliest token

End of input (Ctrl-D) or Ctrl-C leaves; Ctrl-C during an answer in a conversation ends that answer.
"""

import contextlib
import sys

from config import check_sampling
from cpu import native
from flags import Parser, require_checkpoint
from script import InputError, before_imports, run_script


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("-m", "--model", required=True, metavar="FILE", help="checkpoint")
    cli.add_argument("-i", "--instruct", action="store_true",
                     help="put the input into the instruction template")
    cli.add_argument("-l", "--max_length", type=int, metavar="N",
                     help="longest sequence, prompt included (default: the model's context length)")
    cli.add_argument("-t", "--temperature", type=float, default=1.0,
                     help="higher is more random, 0 takes the likeliest token (default 1.0)")
    cli.add_argument("-k", "--top_k", type=int, default=5,
                     help="sample from the k likeliest tokens; 0: all (default 5)")
    cli.add_argument("-r", "--repetition_penalty", type=float, default=1.2,
                     help="above 1 makes tokens of the question and the answer less likely (default 1.2)")
    cli.add_argument("--repeat_last_n", type=int, default=-1, metavar="N",
                     help="penalize only the last N of these tokens; -1: all, 0: none (default -1)")
    cli.add_argument("-p", "--prompt", help="answer this and exit")
    cli.add_argument("--top_p", type=float, default=1.0,
                     help="sample from the likeliest tokens that make up this probability (default 1.0)")
    cli.add_argument("--seed", type=int, help="seed of the sampling (default: another one each time)")
    cli.add_argument("--int8", action="store_true",
                     help="int8 weights on a CPU: faster; answers may differ a little")
    cli.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    args = cli.parse_args()
    check_sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.repeat_last_n)
    if args.max_length is not None and args.max_length < 2:
        raise InputError(f"max_length is {args.max_length}, but must be at least 2")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise InputError(f"seed is {args.seed}, but must be 0 or above and below 2**63")
    require_checkpoint(args.model)
    return args


if __name__ == "__main__":
    before_imports(command_line)
    native.start("decode.c")  # compiles while torch is imported

import torch

import checkpoint as ckpt
from cpu.int8 import quantize
from device import pick_device, setup_device
from generate import generate
from generate_gpu import use_half_precision
from tokenizer import encode_prompt


def fit_prompt(ids, room, keep_first, what="prompt"):
    """The end of `ids` that fits into `room` tokens; under the template the first mark stays in front.

    what: what the line that says so calls the ids."""
    if len(ids) <= room:
        return ids
    print(f"(the {what} has {len(ids)} tokens; its last {room} are used)", file=sys.stderr)
    return ids[:keep_first] + ids[len(ids) - room + keep_first:]


def answer(model, tokenizer, ids, args, generator, turn_length):
    """Print the continuation of the prompt `ids` (a list) as it is generated; return its text.

    turn_length: how many of the last ids are the current turn, which the repetition penalty covers.
    A KeyboardInterrupt ends the line and is raised again, with the text so far as its argument."""
    length = args.max_length or model.config.block_size
    # At least a quarter of the context is left for the answer.
    room = min(length - 1, model.config.block_size - model.config.block_size // 4)
    ids = fit_prompt(ids, max(1, room), keep_first=1 if args.instruct else 0,
                     what="conversation" if turn_length < len(ids) else "prompt")
    idx = torch.tensor([ids], device=model.device)
    text = ""
    try:
        for token in generate(model, idx, length - len(ids), args.temperature, args.top_k, args.top_p,
                              args.repetition_penalty, (tokenizer.eos_id,), generator, args.repeat_last_n,
                              penalty_start=max(0, len(ids) - turn_length)):
            if int(token) == tokenizer.eos_id:
                break
            piece = tokenizer.decode([int(token)])
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(flush=True)
        raise KeyboardInterrupt(text) from None
    print()
    return text


def prompt_ids(tokenizer, turns, text, instruct):
    """The ids that the model reads: the conversation so far and `text`, or `text` alone."""
    if instruct:
        return [int(i) for i in encode_prompt(tokenizer, turns, text)]
    return [int(i) for i in tokenizer.encode(text)] or [tokenizer.bos_id]


def converse(model, tokenizer, args, generator):
    """Answer each line of standard input, until it ends. Raises InputError for a line that is not UTF-8."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Python for Windows has none
            import readline  # noqa: F401  (history and line editing for input())
        print("/reset starts over, Ctrl-D leaves" if args.instruct else "Ctrl-D leaves", file=sys.stderr)
    turns = []
    while True:
        try:
            text = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: not UTF-8 at byte {error.start} of what was read") from None
        except BrokenPipeError:  # nobody reads the answers
            raise
        except OSError as error:
            raise InputError(f"standard input: cannot be read ({error.strerror})") from None
        if text == "/reset":
            turns = []
        elif text:
            ids = prompt_ids(tokenizer, turns, text, args.instruct)
            turn_length = len(prompt_ids(tokenizer, [], text, args.instruct))
            try:
                reply = answer(model, tokenizer, ids, args, generator, turn_length)
            except KeyboardInterrupt as interrupt:
                if not is_terminal:
                    raise
                reply = interrupt.args[0]
            if args.instruct:
                turns.append((text, reply))


def main():
    args = command_line()
    device = pick_device(args.device)
    setup_device(device)
    model, tokenizer = ckpt.build_model(ckpt.load(args.model), args.model)
    use_half_precision(model.to(device))
    if args.int8:
        quantize(model)
    generator = torch.Generator(device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
        native.wait("decode.c")  # so that a seed gives the same text whether or not it was compiled before

    if args.prompt is None:
        converse(model, tokenizer, args, generator)
    else:
        ids = prompt_ids(tokenizer, [], args.prompt, args.instruct)
        answer(model, tokenizer, ids, args, generator, turn_length=len(ids))


if __name__ == "__main__":
    run_script(main)
