"""Batches from prepared files, in an order that depends on the seed alone.

The order is global: micro-batch number n holds the same rows for any number of processes, and process `rank`
of `world_size` reads the numbers n with n % world_size == rank. To continue exactly, a run needs to remember
one number: how many rows have been read.

Letters: B rows in a batch, T tokens in a row.
"""

import numpy as np

from config import IGNORE_INDEX
from corpus.fingerprint import check_vocabulary, read_fingerprint
from script import InputError

# What numpy raises for a file with a damaged header.
NOT_AN_ARRAY = (ValueError, EOFError, SyntaxError, TypeError, OverflowError)


def open_array(path, ndim=None):
    """Memory-map a prepared .npy file: text has one axis, instruction rows have two.

    Raises InputError naming the file. A pickle inside is never run."""
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run python data.py first") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except NOT_AN_ARRAY:
        raise InputError(f"{path}: not a prepared .npy file, or a damaged one; "
                         f"python data.py writes such files from text and JSONL") from None
    is_prepared = isinstance(data, np.ndarray) and data.dtype in (np.uint16, np.uint32)
    if not is_prepared or (ndim and data.ndim != ndim):
        raise InputError(f"{path}: not what data.py writes for this task (-t); run python data.py")
    return data


class TextBlocks:
    """Windows of `block_size` + 1 tokens over one file of running text, shape (tokens,)."""

    def __init__(self, path, block_size):
        self.path = path
        self.block_size = block_size
        self.tokens = open_array(path, 1)
        if len(self.tokens) <= block_size:
            raise InputError(f"{path}: {len(self.tokens)} tokens are fewer than block_size + 1 = "
                             f"{block_size + 1}; take more text or a smaller block_size")
        # One row fewer than would fit, so that each epoch can start at another offset: a model that sees the
        # same windows again learns them by heart sooner.
        self.n_rows = max(1, (len(self.tokens) - block_size) // block_size)

    def epoch_order(self, rng, batch_size):
        """Start positions of an epoch's rows, shape (n_rows,): every window once, cut from a random offset,
        shuffled by `rng`."""
        slack = len(self.tokens) - 1 - self.n_rows * self.block_size
        offset = rng.integers(0, min(slack, self.block_size - 1) + 1)
        return offset + self.block_size * rng.permutation(self.n_rows)

    def fixed_rows(self, n):
        """Up to `n` start positions, evenly spaced, for validation."""
        return self.block_size * evenly_spaced(self.n_rows, n)

    def batch(self, rows):
        """Inputs and targets of some start positions, two int64 arrays (B, T = block_size)."""
        windows = np.stack([self.tokens[i : i + self.block_size + 1] for i in rows]).astype(np.int64)
        return windows[:, :-1], windows[:, 1:]


class InstructionRows:
    """Rows of instruction data, shape (tokens, 2): ids and loss mask, each row ended by one <|Padding|>.

    pad_id: the id of <|Padding|>; by default what the file's fingerprint says, or else 0."""

    POOL = 50  # batches sorted by length together: enough to waste little, few enough to stay random

    def __init__(self, path, block_size, pad_id=None):
        self.path = path
        self.data = open_array(path, 2)
        if pad_id is None:
            pad_id = (read_fingerprint(path) or {"pad_id": 0})["pad_id"]
        self.pad_id = pad_id
        self.ends = np.flatnonzero(self.data[:, 0] == pad_id)
        self.starts = np.concatenate([[0], self.ends[:-1] + 1])
        self.lengths = self.ends - self.starts
        self.n_rows = len(self.ends)
        if not self.n_rows:
            raise InputError(f"{path}: holds no rows; run python data.py")
        if self.lengths.max() > block_size + 1:
            raise InputError(f"{path}: a row of {self.lengths.max()} tokens does not fit into block_size "
                             f"{block_size}; run python data.py --block_size {block_size}")

    def epoch_order(self, rng, batch_size):
        """Row numbers of an epoch, shape (full batches · batch_size,), in a random order in which the rows
        of a batch have similar lengths, so that little is padded."""
        rows = rng.permutation(self.n_rows)
        n_batches = len(rows) // batch_size
        pool = self.POOL * batch_size
        # Sort within pools, then shuffle the batches: sorting everything would show short rows first.
        rows = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")]
                               for part in np.split(rows, range(pool, len(rows), pool))])
        batches = rows[: n_batches * batch_size].reshape(n_batches, batch_size)
        return batches[rng.permutation(n_batches)].reshape(-1)

    def fixed_rows(self, n):
        """Up to `n` row numbers, evenly spaced over the file, short rows first."""
        rows = evenly_spaced(self.n_rows, n)
        return rows[np.argsort(self.lengths[rows], kind="stable")]

    def batch(self, rows):
        """Inputs and targets of some rows, two int64 arrays (B, T), T from the longest row.

        A target that carries no loss is IGNORE_INDEX."""
        longest = self.lengths[rows].max()
        x = np.full((len(rows), longest - 1), self.pad_id, np.int64)
        y = np.full((len(rows), longest - 1), IGNORE_INDEX, np.int64)
        for i, row in enumerate(rows):
            ids, mask = np.asarray(self.data[self.starts[row] : self.ends[row]], np.int64).T
            x[i, : len(ids) - 1] = ids[:-1]
            y[i, : len(ids) - 1] = np.where(mask[1:] == 1, ids[1:], IGNORE_INDEX)
        return x, y


