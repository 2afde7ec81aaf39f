"""Batches of a token store as a function of the step.

A corpus of N tokens is cut into windows: window i covers the tokens from i*T to i*T + T, both included, so that every
token but the first is predicted once an epoch. Training takes the windows in an order shuffled anew each epoch. As
any step can be looked up, where we are is the only thing to save: the same batches come back on any number of hosts
and after any restart.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from gptjax.data.store import Split, Store
from gptjax.errors import Refused


class Batch(NamedTuple):
    """Rows of a step; each field is [rows, seq_len], weights float32 and the others int32.

    inputs, targets: tokens, and the tokens that follow them.
    positions: from 0 at each document's start, and at the window's.
    segments: number of the document within the window, from 1; 0 is padding.
    weights: 1 where the target counts, 0 on padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    weights: np.ndarray


def train_batches(store: Store, *, seq_len: int, batch_size: int, seed: int, rows: np.ndarray) -> grain.MapDataset:
    """The endless training stream: element `step` is that step's global batch, of which only `rows` are read.

    rows: indexes into the global batch of batch_size rows, those that this process holds, in its order. A batch may
    take its last rows from the next epoch. Refuses a corpus of less than one window.
    """
    split = store.split("train")
    if split.tokens < seq_len + 1:
        raise Refused(
            f"{store.folder} has {split.tokens} tokens to train on, and a window of seq_len={seq_len} takes "
            f"{seq_len + 1}: use a smaller seq_len or more text."
        )
    num_windows, rows = _num_windows(split, seq_len), np.asarray(rows)

    def batch(step: int) -> Batch:
        examples = step * batch_size + rows
        windows = np.array([_shuffled(int(example), num_windows, seed) for example in examples], np.int64)
        return _batch(store, "train", windows, seq_len)

    return grain.MapDataset.range(sys.maxsize // batch_size).map(batch)


def iterate(dataset: grain.MapDataset, start: int, stop: int, threads: int = 2, prefetch: int = 8) -> Iterator[Batch]:
    """Elements `start` to `stop` in order, `prefetch` of them read ahead by `threads`."""
    if start >= stop:
        return iter(())
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(dataset.slice(slice(start, stop)).to_iter_dataset(options))


def heldout_batches(store: Store, *, seq_len: int, batch_size: int, rows: np.ndarray) -> Sequence[Batch]:
    """All held-out windows in order, of each batch only `rows`; rows after the last window have weight 0."""
    return _HeldoutBatches(store, seq_len, batch_size, np.asarray(rows))


class _HeldoutBatches(Sequence):
    def __init__(self, store: Store, seq_len: int, batch_size: int, rows: np.ndarray):
        self._store, self._seq_len, self._batch_size, self._rows = store, seq_len, batch_size, rows

    def __len__(self) -> int:
        return -(-_num_windows(self._store.split("heldout"), self._seq_len) // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return _batch(self._store, "heldout", index * self._batch_size + self._rows, self._seq_len)


def _num_windows(split: Split, seq_len: int) -> int:
    return -(-(split.tokens - 1) // seq_len)


def _shuffled(example: int, num_windows: int, seed: int) -> int:
    """The window of an example: Grain's O(1) permutation, with a key of its own for each seed and epoch."""
    epoch, index = divmod(example, num_windows)
    return grain.experimental.index_shuffle(index, max_index=num_windows - 1, seed=_key(seed, epoch), rounds=4)


@functools.cache
def _key(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def _batch(store: Store, name: str, windows: np.ndarray, seq_len: int) -> Batch:
    """The batch of some windows; one that begins after the last token is padding."""
    split = store.split(name)
    starts = np.minimum(windows * seq_len, split.tokens)
    tokens = split.read(starts, seq_len + 1).astype(np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    index = np.arange(seq_len, dtype=np.int32)
    # A target exists as long as it is not after the last token.
    real = starts[:, None] + index + 1 < split.tokens
    opens = inputs == store.tokenizer.end_of_text
    opens[:, 0] = True
    segments = np.where(real, np.cumsum(opens, axis=1, dtype=np.int32), 0)
    positions = np.where(real, index - np.maximum.accumulate(np.where(opens, index, 0), axis=1), 0)
    inputs, targets = np.where(real, inputs, 0), np.where(real, targets, 0)
    return Batch(inputs, targets, positions, segments, real.astype(np.float32))
