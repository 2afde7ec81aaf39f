"""Draws other segmentations of a text by a SentencePiece model: a function of the model, the text and a seed alone.

SentencePiece draws too, but its generator differs in each process from version 0.2.2 on, whatever the seed. The
distributions here are SentencePiece's, and the random numbers come from Philox, a counter-based generator (Salmon et
al. 2011) that is keyed by the seed.

A text is cut where no piece reaches across, which leaves the distribution as it is. The parts are short and repeat, so
the work of a part is kept.
"""

import bisect
import functools
import heapq
import itertools
import math
import struct
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from gptjax.errors import Refused
from gptjax.runtime import untrusted
from gptjax.tokenizers.exact import SPACE_SIGN

# Fields by number and wire type, and values of enumerations, in sentencepiece_model.proto.
PIECES, TRAINER = (1, 2), (2, 2)
MODEL_TYPE, UNIGRAM, BPE = (3, 0), 1, 2
PIECE, SCORE, TYPE = (1, 2), (2, 5), (3, 0)
NORMAL, USER_DEFINED, UNUSED, BYTE = 1, 4, 5, 6
UNKNOWN_PENALTY = 10.0  # below the lowest score, as in SentencePiece's unigram_model.cc
LONGEST = 64  # characters of a part that is kept
BITS = 53  # of a random number


class Vocabulary:
    """The pieces that a text can be cut into, with a space written as a space.

    ids: by piece.
    scores: by piece.
    unused: pieces that only lead to others while BPE merges.
    defined: pieces that a user gave, which BPE neither cuts nor merges.
    """

    def __init__(self, pieces: list[dict]):
        self.ids, self.scores, self.unused, self.defined = {}, {}, set(), set()
        self._bytes = [0] * 256
        for i, fields in enumerate(pieces):
            name, kind = fields[PIECE].decode(), fields.get(TYPE, NORMAL)
            if kind == BYTE:
                self._bytes[int(name[1:-1], 16)] = i
            elif kind in (NORMAL, USER_DEFINED, UNUSED) and " " not in name:
                name = name.replace(SPACE_SIGN, " ")
                self.ids[name], self.scores[name] = i, struct.unpack("<f", fields.get(SCORE, bytes(4)))[0]
                self.unused |= {name} if kind == UNUSED else set()
                self.defined |= {name} if kind == USER_DEFINED else set()
        self.longest = max(map(len, self.ids), default=1)
        self._joined = {one + other for name in self.ids for one, other in itertools.pairwise(name)}

    def ids_of(self, piece: str) -> tuple[int, ...]:
        """The id of a piece, or the ids of its bytes."""
        return (self.ids[piece],) if piece in self.ids else tuple(self._bytes[byte] for byte in piece.encode())

    def parts(self, text: str) -> Iterator[tuple[int, str]]:
        """Yields (start, part) for the parts of a text between places that no piece reaches across."""
        joined, start = self._joined, 0
        for at in range(1, len(text)):
            if text[at - 1 : at + 1] not in joined:
                yield start, text[start:at]
                start = at
        if text:
            yield start, text[start:]


