"""How many questions of a test occur in training text: exact copies, near copies and paraphrases.

    python evaluate.py -m FILE --ceval DIR --contamination dataset/pretrain.txt dataset/sft.jsonl

Only letters and digits are compared, in lower case and in Unicode's form NFKC. Training text is compared a
unit at a time: a line, a piece of at most LONGEST_UNIT characters of a longer line, or a conversation. A unit
holds a question as

    exact        the whole question is in it
    near         at least NEAR of the question's 4-grams are in it (containment; Broder 1997)
    paraphrase   the whole right answer is in it, and at least PARAPHRASE of the question's 4-grams

The n-grams are runs of four characters, since Chinese has no blanks between words. A question of fewer than
SHORTEST characters counts as in a unit only if the right answer is in it too: "QTH" alone proves nothing.
A copy that runs across two units is not found. The rule rather finds too much than too little: sibling
questions that differ in a number are near copies of each other.
"""

import re
import tempfile
import unicodedata
from collections import Counter, defaultdict

from corpus.inputs import ROWS, open_inputs
from corpus.rows import read_conversations
from corpus.split import Counts
from corpus.text import read_text

N = 4  # characters of an n-gram
NEAR = 0.6
PARAPHRASE = 0.25
SHORTEST = 8
LONGEST_UNIT = 500
PIECE = re.compile(rf".{{1,{LONGEST_UNIT}}}(?:[。！？!?；;]|$)|.{{1,{LONGEST_UNIT}}}")
KINDS = ("exact", "near", "paraphrase")


def normalise(text):
    """The letters and digits of a text in NFKC and lower case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


def ngrams(text):
    """The distinct n-grams of a normalised text; of a shorter one, the text itself."""
    return {text[i : i + N] for i in range(max(1, len(text) - N + 1))}


class QuestionIndex:
    """Finds which of some questions a unit of training text holds.

    pairs: list of (question, right answer)."""

    def __init__(self, pairs):
        self.questions = [normalise(question) for question, _ in pairs]
        self.answers = [normalise(answer) for _, answer in pairs]
        self.n_ngrams = [len(ngrams(question)) for question in self.questions]
        self.places = defaultdict(list)  # n-gram -> numbers of the questions that hold it
        for number, question in enumerate(self.questions):
            for ngram in ngrams(question) if question else ():
                self.places[ngram].append(number)
        # A question shorter than an n-gram equals none of a unit's n-grams, but part of one.
        self.tiny = [i for i, question in enumerate(self.questions) if 0 < len(question) < N]

    def find(self, unit):
        """The questions that a unit holds: a dict, number -> one of KINDS."""
        text = normalise(unit)
        shared = Counter()
        for ngram in ngrams(text):
            shared.update(self.places.get(ngram, ()))
        for number in self.tiny:
            shared[number] = int(self.questions[number] in text)
        found = {}
        for number, n in shared.items():
            kind = self.kind_of(number, n / self.n_ngrams[number], text)
            if kind:
                found[number] = kind
        return found

    def kind_of(self, number, containment, text):
        question = self.questions[number]
        answer = self.answers[number]
        if containment < PARAPHRASE:
            return None
        has_answer = bool(answer) and answer in text.replace(question, "", 1)
        if len(question) < SHORTEST and not has_answer:
            return None
        if question in text:
            return "exact"
        if containment >= NEAR:
            return "near"
        return "paraphrase" if has_answer else None


def units_of_line(line):
    """A line as a list of units."""
    return [line] if len(line) <= LONGEST_UNIT else PIECE.findall(line)


def read_units(path):
    """Yield the units of a file (folder, glob, archive) of text or of questions and answers.

    Raises InputError for what cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        for source in open_inputs([path], None, folder):
            if source.kind == ROWS:
                for turns in read_conversations([source], Counts()):
                    yield " ".join([text for turn in turns for text in turn])
                continue
            rest = ""
            for text in read_text(source, Counts()):
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    yield from units_of_line(line)
            yield from units_of_line(rest)


def count_contamination(pairs, paths):
    """How many of the (question, right answer) pairs occur in the training text of some files, as a dict.

    A question counts once, as the first of KINDS that any unit gives it."""
    index = QuestionIndex(pairs)
    kinds = {}
    for path in paths:
        for unit in read_units(path):
            for number, kind in index.find(unit).items():
                kinds[number] = min(kind, kinds.get(number, kind), key=KINDS.index)
    counts = Counter(kinds.values())
    return {"questions": len(pairs), **{kind: counts[kind] for kind in KINDS},
            "contaminated": len(kinds) / max(1, len(pairs)), "files": list(paths)}
