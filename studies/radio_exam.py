"""Training files for the Chinese amateur-radio exam, from its bank of questions and from ham_radio.

    python -m studies.radio_exam --bank bank.csv --ham ham_radio --out dataset/exam
    python -m studies.radio_exam --bank bank.csv --ham ham_radio --out dataset/exam --train learnt

--bank: a CSV file in C-Eval's columns. --ham: a folder with pretrain.txt, a text, and sft.jsonl, questions
and answers. Two experiments:

    OUT/learnt/         ham_radio as it is, and every question of the bank with its right answer
    OUT/understands/    a fifth of the bank is held out: text, pairs and questions that hold one of its
                        questions (scoring/contamination.py says what counts) are removed, as are pairs that
                        give a right answer of it word for word
    OUT/held_out.csv    that fifth, to score `understands` with. Questions that are near copies of each other
                        are held out together, or not at all
    OUT/rest.csv        the other four fifths
    OUT/shuffled/       the whole bank ten times, each with its options in another order

Options are never trained on: a question comes with its right answer alone. --train also prepares the files of
one experiment, pretrains and fine-tunes (checkpoint/pretrain_last.pt, sft_last.pt), copies the model to
OUT/EXPERIMENT/model.pt, scores it, and asks ten questions of the bank. The last line on standard output is a
JSON object with the numbers of what was kept and removed, and the scores.
"""

import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter

from config import ROOT
from flags import Parser
from script import InputError, atomic_write, before_imports, print_json, replacing, run_script

# Steps and rates of the two experiments, over the shipped configs. A question that validates is not learnt,
# so `learnt` validates with very few.
RECIPES = {
    "learnt": {"val_fraction": 0.002, "both": [],
               "pretrain": ["--max_steps", "400"],
               "sft": ["--max_steps", "1200", "--learning_rate", "1e-3"]},
    "understands": {"val_fraction": 0.02, "both": ["--dropout", "0.1"],
                    "pretrain": ["--max_steps", "800"],
                    "sft": ["--max_steps", "400", "--learning_rate", "1e-3"]},
}


def command_line():
    cli = Parser(__doc__)
    cli.add_argument("--bank", required=True, metavar="FILE", help="CSV: id, question, A, B, C, D, answer")
    cli.add_argument("--ham", required=True, metavar="DIR", help="folder with pretrain.txt and sft.jsonl")
    cli.add_argument("--out", required=True, metavar="DIR", help="where to write")
    cli.add_argument("--repeat", type=int, default=3, metavar="N",
                     help="write each question of the bank N times (default %(default)s)")
    cli.add_argument("--seed", type=int, default=1337, help="decides what is held out (default %(default)s)")
    cli.add_argument("--train", choices=tuple(RECIPES), metavar="|".join(RECIPES),
                     help="then train and score a model")
    cli.add_argument("--device", default="auto", help="for --train (default %(default)s)")
    args = cli.parse_args()
    if args.repeat < 1:
        cli.error(f"--repeat is {args.repeat}, but must be at least 1")
    for path in (args.bank, os.path.join(args.ham, "pretrain.txt"), os.path.join(args.ham, "sft.jsonl")):
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file")
    return args


if __name__ == "__main__":
    before_imports(command_line)

import checkpoint as ckpt
from corpus.rows import load_conversations
from scoring.answers import complete
from scoring.contamination import KINDS, QuestionIndex, normalise, units_of_line
from scoring.multiple_choice import LETTERS, read_choices
from tokenizer import encode_prompt

HELD_OUT = 5  # one part of so many
N_SHUFFLES = 10
LONG_ANSWER = 6  # letters and digits, from which on an answer says what it answers


def pairs_of(questions):
    """(question, right answer) of each Question, as a person asks and answers."""
    return [(question.text, question.right_option) for question in questions]


def group_near_copies(questions):
    """Lists of the numbers of Questions that are copies or near copies of each other, also at second hand."""
    group = list(range(len(questions)))  # number -> number of another one in its group, or its own

    def first_of(number):
        while group[number] != number:
            number = group[number]
        return number

    index = QuestionIndex(pairs_of(questions))
    for number, question in enumerate(questions):
        for other, kind in index.find(question.text).items():
            if kind in ("exact", "near"):
                group[first_of(number)] = first_of(other)
    groups = {}
    for number in range(len(questions)):
        groups.setdefault(first_of(number), []).append(number)
    return list(groups.values())