def evenly_spaced(n_rows, n):
    """`n` of the numbers below `n_rows`, evenly spaced (all of them if there are fewer)."""
    return np.linspace(0, n_rows - 1, min(n, n_rows)).round().astype(np.int64)


class DataLoader:
    """Micro-batches of one or more files, walked in order in every epoch (a curriculum).

    task: "pretrain" reads text, "sft" instruction rows.
    tokenizer: if given, every file must have been prepared with its vocabulary, and hold no other ids.

    Raises InputError naming the file that does not fit."""

    def __init__(self, paths, task, block_size, batch_size, seed=0, rank=0, world_size=1, tokenizer=None):
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.vocab_size = tokenizer.vocab_size if tokenizer else None
        pad_id = tokenizer.pad_id if tokenizer else None
        if tokenizer:  # first of all, as a wrong <|Padding|> makes rows of odd lengths
            for path in paths:
                check_vocabulary(path, tokenizer)
        if task == "sft":
            self.sources = [InstructionRows(path, block_size, pad_id) for path in paths]
        else:
            self.sources = [TextBlocks(path, block_size) for path in paths]
        self.batches = [source.n_rows // batch_size for source in self.sources]  # in an epoch, by file
        self.position = 0  # micro-batches read so far, by all processes together
        self.ordered = None  # the (epoch, file) whose rows `order` holds
        self.order = None

    @property
    def batches_per_epoch(self):
        """Micro-batches in an epoch, of all processes together."""
        return sum(self.batches)

    @property
    def epoch(self):
        """Epochs done so far, with their fraction."""
        return self.position / max(1, self.batches_per_epoch)

    def require_full_batches(self):
        """Raises InputError naming the file that has too few rows for a single batch."""
        for source, n in zip(self.sources, self.batches, strict=True):
            if n == 0:
                raise InputError(f"{source.path}: {source.n_rows} rows are fewer than batch_size "
                                 f"{self.batch_size}; lower batch_size")

    def next_batch(self):
        """This process's next micro-batch: inputs and targets, two int64 arrays (B, T)."""
        epoch, i = divmod(self.position + self.rank, self.batches_per_epoch)
        self.position += self.world_size
        file = 0
        while i >= self.batches[file]:
            i -= self.batches[file]
            file += 1
        if self.ordered != (epoch, file):
            # Seeded by what it is for, not by what was drawn before: a continued run needs no state of it.
            rng = np.random.default_rng([self.seed, epoch, file])
            self.order = self.sources[file].epoch_order(rng, self.batch_size)
            self.ordered = (epoch, file)
        rows = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        return self.read_batch(self.sources[file], rows)

    def fixed_batches(self, n):
        """About `n` batches, the same at every call, evenly spaced over all files; this process's share.

        Every process gets the same number: if it does not divide, the last batches carry no loss."""
        rows_per_source = -(-n // len(self.sources)) * self.batch_size
        batches = []
        for source in self.sources:
            rows = source.fixed_rows(rows_per_source)
            batches += [(source, rows[i : i + self.batch_size])
                        for i in range(0, len(rows), self.batch_size)]
        rounded_up = -(-len(batches) // self.world_size) * self.world_size
        for i in range(self.rank, rounded_up, self.world_size):
            x, y = self.read_batch(*batches[min(i, len(batches) - 1)])
            yield x, y if i < len(batches) else np.full_like(y, IGNORE_INDEX)

    def read_batch(self, source, rows):
        """A batch of one file, (B, T) twice. Raises InputError for an id beyond the vocabulary."""
        x, y = source.batch(rows)
        largest = max(x.max(), y.max())
        if self.vocab_size and largest >= self.vocab_size:
            raise InputError(f"{source.path}: holds token id {largest}, beyond the model's vocabulary of "
                             f"{self.vocab_size}; prepare it with data.py --tokenizer")
        return x, y

    def state_dict(self):
        """What a checkpoint must hold to continue exactly."""
        return {"rows": self.position * self.batch_size}

    def load_state_dict(self, state):
        """Continue where `state_dict` was taken, with any number of processes and any batch size."""
        self.position = state["rows"] // self.batch_size
