"""The first order of rows, which runs of before keep: `packing.version=1`.

The permutation is that of `grain.experimental.index_shuffle` with four rounds: a Feistel network with the round
function of the SIMON cipher (Beaulieu et al. 2013), walked until the value is within the range (Black and Rogaway
2002). Four such rounds leave traces: short stores are read in the order of the file by 1 epoch of about 200, and means
over neighbours vary far less than chance.
"""

import numpy as np

ROUNDS = 4
SMALL = 1 << 13  # up to this size, a network of 16 bits is so much wider that its walks are long


def permuted(indexes: np.ndarray, largest: int, key: int) -> np.ndarray:
    """Applies the permutation of 0 to `largest` with a key of 32 bits to some indexes: int64."""
    half = max(largest.bit_length() + largest.bit_length() % 2, 16) // 2
    keys = [np.uint64(each & ((1 << half) - 1)) for each in _round_keys(key)]
    if largest < SMALL:
        return np.array(_walked(indexes.tolist(), largest, half, keys), np.int64)
    found = _network(indexes.astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(found > largest)):
        found[outside] = _network(found[outside], half, keys)
    return found.astype(np.int64)


def _walked(indexes: list[int], largest: int, half: int, keys: list[np.uint64]) -> list[int]:
    """Does the walks of `permuted` by a table of the whole network, so all of them together take few steps."""
    table = _network(np.arange(1 << 2 * half, dtype=np.uint64), half, keys).tolist()
    places = []
    for index in indexes:
        place = table[index]
        while place > largest:
            place = table[place]
        places.append(place)
    return places


def _network(values: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    """A permutation of the numbers with twice `half` bits."""
    mask, bits = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> bits, values & mask
    for one, other in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ _mixed(right, half) ^ one
        right = right ^ _mixed(left, half) ^ other
    return left << bits | right


def _mixed(word: np.ndarray, half: int) -> np.ndarray:
    """SIMON's round function on words of `half` bits."""
    return _turned(word, 1, half) & _turned(word, 8, half) ^ _turned(word, 2, half)


def _turned(word: np.ndarray, by: int, half: int) -> np.ndarray:
    """Rotates words of `half` bits to the left."""
    mask = np.uint64((1 << half) - 1)
    return (word << np.uint64(by) | word >> np.uint64(half - by)) & mask


def _round_keys(key: int) -> list[int]:
    """The ROUNDS numbers of 32 bits that C++'s `std::seed_seq{key}` generates (ISO C++ 17, 29.6.7.1). For so few
    numbers the algorithm has these steps."""
    n, word = ROUNDS, (1 << 32) - 1
    made = [0x8B8B8B8B] * n
    for k in range(n):
        here, after, second, before = k % n, (k + 1) % n, (k + 2) % n, (k - 1) % n
        one = 1664525 * _folded(made[here] ^ made[after] ^ made[before]) & word
        two = one + (1, 1 + key, 2, 3)[k] & word
        made[after], made[second], made[here] = made[after] + one & word, made[second] + two & word, two
    for k in range(n, 2 * n):
        here, after, second, before = k % n, (k + 1) % n, (k + 2) % n, (k - 1) % n
        one = 1566083941 * _folded(made[here] + made[after] + made[before] & word) & word
        two = one - here & word
        made[after], made[second], made[here] = made[after] ^ one, made[second] ^ two, two
    return made


def _folded(number: int) -> int:
    return number ^ number >> 27