def split_bank(questions, seed):
    """(held out, rest): about a fifth, in random whole groups of near copies."""
    groups = group_near_copies(questions)
    random.Random(seed).shuffle(groups)
    chosen = set()
    for group in groups:
        if len(chosen) + len(group) <= len(questions) // HELD_OUT:
            chosen.update(group)
    held_out = [question for number, question in enumerate(questions) if number in chosen]
    rest = [question for number, question in enumerate(questions) if number not in chosen]
    return held_out, rest


class Cleaner:
    """Removes what holds a held-out question. removed: a Counter of (name of the data, kind)."""

    def __init__(self, held_out):
        pairs = pairs_of(held_out)
        self.index = QuestionIndex(pairs)
        answers = {normalise(answer) for _, answer in pairs}
        self.answers = {answer for answer in answers if len(answer) >= LONG_ANSWER}
        self.removed = Counter()

    def is_clean(self, name, unit, answer=""):
        """Whether a unit holds no held-out question, and `answer` is not the right one to one."""
        kinds = set(self.index.find(unit).values())
        if not kinds and normalise(answer) in self.answers:
            kinds = {"same answer"}
        if kinds:
            self.removed[name, min(kinds, key=[*KINDS, "same answer"].index)] += 1
        return not kinds

    def clean_text(self, name, text):
        """The text without the units that hold a held-out question; lines left empty go."""
        lines = []
        for line in text.split("\n"):
            kept = [unit for unit in units_of_line(line) if self.is_clean(name, unit)]
            if kept or not line:
                lines.append("".join(kept))
        return "\n".join(lines)

    def clean_conversations(self, name, conversations):
        return [turns for turns in conversations
                if all(self.is_clean(name, f"{question} {answer}", answer) for question, answer in turns)]


# ---- Writing ----

def write_conversations(path, conversations):
    """Write a list of conversations, each a list of (question, answer), as JSONL."""
    with atomic_write(path, "w") as file:
        for turns in conversations:
            messages = []
            for question, answer in turns:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_bank(path, questions):
    """Write Questions as a CSV file in C-Eval's columns."""
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["id", "question", *LETTERS, "answer"])
    for number, question in enumerate(questions):
        writer.writerow([number, question.text, *question.options, LETTERS[question.answer]])
    with atomic_write(path, "w") as file:
        file.write(lines.getvalue())


def shuffled(question, rng):
    """The same Question with its options in another order."""
    order = rng.sample(range(len(LETTERS)), len(LETTERS))
    options = tuple(question.options[i] for i in order)
    return type(question)(question.subject, question.text, options, order.index(question.answer))


def write_experiment(folder, text, conversations):
    """Write the pretraining text and the instruction data of one experiment."""
    os.makedirs(folder, exist_ok=True)
    with atomic_write(os.path.join(folder, "pretrain.txt"), "w") as file:
        file.write(text)
    write_conversations(os.path.join(folder, "sft.jsonl"), conversations)


def run_script_of_root(*words, capture=False):
    """Run a script of the repo root; returns its standard output where it is captured.

    Raises InputError if it fails; it has said why on standard error."""
    words = list(map(str, words))
    print(f"> python {' '.join(words)}", flush=True)
    ended = subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *words[1:]], encoding="utf-8",
                           stdout=subprocess.PIPE if capture else None)
    if ended.returncode:
        raise InputError(f"{words[0]} ended with status {ended.returncode}")
    return ended.stdout


def score(model, *words):
    """evaluate.py's table, printed, and its `ceval` result, a dict."""
    output = run_script_of_root("evaluate.py", "-m", model, *words, capture=True)
    print(output, end="")
    return json.loads(output.splitlines()[-1])["ceval"]


def train_experiment(name, folder, device):
    """Prepare, pretrain and fine-tune as RECIPES says; returns the path of the model, in `folder`."""
    recipe = RECIPES[name]

    def data(task):
        return json.dumps([[f"{folder}/{task}_train.npy", f"{folder}/{task}_val.npy"]])

    run_script_of_root("data.py", "--pretrain", f"{folder}/pretrain.txt", "--sft", f"{folder}/sft.jsonl",
                       "--out", folder, "--val_fraction", recipe["val_fraction"])
    run_script_of_root("train.py", "-t", "pretrain", "--dataset_path", data("pretrain"), "--device", device,
                       *recipe["both"], *recipe["pretrain"])
    run_script_of_root("train.py", "-t", "sft", "--dataset_path", data("sft"), "--device", device,
                       "--from_checkpoint", "checkpoint/pretrain_last.pt", *recipe["both"], *recipe["sft"])
    path = f"{folder}/model.pt"
    with replacing(path) as temporary:
        shutil.copyfile(os.path.join(ROOT, "checkpoint", "sft_last.pt"), temporary)
    return path


