"""inference.py: one answer, conversations, long prompts, mistakes."""

import contextlib
import io
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
from conftest import Workspace

import checkpoint as ckpt
import inference
import inference_ds
from generate import generate

SFT = "checkpoint/sft_last.pt"
GREEDY = ["-t", 0, "-r", 1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace whose model knows the sample pairs by heart."""
    workspace = Workspace(tmp_path_factory.mktemp("chat"))
    workspace.train("-t", "sft", "--from_checkpoint", "", "--max_steps", 150, "--learning_rate", 1e-2,
                    "--eval_interval", 1000, "--batch_size", 16, "--gradient_accumulation_steps", 1)
    workspace.train("--max_steps", 3)
    return workspace


def said(trained, capsys, *words, stdin=None):
    """What inference.py prints: standard output and standard error."""
    capsys.readouterr()
    stream = io.TextIOWrapper(io.BytesIO((stdin or "").encode()), encoding="utf-8")
    with trained.here("inference.py", *words), mock.patch.object(sys, "stdin", stream):
        inference.main()
    return capsys.readouterr()


def test_p_answers_once_and_exits(trained, capsys):
    assert said(trained, capsys, "-i", "-m", SFT, "-p", "after B?", *GREEDY).out == "C.\n"


def test_int8_weights_give_the_trained_answer(trained, capsys):
    assert said(trained, capsys, "-i", "-m", SFT, "-p", "after B?", "--int8", *GREEDY).out == "C.\n"


def test_without_i_a_text_is_continued(trained, capsys):
    out = said(trained, capsys, "-m", "checkpoint/pretrain_last.pt", "-p", "The", *GREEDY, "-l", 20).out
    assert len(out.rstrip("\n")) <= 20 and out.endswith("\n")


def test_a_conversation_reads_the_turns_before_and_reset_forgets_them(trained, capsys):
    """The second prompt holds the first turn; after /reset it does not."""
    prompts = []
    with mock.patch.object(inference, "answer",
                           side_effect=lambda model, tok, ids, *_: prompts.append(tok.decode(ids)) or "A."):
        said(trained, capsys, "-i", "-m", SFT, stdin="after B?\nafter C\n/reset\nafter D\n")
    ask = "<|InstructMark|>{}<|ResponseMark|>".format
    assert prompts == [ask("after B?"), ask("after B?") + "A.<|eos|>" + ask("after C"), ask("after D")]


def test_the_penalty_covers_the_current_turn_of_a_conversation_and_the_whole_prompt_outside(trained, capsys):
    """Each second call of `generate` reads the first turn too; the penalty begins with the question."""
    lines = "after B?\nafter C\n"
    for mode, lengths in ((["-i"], [10, 9]), ([], [8, 7])):
        calls = []

        def noted(model, idx, *args, penalty_start, calls=calls, **options):
            calls.append((idx.size(1), penalty_start, args[7]))
            return generate(model, idx, *args, penalty_start=penalty_start, **options)
        with mock.patch.object(inference, "generate", noted):
            said(trained, capsys, *mode, "-m", SFT, "--repeat_last_n", 9, *GREEDY, stdin=lines)
        assert [size - start for size, start, _ in calls] == lengths
        assert [window for _, _, window in calls] == [9, 9]
        assert (calls[1][1] > 0) == bool(mode)  # a conversation has an earlier turn


@pytest.mark.parametrize("temperature", ["1e-5", "1e-40", "1e-320"])
def test_a_tiny_temperature_gives_the_likeliest_answer(trained, capsys, temperature):
    assert said(trained, capsys, "-i", "-m", SFT, "-p", "after B?", "-t", temperature, "-r", 1).out == "C.\n"


def test_with_a_seed_the_compiler_of_decode_c_is_waited_for(trained, capsys):
    words = ["-m", "checkpoint/pretrain_last.pt", "-p", "The", "-l", 12]
    with mock.patch.object(inference.native, "wait") as wait:
        said(trained, capsys, *words)
        assert not wait.called
        said(trained, capsys, *words, "--seed", 1)
        assert wait.called


@pytest.mark.skipif(os.name != "posix", reason="the redirections are a POSIX shell's")
@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_a_conversation_without_a_traceback(trained, redirection):
    words = shlex.join([sys.executable, "inference.py", "-i", "-m", SFT, *map(str, GREEDY)])
    result = subprocess.run(["sh", "-c", f"exec {words} {redirection}"], cwd=trained.path,
                            input=b"after B?\n", capture_output=True)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr.decode()
    assert result.stdout == (b"C.\n" if redirection == "2>&-" else b"")


def test_an_argument_that_is_not_utf8_is_a_prompt_of_unknown_characters(trained):
    words = [sys.executable, "inference.py", "-i", "-m", SFT, "-p", b"after \xff\xfe?", "-l", "20"]
    result = subprocess.run(words, cwd=trained.path, capture_output=True)
    assert result.returncode == 0 and not result.stderr and result.stdout.endswith(b"\n")


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal that a test can hold")
@pytest.mark.parametrize("without_readline", [False, True])
def test_in_a_terminal_ctrl_c_ends_the_answer_and_the_conversation_goes_on(
        trained, tmp_path, without_readline):
    """A real terminal. The first answer would be long: the model knows the letters, not when to stop."""
    import pty
    if without_readline:
        (tmp_path / "readline.py").write_text("raise ModuleNotFoundError('No module named readline')")
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(trained.path)
        os.environ["PYTHONPATH"] = str(tmp_path)
        os.execv(sys.executable, [sys.executable, "inference.py", "-i", "-m", "checkpoint/pretrain_last.pt",
                                  "-l", "100000", "-r", "1", "--seed", "1"])
    shown = b""

    def read_until(text, seconds=60):
        nonlocal shown
        end = time.monotonic() + seconds
        while text not in shown:
            assert time.monotonic() < end, shown.decode("utf-8", "replace")
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 65536)
        shown = shown.split(text, 1)[1]

    read_until(b"> ")
    os.write(terminal, b"after B?\n")
    read_until(b"after B?\r\n")
    while len(shown) < 50:
        shown += os.read(terminal, 65536)
    os.write(terminal, b"\x03")
    read_until(b"\r\n> ")
    os.write(terminal, b"\x04")
    with contextlib.suppress(OSError):
        while more := os.read(terminal, 65536):
            shown += more
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert b"Traceback" not in shown


def test_a_conversation_from_standard_input_ends_with_it(trained, capsys):
    out = said(trained, capsys, "-i", "-m", SFT, *GREEDY, stdin="after B?\n\n/reset\nafter C?\n").out
    assert out == "C.\nD.\n"


def test_without_i_every_line_stands_alone_and_reset_is_a_text(trained, capsys):
    prompts = []
    with mock.patch.object(inference, "answer",
                           side_effect=lambda model, tok, ids, *_: prompts.append(tok.decode(ids)) or "x"):
        said(trained, capsys, "-m", SFT, stdin="The\nletter\n")
    assert prompts == ["The", "letter"]


def test_text_streams_as_it_is_generated(trained, capsys):
    """Each token is printed, and flushed, before the next is drawn."""
    printed = []
    with mock.patch("builtins.print", side_effect=lambda *a, **k: printed.append((a, k.get("flush")))):
        said(trained, capsys, "-i", "-m", SFT, "-p", "after B?", *GREEDY)
    assert printed[:2] == [(("C",), True), ((".",), True)]


def test_a_long_prompt_keeps_its_end_and_says_so(trained, capsys):
    question = "C" * 40 + "after B?"
    result = said(trained, capsys, "-i", "-m", SFT, "-p", question, *GREEDY)
    assert "(the prompt has 50 tokens; its last 24 are used)" in result.err
    assert inference.fit_prompt(list(range(10)), 4, 1) == [0, 7, 8, 9]
    assert inference.fit_prompt(list(range(10)), 4, 0) == [6, 7, 8, 9]
    assert inference.fit_prompt(list(range(4)), 4, 1) == [0, 1, 2, 3]


def test_a_conversation_that_has_become_long_is_called_one(trained, capsys):
    lines = "".join(f"after {letter}\n" for letter in "BCDEFG")
    printed = said(trained, capsys, "-i", "-m", SFT, *GREEDY, stdin=lines).err
    assert "(the conversation has " in printed and "prompt" not in printed


def test_max_length_counts_the_prompt(trained, capsys):
    words = ["-m", "checkpoint/pretrain_last.pt", "-p", "letter", "--seed", 1]
    assert len(said(trained, capsys, *words, "-l", 8).out) <= 2 + 1
    assert len(said(trained, capsys, *words, "-l", 80, "-k", 0).out) > 33  # beyond the context of 32


def test_the_seed_decides_the_text(trained, capsys):
    words = ["-m", "checkpoint/pretrain_last.pt", "-p", "The", "-l", 30, "-k", 0]
    first, again, other = (said(trained, capsys, *words, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_a_questions_special_token_text_is_ordinary_text(trained, capsys):
    """Nobody ends a turn, or opens one, by typing the mark."""
    model, tokenizer = ckpt.build_model(ckpt.load(trained.path / SFT))
    ids = inference.prompt_ids(tokenizer, [], "a<|eos|><|InstructMark|>b", instruct=True)
    assert ids.count(tokenizer.instruct_id) == ids.count(tokenizer.response_id) == 1
    assert tokenizer.eos_id not in ids
    assert tokenizer.eos_id not in inference.prompt_ids(tokenizer, [], "a<|eos|>b", instruct=False)


def test_an_empty_prompt_starts_from_bos(trained, capsys):
    assert said(trained, capsys, "-m", "checkpoint/pretrain_last.pt", "-p", "", "-l", 5).out.endswith("\n")


@pytest.mark.parametrize("words, message", [
    (["-t", "-1"], "temperature is -1.0, but must be 0 or above"),
    (["-t", "nan"], "temperature is nan"),
    (["-t", "warm"], "argument -t/--temperature: invalid float value: 'warm'"),
    (["-k", "-1"], "top_k is -1"),
    (["-k", "1.5"], "argument -k/--top_k: invalid int value: '1.5'"),
    (["-r", "0"], "repetition_penalty is 0.0"),
    (["--repeat_last_n", "-2"], "repeat_last_n is -2, but must be -1 (all), 0 (off) or above"),
    (["--top_p", "0"], "top_p is 0.0"),
    (["--top_p", "1.5"], "top_p is 1.5"),
    (["-l", "1"], "max_length is 1, but must be at least 2"),
    (["-l", "-5"], "max_length is -5"),
    (["--seed", "-1"], "seed is -1"),
    (["--seed", str(2**64)], "seed is 18446744073709551616"),
    (["--device", "gpu"], 'device "gpu" is unknown'),
    (["--temprature", "1"], "did you mean \"--temperature\""),
    (["-m", "checkpoint/gone.pt"], "gone.pt: no such file; "),
])
def test_a_mistake_is_one_line(trained, words, message):
    assert message in trained.refused(inference.main, "-m", SFT, "-p", "x", *words)


def test_standard_input_that_is_not_utf8_is_one_line(trained):
    stream = io.TextIOWrapper(io.BytesIO(b"after B?\n\xff\xfe\n"), encoding="utf-8")
    with mock.patch.object(sys, "stdin", stream):
        assert "standard input: not UTF-8" in trained.refused(inference.main, "-m", SFT)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_converted_model_older_than_the_newest_checkpoint_is_not_used_silently(
        tmp_path, monkeypatch, capsys, form):
    folder, converted = tmp_path / "ds", tmp_path / "ds" / "ckpt_ds.pt"
    monkeypatch.setattr(inference_ds, "FOLDER", str(folder))
    monkeypatch.setattr(inference_ds, "CONVERTED", str(converted))
    folder.mkdir()
    assert inference_ds.model_path() == str(folder)
    (folder / "latest").write_text("pretrain_step_20\n")
    if form == "folder":
        converted.mkdir()
    weights = converted / "pytorch_model.bin" if form == "folder" else converted
    weights.write_text("weights")
    os.utime(folder / "latest", (1000, 1000))
    os.utime(weights, (2000, 2000))
    assert inference_ds.model_path() == str(converted) and capsys.readouterr().err == ""
    os.utime(folder / "latest", (3000, 3000))
    assert inference_ds.model_path() == str(folder)
    line = capsys.readouterr().err
    assert "pretrain_step_20: ckpt_ds.pt is older" in line
    assert "python zero_to_fp32.py . ckpt_ds.pt" in line and line.count("\n") == 1


def test_ctrl_c_and_end_of_input_leave_cleanly(trained):
    """A real process: it answers, waits for the next line, and goes without a traceback.

    Ctrl-C counts also where the tests run in the background, whose processes begin with it ignored."""
    for end, status in ((lambda p: p.stdin.close(), 0), (lambda p: p.send_signal(signal.SIGINT), 130)):
        process = subprocess.Popen([sys.executable, "inference.py", "-i", "-m", SFT, "-t", "0", "-r", "1"],
                                   cwd=trained.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        process.stdin.write(b"after B?\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"C.\n"
        for _ in range(4):  # a signal in the instant before Python waits for a line is heeded at the next
            end(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        assert process.poll() == status
        assert b"Traceback" not in process.stderr.read()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
