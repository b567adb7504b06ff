"""The sample data is true, the same every time, and its held-out questions were kept out of training."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from script import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "dataset", "make_sample.py")
spec = importlib.util.spec_from_file_location("make_sample", SCRIPT)
make_sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_sample)
normalise = make_sample.normalise


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(what `write_sample` returned, pretraining text, training rows, held-out rows)."""
    result = make_sample.write_sample(str(tmp_path_factory.mktemp("sample")))
    with open(result["pretrain"], encoding="utf-8") as file:
        text = file.read()
    rows = []
    for name in ("sft", "heldout"):
        with open(result[name], encoding="utf-8") as file:
            rows.append([json.loads(line) for line in file])
    return result, text, *rows


def turns(row):
    """[(question, answer), ...] of a row of either form."""
    if "question" in row:
        return [(row["question"], row["answer"])]
    texts = [message["content"] for message in row["messages"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def is_follow_up(question):
    return re.fullmatch(r"那.+呢？?|And .+\?", question) is not None


def training_pairs(rows):
    """Every training pair whose question stands on its own."""
    return [pair for row in rows for pair in turns(row) if not is_follow_up(pair[0])]


def asked():
    """Every (family, ask, fact)."""
    families = make_sample.FAMILIES
    return [(family, ask, fact) for family in families for ask in family.asks for fact in family.facts]


# Held-out questions


def test_no_heldout_question_occurs_in_training(made):
    _, text, training, held_out = made
    corpus = normalise(text)
    questions = "\n".join(normalise(question) for row in training for question, _ in turns(row))
    for row in held_out:
        assert normalise(row["question"]) not in corpus
        assert normalise(row["question"]) not in questions


def test_a_heldout_template_is_kept_back_for_every_fact(made):
    _, text, training, _ = made
    corpus = normalise(text)
    questions = "\n".join(normalise(question) for row in training for question, _ in turns(row))
    for _, ask, fact in asked():
        for template in make_sample.forms(ask.held):
            question = normalise(template.format(**fact))
            assert question not in corpus and question not in questions


def test_a_heldout_question_is_more_than_a_training_question_with_words_around_it(made):
    _, _, training, held_out = made
    known = {normalise(question) for question, _ in training_pairs(training)}
    for row in held_out:
        question = normalise(row["question"])
        assert not [other for other in known if other in question]


def test_every_heldout_answer_is_a_training_answer(made):
    _, _, training, held_out = made
    assert {row["answer"] for row in held_out} <= {answer for _, answer in training_pairs(training)}


def test_every_family_keeps_wordings_back():
    for family in make_sample.FAMILIES[:-1]:
        assert all(len(make_sample.forms(ask.held)) >= 2 for ask in family.asks)


def test_normalise_sees_through_politeness():
    for question in ("请问字母B怎么读", "你好，字母B怎么读？", "字母B怎么读呢", "老师，字母B怎么读呢？"):
        assert normalise(question) == "字母b怎么读"


def test_normalise_keeps_a_morse_code_whole():
    assert normalise("听到-...是哪个字符？") != normalise("听到-..是哪个字符？")
    assert normalise("Tell me QTH.") == normalise("tell me QTH")


# Questions and answers


def test_a_question_has_one_answer(made):
    _, _, training, held_out = made
    answers = {}
    for question, answer in training_pairs(training) + training_pairs(held_out):
        assert answers.setdefault(normalise(question), answer) == answer, question


def test_a_fact_has_one_answer_in_a_direction():
    answers = [ask.answer.format(**fact) for _, ask, fact in asked()]
    assert len(answers) == len(set(answers))


def test_every_fact_is_asked_often(made):
    _, _, training, _ = made
    counts = {}
    for _, answer in training_pairs(training):
        counts[answer] = counts.get(answer, 0) + 1
    for _, ask, fact in asked():
        assert counts[ask.answer.format(**fact)] >= (8 if ask.english else 15)


def test_there_are_at_least_ten_wordings_for_each_direction():
    for family in make_sample.FAMILIES[:-1]:
        for ask in family.asks:
            assert len(ask.questions()) >= 10, ask.answer


def test_questions_and_answers_are_short(made):
    _, _, training, held_out = made
    pairs = [pair for row in training + held_out for pair in turns(row)]
    chinese = [pair for pair in pairs if re.search("[一-鿿]", pair[0])]
    assert max(len(answer) for _, answer in chinese) <= 30
    assert max(len(answer) for _, answer in pairs) <= 45
    assert sum(len(question) <= 40 for question, _ in pairs) > 0.97 * len(pairs)
    for row in training:  # with three marks a turn
        assert sum(len(question) + len(answer) + 3 for question, answer in turns(row)) <= 128


def test_conversations_have_two_or_three_turns_and_make_up_a_tenth(made):
    _, _, training, _ = made
    talks = [row for row in training if "messages" in row]
    assert 0.08 < len(talks) / len(training) < 0.14
    for row in talks:
        assert len(turns(row)) in (2, 3)
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * len(turns(row))
        assert not is_follow_up(turns(row)[0][0])


# Files


def test_sizes_are_as_documented(made):
    result, text, training, held_out = made
    assert 1.2e6 <= len(text.encode("utf-8")) == result["bytes"] <= 1.8e6
    assert 4000 <= len(training) == result["rows"] <= 6000
    assert 200 <= len(held_out) == result["held_out"] <= 300
    english = [question for question, _ in training_pairs(training) if not re.search("[一-鿿]", question)]
    assert 0.10 <= len(english) / len(training_pairs(training)) <= 0.15
    everything = text + json.dumps(training + held_out, ensure_ascii=False)
    assert len(set(everything)) < 1200


def test_every_character_of_a_question_or_an_answer_occurs_in_the_corpus(made):
    """A tokenizer made from the pretraining text alone knows them all."""
    _, text, training, held_out = made
    asked_for = "".join(question + answer for row in training + held_out for question, answer in turns(row))
    assert set(asked_for) <= set(text)


def test_a_document_lies_between_its_marks(made):
    result, text, _, _ = made
    documents = re.findall(r"<\|bos\|>(.+?)<\|eos\|>\n", text, flags=re.DOTALL)
    assert "".join(f"<|bos|>{document}<|eos|>\n" for document in documents) == text
    assert len(documents) == result["documents"]
    assert not [document for document in documents if "<|" in document or "{" in document or "[" in document]


def test_the_same_seed_writes_the_same_bytes(made, tmp_path):
    again = make_sample.write_sample(str(tmp_path))
    other = make_sample.write_sample(str(tmp_path / "other"), seed=7)
    for name in ("pretrain", "sft", "heldout"):
        first, second, third = (pathlib.Path(result[name]).read_bytes() for result in (made[0], again, other))
        assert first == second != third
        assert b"\r" not in first


def run_script(folder):
    return subprocess.run([sys.executable, SCRIPT, "--out", str(folder)], capture_output=True, text=True)


def test_the_script_writes_into_a_new_folder_and_leaves_no_other_file(tmp_path):
    folder = tmp_path / "deep" / "sample"
    done = run_script(folder)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(folder)) == ["sample_heldout.jsonl", "sample_pretrain.txt", "sample_sft.jsonl"]


def test_a_folder_that_cannot_be_written_is_one_line_and_status_2(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run_script(tmp_path / "file")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "file" in done.stderr


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "sample.txt"
    path.write_text("old")

    def lines():
        yield "new"
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="sample.txt: cannot be written"):
        make_sample.write_lines(str(path), lines())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["sample.txt"]


# Facts


def test_every_fact_is_told_in_the_corpus(made):
    """Question and answer stand within one line, 30 times or more; a code or a number counts only whole."""
    _, text, _, _ = made
    lines = text.split("\n")
    for _, ask, fact in asked():
        said = {fact[field] for field in re.findall(r"{(\w+)}", ask.answer)}
        if said and not ask.english:
            whole = [re.compile(rf"(?<![\w.-]){re.escape(v)}(?![\w-]|\.[.\d-])", re.ASCII) for v in said]
            near = lines
            for value in said:  # the patterns are slow: let them see few lines
                near = [line for line in near if value in line]
            assert sum(all(value.search(line) for value in whole) for line in near) >= 30, fact


def test_the_corpus_tells_and_asks_in_english_too(made):
    _, text, _, _ = made
    documents = text.split("<|eos|>\n")
    english = [document for document in documents if not re.search("[一-鿿]", document)]
    assert 0.05 < len(english) / len(documents) < 0.2


def test_the_number_of_facts_is_small_enough_to_learn():
    assert 200 <= sum(len(family.facts) for family in make_sample.FAMILIES) <= 260


def test_the_alphabet_is_whole_and_each_word_begins_with_its_letter():
    assert "".join(fact["letter"] for fact in make_sample.ALPHABET) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert all(fact["word"].startswith(fact["letter"]) for fact in make_sample.ALPHABET)


def test_morse_codes_are_whole_distinct_and_of_the_right_length():
    codes = {fact["char"]: fact["code"] for fact in make_sample.MORSE}
    assert len(codes) == len(set(codes.values())) == 36
    for digit in range(10):  # a digit is five marks: 1 to 5 begin with as many dots, 6 to 0 with dashes
        dots = "." * digit + "-" * (5 - digit) if digit <= 5 else "-" * (digit - 5) + "." * (10 - digit)
        assert codes[str(digit)] == dots
    letters = [code for char, code in codes.items() if char.isalpha()]
    possible = sum(2**length for length in range(1, 5))
    assert possible - len(letters) == 4  # Morse leaves four codes of up to four marks unused
    assert not {"..--", ".-.-", "---.", "----"} & set(letters)


def test_conversions_are_what_arithmetic_says():
    families = {family.title: family.facts for family in make_sample.FAMILIES}
    for fact in families["千赫和兆赫"]:
        assert float(fact["khz"]) == pytest.approx(1000 * float(fact["mhz"]))
    for fact in families["频率和波长"]:
        assert float(fact["metres"]) == pytest.approx(300 / float(fact["mhz"]))
    for fact in families["功率和dBm"]:
        number, unit = fact["power"].split()
        milliwatts = float(number) * {"mW": 1, "W": 1000}[unit]
        assert 10 ** (float(fact["dbm"]) / 10) == pytest.approx(milliwatts, rel=0.01)
    for fact in families["分贝和倍数"]:
        assert 10 ** (float(fact["db"]) / 10) == pytest.approx(float(fact["ratio"]), rel=0.01)


def test_a_band_lies_in_its_range_and_near_its_wavelength():
    limits = {"MF": (0.3, 3), "HF": (3, 30), "VHF": (30, 300), "UHF": (300, 3000)}
    for fact in make_sample.BAND:
        low, high = (float(edge) for edge in fact["range"].removesuffix(" MHz").split("-"))
        least, most = limits[re.search("[A-Z]+", fact["cls"])[0]]
        assert least <= low < high <= most
        number, unit = re.fullmatch("([0-9]+)(厘?米)", fact["band"]).groups()
        metres = float(number) / {"米": 1, "厘米": 100}[unit]
        assert 300 / high * 0.93 <= metres <= 300 / low * 1.08


def test_a_report_has_five_grades_of_readability_and_nine_of_strength_and_tone():
    items = [fact["item"] for fact in make_sample.RST]
    assert items == [f"R{n}" for n in range(1, 6)] + [f"{kind}{n}" for kind in "ST" for n in range(1, 10)]