def ask(path, questions):
    """Print the model's free answers to ten questions of the bank, evenly spaced, as they come."""
    model, tokenizer = ckpt.build_model(ckpt.load(path), path)
    asked = questions[:: max(1, len(questions) // 10)][:10]
    prompts = [encode_prompt(tokenizer, [], question.text).tolist() for question in asked]
    answers = complete(model, prompts, model.config.block_size, stop_ids=(tokenizer.eos_id,), temperature=0)
    for question, answer in zip(asked, answers, strict=True):
        print(f"{question.text}\n  answer: {tokenizer.decode(answer)}\n  right:  {question.right_option}")


def train_and_score(args, questions):
    """Train the experiment args.train and score it; returns a dict of its scores and its minutes."""
    folder = os.path.abspath(os.path.join(args.out, args.train))
    began = time.monotonic()
    model = train_experiment(args.train, folder, args.device)
    minutes = (time.monotonic() - began) / 60
    if args.train == "learnt":
        scores = {"bank": score(model, "--ceval", os.path.abspath(args.bank)),
                  "shuffled ten ways": score(model, "--ceval", os.path.abspath(f"{args.out}/shuffled"),
                                             "--show", 0)}
    else:
        scores = {"held out": score(model, "--ceval", os.path.abspath(f"{args.out}/held_out.csv"),
                                    "--contamination", f"{folder}/pretrain.txt", f"{folder}/sft.jsonl"),
                  "learnt": score(model, "--ceval", os.path.abspath(f"{args.out}/rest.csv"), "--show", 0)}
    ask(model, questions)
    return {"experiment": args.train, "minutes_of_training": round(minutes, 1), "scores": scores}


def main():
    args = command_line()
    questions = read_choices(args.bank)
    try:
        with open(os.path.join(args.ham, "pretrain.txt"), encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{args.ham}/pretrain.txt: cannot be read ({error})") from None
    conversations = load_conversations(os.path.join(args.ham, "sft.jsonl"))
    held_out, rest = split_bank(questions, args.seed)
    if not held_out:
        raise InputError(f"{args.bank}: its questions are too few, or too much alike, to hold a fifth out")
    cleaner = Cleaner(held_out)
    clean_text = cleaner.clean_text("text", text)
    clean_pairs = cleaner.clean_conversations("pairs", conversations)
    clean_rest = cleaner.clean_conversations("bank", [[pair] for pair in pairs_of(rest)])

    os.makedirs(os.path.join(args.out, "shuffled"), exist_ok=True)
    bank = [[pair] for pair in pairs_of(questions)]
    write_experiment(os.path.join(args.out, "learnt"), text, conversations + bank * args.repeat)
    write_experiment(os.path.join(args.out, "understands"), clean_text,
                     clean_pairs + clean_rest * args.repeat)
    write_bank(os.path.join(args.out, "held_out.csv"), held_out)
    write_bank(os.path.join(args.out, "rest.csv"), rest)
    rng = random.Random(args.seed)
    for i in range(N_SHUFFLES):
        write_bank(os.path.join(args.out, "shuffled", f"bank_{i}.csv"), [shuffled(q, rng) for q in questions])

    print(f"{len(questions)} questions, {len(held_out)} of them held out")
    for name, before, after in (("text", len(text), len(clean_text)),
                                ("pairs", len(conversations), len(clean_pairs)),
                                ("bank", len(rest), len(clean_rest))):
        kinds = ", ".join(f"{kind} {cleaner.removed[name, kind]}" for kind in (*KINDS, "same answer"))
        unit = "characters" if name == "text" else "rows"
        print(f"{name:6} {before:9,} {unit}, {after:9,} of them clean; removed units: {kinds}")
    trained = train_and_score(args, questions) if args.train else {}
    print_json({"questions": len(questions), "held_out": len(held_out),
                "characters": [len(text), len(clean_text)], "pairs": [len(conversations), len(clean_pairs)],
                "bank": [len(rest), len(clean_rest)],
                "removed": {f"{name}: {kind}": n for (name, kind), n in sorted(cleaner.removed.items())},
                **trained})


if __name__ == "__main__":
    run_script(main)
