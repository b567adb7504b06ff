"""The data loader: epochs, order, ranks, curriculum, padding, and files that it refuses."""

import json
import shutil

import numpy as np
import pytest

from config import IGNORE_INDEX
from corpus.fingerprint import check_vocabulary, fingerprint_path, write_fingerprint
from dataloader import DataLoader, InstructionRows, TextBlocks, evenly_spaced, open_array
from script import InputError
from tokenizer import Tokenizer

BLOCK = 8


@pytest.fixture
def text(tmp_path):
    """A file of running text, token n being n + 10, so that a window tells where it was cut."""
    def make(n=203, name="text.npy", start=10):
        np.save(tmp_path / name, np.arange(start, start + n, dtype=np.uint16))
        return str(tmp_path / name)
    return make


@pytest.fixture
def rows(tmp_path):
    """A file of instruction rows of given lengths; the last third of each carries loss; ids tell the row."""
    def make(lengths, name="sft.npy", first_id=10):
        parts = []
        for i, length in enumerate(lengths):
            mask = np.arange(length) >= length - max(1, length // 3)
            parts += [np.stack([np.full(length, first_id + i), mask], axis=1), np.zeros((1, 2))]
        np.save(tmp_path / name, np.concatenate(parts).astype(np.uint16))
        return str(tmp_path / name)
    return make


def loader(paths, task="pretrain", batch_size=2, block_size=BLOCK, **values):
    paths = [paths] if isinstance(paths, str) else paths
    return DataLoader(paths, task, block_size, batch_size, **values)


def epoch_of(loader):
    return [loader.next_batch() for _ in range(loader.batches_per_epoch)]


def test_an_epoch_visits_every_window_once(text):
    data = loader(text())
    windows = np.concatenate([x for x, _ in epoch_of(data)])
    starts = sorted(windows[:, 0])
    assert len(starts) == data.sources[0].n_rows == 24
    assert set(np.diff(starts)) == {BLOCK}  # neither a gap nor an overlap
    assert (windows == windows[:, :1] + np.arange(BLOCK)).all()
    assert data.epoch == 1.0


def test_targets_are_the_next_tokens(text):
    for x, y in epoch_of(loader(text())):
        assert (y == x + 1).all() and x.shape == y.shape == (2, BLOCK)
        assert x.dtype == y.dtype == np.int64


def test_every_epoch_has_its_own_order_and_cuts_the_text_elsewhere(text):
    data = loader(text())
    epochs = [np.concatenate([x for x, _ in epoch_of(data)])[:, 0] for _ in range(4)]
    assert len({tuple(e) for e in epochs}) == 4
    assert len({min(e) for e in epochs}) > 1


def test_the_order_depends_on_the_seed_alone(text):
    path = text()
    first, again, other = (np.concatenate([x for x, _ in epoch_of(loader(path, seed=seed))])
                           for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    np.random.seed(0)  # the global random state plays no part
    assert np.array_equal(np.concatenate([x for x, _ in epoch_of(loader(path, seed=1))]), first)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_the_ranks_together_read_the_single_process_order(text, rows, task, world_size):
    path = text() if task == "pretrain" else rows([3 + i % 6 for i in range(50)])
    single = loader(path, task)
    ranks = [loader(path, task, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(30):  # more than an epoch
        for rank in ranks:
            for ours, theirs in zip(rank.next_batch(), single.next_batch(), strict=True):
                assert np.array_equal(ours, theirs)


def test_a_loader_continues_where_its_state_says(text):
    path = text()
    data = loader(path)
    for n in range(30):  # across the end of an epoch
        other = loader(path)
        other.load_state_dict(data.state_dict())
        expected = data.next_batch()
        for a, b in zip(other.next_batch(), expected, strict=True):
            assert np.array_equal(a, b), n
        assert other.epoch == data.epoch


def test_several_files_are_walked_in_order_in_every_epoch(text):
    paths = [text(100, "first.npy", 1000), text(60, "second.npy", 2000), text(80, "third.npy", 3000)]
    data = loader(paths)
    for _ in range(2):
        files = [int(x[0, 0]) // 1000 for x, _ in epoch_of(data)]
        assert files == sorted(files) and set(files) == {1, 2, 3}
        assert [files.count(n) for n in (1, 2, 3)] == data.batches


def test_a_fixed_validation_set_is_the_same_at_every_call_and_spread_over_the_file(text):
    data = loader(text(803))
    first = list(data.fixed_batches(5))
    data.next_batch()
    for (x, _), (again, _) in zip(first, data.fixed_batches(5), strict=True):
        assert np.array_equal(x, again)
    starts = np.concatenate([x for x, _ in first])[:, 0]
    assert len(first) == 5 and len(set(starts)) == 10
    assert min(starts) == 10 and max(starts) > 700


def test_a_small_validation_file_gives_what_it_has(text):
    batches = list(loader(text(20)).fixed_batches(100))
    assert [x.shape for x, _ in batches] == [(1, BLOCK)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_validate_the_same_tokens_as_one_process(text, world_size):
    path = text(403)
    whole = [x for x, _ in loader(path).fixed_batches(7)]
    shares = [list(loader(path, rank=r, world_size=world_size).fixed_batches(7)) for r in range(world_size)]
    assert len({len(share) for share in shares}) == 1  # else one would wait for the others for ever
    counted = sorted(int(x[0, 0]) for share in shares for x, y in share if (y != IGNORE_INDEX).any())
    assert counted == sorted(int(x[0, 0]) for x in whole)


def test_only_answers_carry_loss_and_padding_never_does(rows):
    path = rows([4, 9])
    x, y = InstructionRows(path, BLOCK).batch(np.array([0, 1]))
    assert x.tolist() == [[10] * 3 + [0] * 5, [11] * 8]
    none = IGNORE_INDEX
    assert y.tolist() == [[none, none, 10] + [none] * 5, [none] * 5 + [11] * 3]


def test_an_epoch_of_instructions_visits_every_row_once(rows):
    data = loader(rows([3 + (7 * i) % 6 for i in range(40)]), "sft", batch_size=4)
    seen = [int(i) for x, _ in epoch_of(data) for i in x[:, 0]]
    assert sorted(seen) == list(range(10, 50))


def test_rows_left_over_from_one_epoch_are_not_always_the_same(rows):
    data = loader(rows([3 + (7 * i) % 6 for i in range(42)]), "sft", batch_size=4)
    left_over = [frozenset(range(10, 52)) - {int(i) for x, _ in epoch_of(data) for i in x[:, 0]}
                 for _ in range(4)]
    assert all(len(left) == 2 for left in left_over)
    assert len(set(left_over)) > 1


def test_grouping_by_length_pads_less_than_half_of_what_random_batches_would(rows):
    lengths = np.random.default_rng(0).integers(4, 60, 600)
    source = InstructionRows(rows(lengths), 64)

    def padded(order):
        return sum((batch.max() - batch).sum() for batch in lengths[order].reshape(-1, 10))

    grouped = source.epoch_order(np.random.default_rng(1), 10)
    assert padded(grouped) < 0.5 * padded(np.random.default_rng(1).permutation(600))


def test_batches_of_one_epoch_are_not_sorted_by_length(rows):
    data = loader(rows(np.random.default_rng(0).integers(4, 60, 200)), "sft", 10, 64)
    widths = [x.shape[1] for x, _ in epoch_of(data)]
    assert widths != sorted(widths) and widths != sorted(widths)[::-1]


def test_rows_for_validation_are_evenly_spaced_and_without_repeats():
    assert evenly_spaced(100, 5).tolist() == [0, 25, 50, 74, 99]
    assert evenly_spaced(3, 10).tolist() == [0, 1, 2]


def test_a_batch_larger_than_the_data_is_named(text):
    with pytest.raises(InputError, match=r"text.npy: 24 rows are fewer than batch_size 25"):
        loader(text(), batch_size=25).require_full_batches()


def test_text_shorter_than_a_block_is_named(text):
    with pytest.raises(InputError, match=r"text.npy: 8 tokens are fewer than block_size \+ 1 = 9"):
        loader(text(8))


def test_text_of_just_one_block_is_enough(text):
    assert loader(text(9), batch_size=1).next_batch()[0].shape == (1, 8)


def test_a_row_longer_than_the_block_is_named(rows):
    with pytest.raises(InputError, match=r"sft.npy: a row of 10 tokens .* block_size 8"):
        loader(rows([5, 10]), "sft")


def test_an_id_beyond_the_vocabulary_is_named(text):
    for batches in (lambda d: d.next_batch(), lambda d: list(d.fixed_batches(3))):
        with pytest.raises(InputError, match=r"text.npy: holds token id \d+, beyond .* vocabulary of 12"):
            batches(loader(text(), tokenizer=Tokenizer.build(["abcdef"])))


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_a_file_of_the_other_task_is_refused(text, rows, task):
    with pytest.raises(InputError, match="-t"):
        loader(rows([4, 5]) if task == "pretrain" else text(), task)


def test_the_windows_of_a_memory_mapped_file_are_read_only_when_asked_for(text):
    """Data files are mapped, so that one larger than the memory can be trained on."""
    assert isinstance(TextBlocks(text(), BLOCK).tokens, np.memmap)


def test_a_missing_file_says_what_makes_it(tmp_path):
    with pytest.raises(InputError, match=r"gone.npy: no such file; run python data.py"):
        open_array(tmp_path / "gone.npy")


@pytest.mark.parametrize("content", [b"plain text\n", b"\x93NUMPY\x01\0", b""])
def test_what_is_no_array_is_refused_without_advice_to_run_a_pickle(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match="a.txt: not a prepared .npy file.*python data.py") as error:
        open_array(tmp_path / "a.txt")
    assert "pickle" not in str(error.value)


# ---- Vocabularies ----

OURS = Tokenizer.build([map(chr, range(0x4E00, 0x4E00 + 300))])
OTHERS = Tokenizer.build([map(chr, range(0x4E01, 0x4E01 + 300))])


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_a_file_of_another_vocabulary_is_refused_by_name(text, rows, task):
    paths = [text(name="a.npy"), text(name="b.npy")] if task == "pretrain" else [rows([4, 5])] * 2
    for path in paths:
        write_fingerprint(path, OURS)
    assert loader(paths, task, tokenizer=OURS)
    write_fingerprint(paths[1], OTHERS)
    with pytest.raises(InputError, match=rf"{paths[1]}: prepared with another vocabulary than {OURS.name}; "
                                         "run python data.py"):
        loader(paths, task, tokenizer=OURS)


def test_files_without_a_fingerprint_work_and_one_line_says_so(text, tmp_path, capsys):
    paths = [text(name="a.npy"), text(name="b.npy")]
    loaders = [loader(path, tokenizer=OURS) for path in paths]
    assert all(data.next_batch()[0].shape == (2, BLOCK) for data in loaders)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {tmp_path}: files without a fingerprint")


def test_a_fingerprint_follows_a_copied_file_and_not_one_put_in_its_place(text, tmp_path, capsys):
    path = text(name="a.npy")
    write_fingerprint(path, OTHERS)
    copied = str(tmp_path / "copied.npy")
    for end in ("", ".json"):
        shutil.copy(path + end, copied + end)
    with pytest.raises(InputError, match="copied.npy: prepared with another vocabulary"):
        check_vocabulary(copied, OURS)
    np.save(copied, np.zeros(50, np.uint16))
    check_vocabulary(copied, OURS)
    assert "files without a fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"vocabulary": 5, "pad_id": 0, "bytes": 7}'])
def test_a_damaged_fingerprint_is_named(text, content):
    path = text()
    with open(fingerprint_path(path), "w") as file:
        file.write(content)
    with pytest.raises(InputError, match="text.npy.json"):
        check_vocabulary(path, OURS)


@pytest.mark.parametrize("knows", ["tokenizer", "fingerprint"])
def test_rows_end_at_the_padding_of_their_vocabulary(rows, knows):
    """Here id 0 is a character, and <|Padding|> comes last."""
    special = OURS.itos[:6]
    tokenizer = Tokenizer(OURS.itos[6:] + special[1:] + special[:1], special)
    path = rows([4, 9], first_id=0)
    data = np.load(path)
    ends = [4, 14]
    data[ends, 0] = tokenizer.pad_id
    np.save(path, data)
    if knows == "fingerprint":
        write_fingerprint(path, tokenizer)
        source = InstructionRows(path, BLOCK)
    else:
        source = loader(path, "sft", tokenizer=tokenizer).sources[0]
    assert source.lengths.tolist() == [4, 9]
    x, y = source.batch(np.array([0, 1]))
    assert x.tolist() == [[0] * 3 + [tokenizer.pad_id] * 5, [1] * 8]
    assert y.tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 0] + [IGNORE_INDEX] * 5, [IGNORE_INDEX] * 5 + [1] * 3]


def test_a_wrong_vocabulary_is_named_before_the_rows_that_its_padding_would_cut(rows):
    path = rows([4, 9])
    write_fingerprint(path, OTHERS)
    tokenizer = Tokenizer(OURS.itos[6:] + OURS.itos[:6], OURS.itos[:6])  # its <|Padding|> is in no row
    with pytest.raises(InputError, match="prepared with another vocabulary"):
        loader(path, "sft", tokenizer=tokenizer)


def test_a_fingerprint_without_its_file_is_a_missing_file(text, tmp_path):
    path = text()
    write_fingerprint(path, OURS)
    (tmp_path / "text.npy").unlink()
    with pytest.raises(InputError, match="text.npy: no such file"):
        loader(path, tokenizer=OURS)


def test_a_fingerprint_depends_on_the_order_of_the_vocabulary():
    swapped = [*OURS.itos[:-2], OURS.itos[-1], OURS.itos[-2]]
    assert Tokenizer(swapped, OURS.special_tokens).fingerprint != OURS.fingerprint
    assert Tokenizer.from_dict(json.loads(json.dumps(OURS.to_dict()))).fingerprint == OURS.fingerprint