class Merges:
    """BPE with dropped merges (Provilkov et al. 2020): each merge that is due is left out with probability alpha."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._defined = sorted(vocabulary.defined, key=len, reverse=True)
        self._kept = functools.lru_cache(maxsize=1 << 15)(self._merged)

    def draw(self, text: str, alpha: float, seed: int) -> list[int]:
        # A part of n characters has at most 3(n - 1) merges that are due: n - 1 at first, and 2 more after each merge.
        dropped = (_numbers(seed, 3 * len(text)) < round(alpha * (1 << BITS))).tobytes()
        ids = []
        for start, part in self._vocabulary.parts(text):
            first = 3 * start
            if len(part) > LONGEST:
                ids += self._merged(part, dropped[first : first + 3 * len(part)])[0]
                continue
            found, due = self._kept(part, b"")
            at = first
            while (at := dropped.find(1, at, first + due) + 1) > 0:
                found, due = self._kept(part, dropped[first:at])
            ids += found
        return ids

    def _merged(self, text: str, dropped: bytes) -> tuple[tuple[int, ...], int]:
        """Merges a text like bpe_model.cc.

        dropped: for each merge that is due, in their order, 1 if it is left out; later ones are not.

        Returns the ids, and the number of merges that were due.
        """
        scores, unused = self._vocabulary.scores, self._vocabulary.unused
        pieces, fixed = self._first_pieces(text)
        size, due, agenda, halves = len(pieces), 0, [], {}
        before, after = list(range(-1, size - 1)), list(range(1, size + 1))

        def offer(left: int, right: int) -> None:
            if left < 0 or right >= size or left in fixed or right in fixed:
                return
            whole = pieces[left] + pieces[right]
            if whole in scores:
                heapq.heappush(agenda, (-scores[whole], left, right, len(whole)))
                if whole in unused:
                    halves[whole] = pieces[left], pieces[right]

        for left in range(size - 1):
            offer(left, left + 1)
        while agenda:
            _, left, right, length = heapq.heappop(agenda)
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != length:
                continue  # another merge took one of both
            due += 1
            if due <= len(dropped) and dropped[due - 1]:
                continue
            pieces[left], pieces[right] = pieces[left] + pieces[right], ""
            after[left] = after[right]
            if after[right] < size:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return tuple(i for piece in pieces if piece for i in self._ids(piece, halves)), due

    def _first_pieces(self, text: str) -> tuple[list[str], set[int]]:
        """The characters of a text, but pieces that a user defined are whole; and the indexes of those."""
        if not self._defined:
            return list(text), set()
        pieces, fixed, at = [], set(), 0
        while at < len(text):
            given = next((piece for piece in self._defined if text.startswith(piece, at)), "")
            if given:
                fixed.add(len(pieces))
            pieces.append(given or text[at])
            at += len(pieces[-1])
        return pieces, fixed

    def _ids(self, piece: str, halves: dict[str, tuple[str, str]]) -> tuple[int, ...]:
        if piece not in self._vocabulary.unused or piece not in halves:
            return self._vocabulary.ids_of(piece)
        return tuple(i for half in halves[piece] for i in self._ids(half, halves))


class Lattice:
    """Unigram model: a segmentation has a probability proportional to the alpha-th power of its own (Kudo 2018).

    Forward filtering sums the probabilities of all segmentations up to each place; backward sampling draws the pieces
    from the last to the first.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        used = vocabulary.scores.keys() - vocabulary.unused
        plain = [vocabulary.scores[name] for name in used - vocabulary.defined] or [0.0]
        self._unknown = min(plain) - UNKNOWN_PENALTY
        self._scores = {name: vocabulary.scores[name] for name in used}
        self._scores |= {name: len(name) * max(plain) - 0.1 for name in vocabulary.defined}
        self._kept = functools.lru_cache(maxsize=1 << 13)(self._last_pieces)

    def draw(self, text: str, alpha: float, seed: int) -> list[int]:
        numbers = (_numbers(seed, len(text)) * 2.0**-BITS).tolist()
        ids = []
        for start, part in self._vocabulary.parts(text):
            last = (self._kept if len(part) <= LONGEST else self._last_pieces)(part, alpha)
            end, backward = len(part), []
            while end:
                borders, begins, pieces = last[end]
                chosen = bisect.bisect_right(borders, numbers[start + end - 1])
                backward.append(pieces[chosen])
                end = begins[chosen]
            for piece in reversed(backward):
                ids += piece
        return ids

    def _last_pieces(self, text: str, alpha: float) -> list[tuple[list[float], list[int], list[tuple[int, ...]]]]:
        """For each place of a text, the pieces that may end there: the borders between them in the range of random
        numbers, where they begin, and their ids."""
        sums, found = [0.0], [([], [], [])]  # sums are logarithms
        for end in range(1, len(text) + 1):
            begins, logs = [], []
            for begin in range(max(0, end - self._vocabulary.longest), end):
                score = self._scores.get(text[begin:end], self._unknown if begin == end - 1 else None)
                if score is not None:
                    begins.append(begin)
                    logs.append(sums[begin] + alpha * score)
            most = max(logs)
            shares = list(itertools.accumulate(math.exp(log - most) for log in logs))
            sums.append(most + math.log(shares[-1]))
            pieces = [self._vocabulary.ids_of(text[begin:end]) for begin in begins]
            found.append(([share / shares[-1] for share in shares[:-1]], begins, pieces))
        return found


def of_model(model: bytes) -> Merges | Lattice:
    """Makes the sampler of a SentencePiece model. Raises: Refused, for other kinds than BPE and unigram."""
    pieces, kind = [], UNIGRAM
    for number, wire_type, content in untrusted.protobuf_values(model):
        if (number, wire_type) == PIECES:
            pieces.append(_fields(cast(bytes, content)))
        elif (number, wire_type) == TRAINER:
            kind = _fields(cast(bytes, content)).get(MODEL_TYPE, kind)
    if kind not in (UNIGRAM, BPE):
        raise Refused(
            "augment.subword_alpha must be 0 with this SentencePiece model, which has one encoding of a text; found a "
            "model of words or characters; use model_type bpe or unigram."
        )
    return (Merges if kind == BPE else Lattice)(Vocabulary(pieces))


def _fields(message: bytes) -> dict[tuple[int, int], Any]:
    return {(number, wire_type): value for number, wire_type, value in untrusted.protobuf_values(message)}


def _numbers(seed: int, count: int) -> np.ndarray:
    """Random numbers of BITS bits: uint64 [count]. NumPy keeps the raw output of Philox the same in all versions."""
    return np.random.Philox(key=seed).random_raw(count) >> np.uint64(64 - BITS)
