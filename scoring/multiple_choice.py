"""Multiple choice as in C-Eval and CMMLU: read the questions, score the options with a model.

    python evaluate.py -m checkpoint/sft_best.pt --ceval DIR --shots 5

Four scores are made in one run. With log P the log-likelihood of an option and the <|eos|> after it:

    per_token       log P(option | question) divided by its number of tokens; the headline
    summed          log P(option | question)
    unconditional   log P(option | question) - log P(option | an empty question) (Holtzman et al. 2021)
    letter          the options are shown below the question, and the model names a letter, A to D

A tie of the best options is no answer: it is counted, and wrong. A prompt that does not fit into the context
first loses its examples, the earliest first, then the beginning of the question, for all of its options
alike; where not even the longest option fits, the question is wrong. Each case is counted.
"""

import csv
import glob
import math
import os
import re
import unicodedata
from dataclasses import dataclass

import numpy as np

from scoring.likelihood import fit_prompt, letter_logits, log_likelihoods
from script import InputError
from tokenizer import join_ids

LETTERS = "ABCD"
CHANCE = 1 / len(LETTERS)
COLUMNS = ("question", *LETTERS.lower(), "answer")
METHODS = ("per_token", "summed", "unconditional", "letter")
HEADLINE = METHODS[0]  # what C-Eval's score has meant in this project from the beginning


@dataclass
class Question:
    """A question with four options."""

    subject: str
    text: str
    options: tuple  # of four strings
    answer: int  # number of the right option

    @property
    def right_option(self):
        return self.options[self.answer]

    def with_options(self):
        """The question with its options below it, as a person reads it."""
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True)]
        return "\n".join([self.text, *lines])


# ---- Reading ----

def answer_number(key):
    """The number of the option that a key names: "b", " B ", "(Ｂ)" and "B." are 1.

    Raises ValueError for any other; a digit is one, since some files count from 0 and some from 1."""
    letter = unicodedata.normalize("NFKC", key).strip().strip("().").strip().upper()
    if not letter:
        raise ValueError("the answer is empty, so that it cannot be scored; C-Eval's test split is "
                         "published without answers, use its val split")
    if letter not in tuple(LETTERS):
        raise ValueError(f"the answer is {key!r}, but must be one of {', '.join(LETTERS)}")
    return LETTERS.index(letter)


def read_choices(path):
    """The questions of a CSV file with the columns question, A, B, C, D, answer, in any case and order.

    C-Eval's id and explanation and CMMLU's index column are ignored. Raises InputError naming the line."""
    subject = os.path.splitext(os.path.basename(path))[0]
    questions = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            names = [name.strip().lower() for name in next(reader, [])]
            missing = [name for name in COLUMNS if name not in names]
            if missing:
                raise InputError(f"{path}, line 1: needs the columns question, A, B, C, D, answer")
            where = [names.index(name) for name in COLUMNS]
            for row in reader:
                if not row:
                    continue
                if len(row) <= max(where):
                    raise InputError(f"{path}, line {reader.line_num}: needs the columns question, A, B, C, "
                                     f"D, answer, but has {len(row)} fields of {len(names)}")
                text, *options, key = [row[i] for i in where]
                try:
                    answer = answer_number(key)
                except ValueError as error:
                    raise InputError(f"{path}, line {reader.line_num}: {error}") from None
                questions.append(Question(subject, text, tuple(options), answer))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    if not questions:
        raise InputError(f"{path}: holds no questions")
    return questions


def csv_files(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "*.csv")))


def find_csv_files(path):
    """The CSV files that `path` names: itself, those in the folder, or in its subfolder val or test."""
    if not os.path.isdir(path):
        return [path]
    for folder in (path, os.path.join(path, "val"), os.path.join(path, "test")):
        if csv_files(folder):
            return csv_files(folder)
    raise InputError(f"{path}: holds no .csv files")


def find_dev_folder(path, scored):
    """The folder with the examples for --shots. Raises InputError if there is none.

    path: what --ceval got; scored: one of its CSV files."""
    folder = os.path.dirname(os.path.abspath(scored))
    for place in (os.path.join(path, "dev"), os.path.join(os.path.dirname(folder), "dev"),
                  os.path.join(folder, "dev")):
        if csv_files(place):
            return place
    raise InputError(f"{path}: --shots needs a folder dev with CSV files in it or beside it; give --dev DIR")


