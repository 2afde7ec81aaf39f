"""The order of a store's rows in each epoch: a permutation given by a formula.

Up to `TABLE` rows the order is that of random numbers, one a row. Beyond, a Feistel network computes any part of the
order without the rest: halves of the index are mixed in turn (Luby and Rackoff 1988), and indexes beyond the last row
are sent through again (Black and Rogaway 2002). The mixing is the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
Numbers and keys come from Philox (Salmon et al. 2011) and SeedSequence, which NumPy keeps the same in all versions.
"""

import functools

import numpy as np

from gptjax.data.stream import first_shuffle

BLOCK = 1 << 12  # indexes computed together
TABLE = 1 << 16
ROUNDS = 6


def shuffled(examples: np.ndarray, num_rows: int, seed: int, store: str, version: int = 2) -> np.ndarray:
    """The row of each example, with `num_rows` in an epoch; the order differs by seed, epoch and store.

    version: 1 is the order of runs of before (first_shuffle.py).
    """
    epochs, inside = np.divmod(examples, num_rows)
    blocks, places = np.divmod(inside, BLOCK)
    found = np.empty_like(examples)
    for epoch, block in {*zip(epochs.tolist(), blocks.tolist(), strict=True)}:
        here = (epochs == epoch) & (blocks == block)
        found[here] = _block(num_rows, _keys(seed, epoch, store, version), block)[places[here]]
    return found


@functools.lru_cache(maxsize=1024)
def _keys(seed: int, epoch: int, store: str, version: int) -> tuple[int, ...]:
    """The keys of the rounds; a single one of 32 bits for version 1."""
    sequence = np.random.SeedSequence((seed, epoch, *store.encode()))
    if version == 1:
        return (int(sequence.generate_state(1)[0]),)
    return tuple(sequence.generate_state(ROUNDS, np.uint64).tolist())


@functools.lru_cache(maxsize=64)
def _block(num_rows: int, keys: tuple[int, ...], number: int) -> np.ndarray:
    indexes = np.arange(number * BLOCK, min((number + 1) * BLOCK, num_rows))
    if len(keys) == 1:
        return first_shuffle.permuted(indexes, num_rows - 1, keys[0])
    return _table(num_rows, keys)[indexes] if num_rows <= TABLE else permuted(indexes, num_rows, keys)


@functools.lru_cache(maxsize=16)
def _table(num_rows: int, keys: tuple[int, ...]) -> np.ndarray:
    """The whole order of a small store."""
    numbers = np.random.Philox(key=np.array(keys[:2], np.uint64)).random_raw(num_rows)
    return np.argsort(numbers, kind="stable")


def permuted(indexes: np.ndarray, num_rows: int, keys: tuple[int, ...]) -> np.ndarray:
    """Applies the permutation of `num_rows` rows with the keys of its rounds to some indexes: int64."""
    half = ((num_rows - 1).bit_length() + 1) // 2
    found = _network(indexes.astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(found >= num_rows)):
        found[outside] = _network(found[outside], half, keys)
    return found.astype(np.int64)


def _network(values: np.ndarray, half: int, keys: tuple[int, ...]) -> np.ndarray:
    """A permutation of the numbers with twice `half` bits."""
    bits = np.uint64(half)
    left, right = values >> bits, values & np.uint64((1 << half) - 1)
    for key in keys:
        left, right = right, left ^ _mixed(right, np.uint64(key)) >> np.uint64(64 - half)
    return left << bits | right


def _mixed(words: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's finalizer of words plus a key: uint64, of which the upper bits are the best."""
    words = words + key
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
