"""studies/radio_exam.py: what is held out of the training files, and what stays in them."""

import contextlib
import io
import json
import random
import sys

import pytest

from corpus.rows import load_conversations
from scoring.contamination import QuestionIndex, count_contamination, normalise
from scoring.multiple_choice import read_choices
from script import run_script
from studies import radio_exam

RNG = random.Random(0)
TOPICS = ["".join(chr(RNG.randrange(0x4E00, 0x9FA0)) for _ in range(20)) for _ in range(10)]


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """The folder that the script wrote, and the JSON of its last line."""
    folder = tmp_path_factory.mktemp("exam")
    rows = []
    for i, topic in enumerate(TOPICS):
        for band in (20, 40):  # near copies of each other
            answer = f"第{i}种的正确回答是{band}号方案甲"
            rows.append(f"{i}_{band},{topic}在{band}米波段是：,"
                        f"{answer},错误的甲{i},错误的乙{i},错误的丙{i},A\n")
    (folder / "bank.csv").write_text("id,question,A,B,C,D,answer\n" + "".join(rows))
    questions = read_choices(folder / "bank.csv")
    ham = folder / "ham"
    ham.mkdir()
    text = [f"{q.text}{'。'.join(q.options)}。" for q in questions]
    text.insert(3, "这一行与考试无关。" * 200)  # longer than a unit
    (ham / "pretrain.txt").write_text("\n".join(text) + "\n")
    pairs = [(q.text, q.right_option) for q in questions]
    pairs += [(f"请问哪种才对{q.subject}", q.right_option) for q in questions]
    pairs.append(("你是谁", "一个模型"))
    (ham / "sft.jsonl").write_text("".join(
        json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    output = io.StringIO()
    words = ["radio_exam", "--bank", folder / "bank.csv", "--ham", ham, "--out", folder / "out"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", [str(word) for word in words])
        radio_exam.main()
    return folder, json.loads(output.getvalue().splitlines()[-1])


def test_a_fifth_is_held_out_in_whole_groups_of_near_copies(exam):
    folder, result = exam
    held_out = read_choices(folder / "out" / "held_out.csv")
    rest = read_choices(folder / "out" / "rest.csv")
    assert len(held_out) == result["held_out"] == 4 and len(rest) == 16
    assert not {q.text[:15] for q in held_out} & {q.text[:15] for q in rest}


def test_nothing_of_the_held_out_questions_is_in_the_cleaned_files(exam):
    folder, _ = exam
    held_out = read_choices(folder / "out" / "held_out.csv")
    pairs = radio_exam.pairs_of(held_out)
    cleaned = folder / "out" / "understands"
    found = count_contamination(pairs, [str(cleaned / "pretrain.txt"), str(cleaned / "sft.jsonl")])
    assert found["contaminated"] == 0
    answers = {normalise(answer) for _, answer in pairs}
    kept = load_conversations(str(cleaned / "sft.jsonl"))
    assert not answers & {normalise(answer) for turns in kept for _, answer in turns}
    before = count_contamination(pairs, [str(folder / "ham" / "pretrain.txt")])
    assert before["exact"] == 4


def test_the_rest_of_the_text_and_pairs_stays(exam):
    folder, result = exam
    text = (folder / "out" / "understands" / "pretrain.txt").read_text()
    assert "这一行与考试无关。" * 200 in text
    index = QuestionIndex(radio_exam.pairs_of(read_choices(folder / "out" / "rest.csv")))
    found = {number for line in text.splitlines() for number in index.find(line[:200])}
    assert len(found) == 16
    assert [("你是谁", "一个模型")] in load_conversations(str(folder / "out" / "understands" / "sft.jsonl"))
    assert result["pairs"] == [41, 33] and result["removed"]["pairs: same answer"] == 4


def test_the_learnt_files_hold_every_right_answer_and_no_options(exam):
    folder, _ = exam
    questions = read_choices(folder / "bank.csv")
    assert (folder / "out/learnt/pretrain.txt").read_text() == (folder / "ham/pretrain.txt").read_text()
    rows = load_conversations(str(folder / "out" / "learnt" / "sft.jsonl"))
    for question in questions:
        assert rows.count([(question.text, question.right_option)]) == 1 + 3  # ham_radio's, and the bank's
    assert "错误的" not in (folder / "out" / "learnt" / "sft.jsonl").read_text()


def test_shuffled_banks_ask_the_same_with_the_options_moved(exam):
    folder, _ = exam
    bank = read_choices(folder / "bank.csv")
    orders = set()
    for i in range(10):
        moved = read_choices(folder / "out" / "shuffled" / f"bank_{i}.csv")
        assert [q.right_option for q in moved] == [q.right_option for q in bank]
        assert [sorted(q.options) for q in moved] == [sorted(q.options) for q in bank]
        orders.add(tuple(q.answer for q in moved))
    assert len(orders) == 10


def test_a_missing_file_is_one_line(monkeypatch, capsys, tmp_path):
    words = ["radio_exam", "--bank", "gone.csv", "--ham", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        run_script(radio_exam.main)
    assert ended.value.code == 2 and "gone.csv: no such file" in capsys.readouterr().err


def test_one_command_trains_scores_and_asks(exam, workspace):
    folder = exam[0]
    program = "import studies.radio_exam as exam\n" \
              "for part in ('pretrain', 'sft'): exam.RECIPES['learnt'][part] = []\n" \
              "exam.main()"
    ended = workspace.run("-c", program, "--bank", folder / "bank.csv", "--ham", folder / "ham",
                          "--out", "out", "--train", "learnt", "--device", "cpu")
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["questions"] == 20 and result["experiment"] == "learnt"
    scores = result["scores"]
    assert scores["bank"]["questions"] == 20 and scores["shuffled ten ways"]["questions"] == 200
    assert 0 <= scores["bank"]["accuracy"] <= 1
    assert ended.stdout.count("  right:  ") == 10
    saved = workspace.load("sft_last.pt")
    assert saved["step"] == 6 and saved["task"] == "sft"