def read_examples(folder, scored, shots):
    """The first `shots` questions of the file in the dev folder that belongs to the CSV file `scored`."""
    stem = re.sub("_(val|test|dev)$", "", os.path.splitext(os.path.basename(scored))[0])
    paths = [os.path.join(folder, name) for name in (f"{stem}_dev.csv", f"{stem}.csv")]
    path = next((path for path in paths if os.path.exists(path)), None)
    if path is None:
        raise InputError(f"{folder}: holds neither {stem}_dev.csv nor {stem}.csv, the examples for {scored}")
    if os.path.samefile(path, scored):
        raise InputError(f"{path}: the examples would be the scored questions themselves; give another --dev")
    examples = read_choices(path)[:shots]
    if len(examples) < shots:
        raise InputError(f"{path}: holds {len(examples)} examples, fewer than --shots {shots}")
    return examples


# ---- Scores ----

def wilson_interval(right, n):
    """95 % interval of a share, `right` of `n` (Wilson 1927)."""
    z = 1.959964
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def choose(scores):
    """The number of the largest of four scores; None if it is not the only one, or there are none."""
    if scores is None or np.isnan(scores).any():
        return None
    best = np.flatnonzero(scores == scores.max())
    return int(best[0]) if len(best) == 1 else None


def length_baseline(questions, pick):
    """Share right of always choosing the longest (pick=max) or shortest (min) option; ties share a point."""
    total = 0.0
    for question in questions:
        lengths = [len(option) for option in question.options]
        best = pick(lengths)
        total += (lengths[question.answer] == best) / lengths.count(best)
    return total / len(questions)


class OptionScorer:
    """Scores the options of questions, and counts what had to be cut.

    Raises InputError for a model without causal attention."""

    def __init__(self, model, tokenizer):
        if not model.config.is_causal:
            raise InputError("--ceval needs a model with causal attention, but this one has is_causal false")
        self.model = model
        self.tokenizer = tokenizer
        self.fewer_shots = 0
        self.cut_questions = 0
        self.no_room = 0
        self.letter_cut = 0
        self.letter_no_room = 0

    def likelihoods(self, questions, examples):
        """Scores by likelihood: a dict, method -> list of arrays (4,), None where there was no room.

        examples: for each question, a list of Questions that are answered before it."""
        end = [self.tokenizer.eos_id]
        contexts = []
        empty = []
        answers = []
        placed = []
        bare, _, _ = fit_prompt(self.tokenizer, [], "", self.model.config.block_size)
        for question, shown in zip(questions, examples, strict=True):
            ends = [join_ids(self.tokenizer, [self.tokenizer.encode(o), end]) for o in question.options]
            room = self.model.config.block_size + 1 - max(map(len, ends))
            turns = [(example.text, example.right_option) for example in shown]
            prompt, n_dropped, is_cut = fit_prompt(self.tokenizer, turns, question.text, room)
            placed.append(prompt is not None)
            if prompt is None:
                self.no_room += 1
                continue
            self.fewer_shots += n_dropped > 0
            self.cut_questions += is_cut
            contexts += [prompt] * len(ends)
            empty += [bare] * len(ends)
            answers += ends
        pad_id = self.tokenizer.pad_id
        given = log_likelihoods(self.model, contexts, answers, pad_id).reshape(-1, len(LETTERS))
        alone = log_likelihoods(self.model, empty, answers, pad_id).reshape(-1, len(LETTERS))
        n_tokens = np.array([len(answer) for answer in answers]).reshape(-1, len(LETTERS))
        scores = {"per_token": given / n_tokens, "summed": given, "unconditional": given - alone}
        return {method: spread(rows, placed) for method, rows in scores.items()}

    def letters(self, questions, examples):
        """Scores by letter: a list of arrays (4,), None where there was no room."""
        prompts = []
        placed = []
        for question, shown in zip(questions, examples, strict=True):
            turns = [(example.with_options(), LETTERS[example.answer]) for example in shown]
            prompt, _, is_cut = fit_prompt(self.tokenizer, turns, question.with_options(),
                                           self.model.config.block_size)
            placed.append(prompt is not None)
            self.letter_no_room += prompt is None
            self.letter_cut += is_cut
            if prompt is not None:
                prompts.append(prompt)
        ids = self.tokenizer.encode(LETTERS).tolist()
        return spread(letter_logits(self.model, prompts, ids, self.tokenizer.pad_id), placed)


