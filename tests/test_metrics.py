"""The training log: what is written is what is read."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics import Log, parse_line, parse_log, train_line, val_line
from script import InputError

number = st.floats(0, 1e12)
count = st.integers(0, 10**12)


@given(number, count, number, number, st.floats(1e-3, 1e6), number, number, count, number, number)
def test_a_training_line_reads_back_as_it_was_written(epoch, step, loss, lr, seconds, rate, flops, tokens,
                                                      time, norm):
    got = parse_line(train_line(epoch, step, loss, lr, seconds, rate, flops, tokens, time, norm))
    assert (got["step"], got["tokens"]) == (step, tokens)
    assert got["loss"] == pytest.approx(loss, abs=1e-6)
    assert got["lr"] == pytest.approx(lr, rel=1e-3)
    assert got["ms/step"] == pytest.approx(seconds * 1e3, abs=0.1)
    assert got["tokens/s"] == pytest.approx(rate, abs=1)
    assert got["gflop/s"] == pytest.approx(flops / 1e9, abs=0.1)
    assert got["norm"] == pytest.approx(norm, rel=1e-3)
    assert got["epoch"] == pytest.approx(epoch, abs=1e-3) and got["time"] == pytest.approx(time, abs=0.1)


@given(count, number, number, count, number)
def test_a_validation_line_reads_back_as_it_was_written(step, val_loss, best, tokens, time):
    got = parse_line(val_line(step, val_loss, best, tokens, time))
    assert got["val_loss"] == pytest.approx(val_loss, abs=1e-6) and "loss" not in got
    assert got["best_val_loss"] == pytest.approx(best, abs=1e-6)
    assert (got["step"], got["tokens"]) == (step, tokens)


@given(st.text() | st.text("Step: 0123456789|LosEpchval_ .e-naif"))
def test_any_line_gives_numbers_or_nothing(line):
    got = parse_line(line)
    assert got is None or ("step" in got and all(isinstance(value, float) for value in got.values()))


@given(st.lists(st.sampled_from(["train", "val", "noise"]), max_size=8), st.integers(0, 200))
def test_a_log_cut_anywhere_gives_its_whole_lines(tmp_path_factory, kinds, lost):
    """A run that is killed, or read while it writes: no half number is taken for a whole one."""
    made = {"train": train_line(0.1, 5, 2.345678, 1e-3, 0.1, 10, 10, 100, 1.0, 0.5),
            "val": val_line(5, 2.345678, 2.3, 100, 1.0), "noise": "你好 | x"}
    text = "".join(made[kind] + "\n" for kind in kinds).encode()
    path = tmp_path_factory.getbasetemp() / "cut.log"
    path.write_bytes(text[: max(0, len(text) - lost)])
    whole = path.read_bytes().count(b"\n")
    train, val = parse_log(path)
    assert len(train) == kinds[:whole].count("train") and len(val) == kinds[:whole].count("val")
    assert {line["loss"] for line in train} <= {2.345678} and {line["val_loss"] for line in val} <= {2.345678}


def test_a_loss_that_is_not_finite_is_read_as_such():
    assert math.isnan(parse_line(train_line(0, 1, math.nan, 1e-3, 1, 1, 1, 1, 1, 1))["loss"])
    assert parse_line(val_line(1, math.inf, math.inf, 1, 1))["val_loss"] == math.inf


def test_two_logs_of_the_same_second_have_two_names(tmp_path):
    first = Log(tmp_path)
    second = Log(tmp_path)
    first.write("one")
    second.write("two")
    assert first.stamp != second.stamp
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["one\n", "two\n"]


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = Log(tmp_path)
    log.write("Step: 1")
    assert (tmp_path / log.name).read_text() == "Step: 1\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match="gone: cannot write the training log"):
        Log(tmp_path / "gone")