def spread(rows, placed):
    """The rows in order, with None for each question that is not `placed`."""
    rows = iter(rows)
    return [next(rows) if is_placed else None for is_placed in placed]


def score_choices(model, tokenizer, path, shots=0, dev=None, show=0):
    """Score all questions of `path`, a CSV file or a folder of them; returns (dict of scores, questions)."""
    questions = []
    examples = []
    for file in find_csv_files(path):
        rows = read_choices(file)
        shown = read_examples(dev or find_dev_folder(path, file), file, shots) if shots else []
        questions += rows
        examples += [shown] * len(rows)
    scorer = OptionScorer(model, tokenizer)
    scores = scorer.likelihoods(questions, examples)
    scores["letter"] = scorer.letters(questions, examples)
    methods = {}
    chosen = {}
    for method in METHODS:
        chosen[method] = [choose(row) for row in scores[method]]
        right = sum(c == q.answer for c, q in zip(chosen[method], questions, strict=True))
        n_ties = sum(c is None and row is not None
                     for c, row in zip(chosen[method], scores[method], strict=True))
        methods[method] = summary(right, len(questions), n_ties)
    print_answers(questions, chosen[HEADLINE], show)
    best = dict(methods[HEADLINE])
    result = {
        "headline": HEADLINE, "accuracy": best.pop("share"), **best, "questions": len(questions),
        "chance": CHANCE, "shots": shots, "methods": methods,
        "longest_option": length_baseline(questions, max),
        "shortest_option": length_baseline(questions, min),
        **unknown_characters(tokenizer, questions),
        "fewer_shots": scorer.fewer_shots, "cut_questions": scorer.cut_questions,
        "no_room": scorer.no_room, "letter_cut": scorer.letter_cut, "letter_no_room": scorer.letter_no_room,
        "subjects": by_subject(questions, chosen[HEADLINE]),
    }
    return result, questions


def summary(right, n, n_ties):
    """What one method reached, as a dict."""
    interval = wilson_interval(right, n)
    return {"share": right / n, "right": right, "ties": n_ties, "interval": interval,
            "within_chance": interval[0] <= CHANCE <= interval[1]}


def unknown_characters(tokenizer, questions):
    """How many questions have characters outside the vocabulary in an option, and in their text."""
    options = sum(bool(tokenizer.unknown("".join(question.options))) for question in questions)
    texts = sum(bool(tokenizer.unknown(question.text)) for question in questions)
    return {"unknown_in_options": options, "unknown_in_question": texts}


def by_subject(questions, chosen):
    """{subject: accuracy}, a subject for each file."""
    right = {}
    for question, choice in zip(questions, chosen, strict=True):
        right.setdefault(question.subject, []).append(choice == question.answer)
    return {subject: sum(row) / len(row) for subject, row in right.items()}


def print_answers(questions, chosen, show):
    """Print the first `show` right and the first `show` wrong answers."""
    for is_right in (True, False):
        rows = [(q, c) for q, c in zip(questions, chosen, strict=True) if (c == q.answer) == is_right]
        for question, choice in rows[:show]:
            got = "no single option" if choice is None else question.options[choice]
            wanted = "" if is_right else f"   (expected {question.right_option})"
            print(f"  {'right' if is_right else 'wrong'}: {question.text} → {got}{wanted}")


def print_table(result):
    """The scores of `score_choices` for people."""
    print(f"{result['questions']} questions, {result['shots']} examples before each; chance {CHANCE:.1%}, "
          f"longest option {result['longest_option']:.1%}, shortest {result['shortest_option']:.1%}")
    for method, row in result["methods"].items():
        low, high = row["interval"]
        facts = f"{row['share']:.1%}  ({low:.1%} to {high:.1%})  {row['right']} right, {row['ties']} ties"
        verdict = "below chance" if high < CHANCE else "above chance"
        if row["within_chance"]:
            verdict = "within chance"
        print(f"  {method:14} {facts}  {verdict}{'  (headline)' if method == HEADLINE else ''}")
    for name, words in (("unknown_in_options", "have an option with characters outside the vocabulary"),
                        ("unknown_in_question", "have a text with characters outside the vocabulary"),
                        ("fewer_shots", "were asked after fewer examples, for want of room"),
                        ("cut_questions", "lost their beginning, for want of room"),
                        ("no_room", "had no room for their longest option, and count as wrong"),
                        ("letter_cut", "lost their beginning when asked for the letter")):
        if result[name]:
            print(f"  {result[name]} questions {words}")
