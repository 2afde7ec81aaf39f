"""Lays out the documents of a store in rows of a fixed length.

`concat` puts documents end to end and cuts every T tokens: no padding, but documents are cut wherever a row ends.
`best_fit` keeps documents whole. A document longer than a row is cut into full rows and a rest. Each rest or document
goes, largest first, where it leaves the least free space (best-fit decreasing, as in Ding et al. 2024, "Fewer
Truncations Improve Language Modeling"). A row is a few spans of a store's tokens. In both layouts every token but the
first is a target once an epoch, and nothing attends across documents.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gptjax.data.store.store import Split
from gptjax.errors import Refused, nearest

METHODS = "concat", "best_fit"
VERSIONS = 1, 2


@dataclass(frozen=True)
class PackingConfig:
    """How documents make up rows."""

    method: str = "concat"  # concat (end to end) or best_fit (whole documents)
    version: int = 2  # of the order of rows (shuffle.py); a run keeps the version that it began with


def check(config: PackingConfig) -> None:
    """Raises: Refused."""
    if config.method not in METHODS:
        raise Refused(
            f'packing.method="{config.method}" must be one of {", ".join(METHODS)}.{nearest(config.method, METHODS)}'
        )
    if config.version not in VERSIONS:
        raise Refused(f"packing.version={config.version} must be 1 or 2; a newer gptjax may know it.")


class Spans(NamedTuple):
    """The spans of some rows: arrays of one length, in the order of the rows.

    rows: index of the span's row among the rows that were asked for.
    places: where the span begins in that row.
    starts: first token of the span in the store.
    lengths: tokens of the span; the target of each is the token that follows it in the store.
    """

    rows: np.ndarray
    places: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Concat:
    """Windows end to end. rows: number of windows of `length` tokens."""

    def __init__(self, tokens: int, length: int):
        self._tokens, self._length = tokens, length
        self.rows = -(-(tokens - 1) // length)

    def spans(self, rows: np.ndarray, first: np.ndarray, length: int) -> Spans:
        """The spans of `rows` from place `first` on, `length` places of each row."""
        starts = np.minimum(rows * self._length + first, self._tokens - 1)
        nothing = np.zeros(len(rows), np.int64)
        return Spans(np.arange(len(rows)), nothing, starts, np.minimum(length, self._tokens - 1 - starts))


class BestFit:
    """Whole documents.

    rows: number of rows of `length` tokens.
    truncated: share of the documents that are cut.

    Construction takes about 90 bytes of memory a document, on every host (87 MiB for a million).
    """

    def __init__(self, document_starts: np.ndarray, tokens: int, length: int):
        self._starts, self._lengths, row_of, sizes = _pieces(document_starts, tokens, length)
        self.truncated = float((sizes > length).mean())
        order = np.argsort(row_of, kind="stable")
        self._starts, self._lengths = self._starts[order], self._lengths[order]
        self.rows = int(row_of.max()) + 1
        # The first piece of each row; the extra entries give a row after the last one no pieces.
        self._first = np.searchsorted(row_of[order], np.arange(self.rows + 2))

    def spans(self, rows: np.ndarray, first: np.ndarray, length: int) -> Spans:
        """The spans of `rows` from place `first` on, `length` places of each; rows after the last are empty."""
        rows = np.minimum(rows, self.rows)
        counts = self._first[rows + 1] - self._first[rows]
        row = np.repeat(np.arange(len(rows)), counts)
        before = np.cumsum(counts) - counts
        pieces = np.repeat(self._first[rows] - before, counts) + np.arange(counts.sum())
        starts, lengths = self._starts[pieces], self._lengths[pieces]
        ends = np.cumsum(lengths)
        begins = ends - lengths
        place = begins - begins[np.repeat(before, counts)] - first[row]
        cut = np.maximum(-place, 0)  # tokens of a span that lie before the requested places
        lengths = np.minimum(lengths, length - place) - cut
        some = lengths > 0
        return Spans(row[some], (place + cut)[some], (starts + cut)[some], lengths[some])


Packing = Concat | BestFit


def packed(config: PackingConfig, split: Split, length: int) -> Packing:
    """Lays out a split; `best_fit` takes half a second for a million documents (benchmarks/NOTES.md, Packing)."""
    if config.method == "concat":
        return Concat(split.tokens, length)
    return BestFit(split.document_starts(), split.tokens, length)


def _ends(document_starts: np.ndarray, tokens: int) -> np.ndarray:
    """Where each document ends, counted in inputs."""
    ends = np.append(document_starts[1:], tokens)
    ends[-1] -= 1  # the last token is a target only
    return ends


def _pieces(document_starts: np.ndarray, tokens: int, length: int) -> tuple[np.ndarray, ...]:
    """The start, the length and the row of each piece of a document, and the size of each document. Rows of one full
    piece come first."""
    sizes = _ends(document_starts, tokens) - document_starts
    full, rest = np.divmod(sizes, length)
    documents = np.repeat(np.arange(len(sizes)), full)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(full) - full, full)
    whole_starts = document_starts[documents] + number * length
    (left,) = np.nonzero(rest)
    starts = np.concatenate([whole_starts, (document_starts + full * length)[left]])
    lengths = np.concatenate([np.full(len(documents), length), rest[left]])
    rows = np.concatenate([np.arange(len(documents)), len(documents) + best_fit(rest[left], length)])
    return starts, lengths, rows, sizes


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each item by best-fit decreasing: int64, rows numbered from 0.

    Items of one size are placed together. The row with the least space for an item keeps the least until no more items
    fit. So all rows of equal space are filled in one operation, and the time depends on the number of different sizes.

    Args:
      sizes: each from 1 to `length`.
      length: size of a row.
    """
    order = np.argsort(-sizes, kind="stable")
    row_of, rows, at = np.empty(len(sizes), np.int64), 0, 0
    room = {}  # row numbers by the free space of the rows, in the order in which rows came to that space
    for size, count in zip(*(found[::-1].tolist() for found in np.unique(sizes, return_counts=True)), strict=True):
        items = order[at : at + count]
        at, done = at + count, 0
        for free in sorted(free for free in room if free >= size):
            if done == count:
                break
            done = _fill(room, free, size, items, done, row_of)
        if done < count:
            new = -(-(count - done) // (length // size))
            room.setdefault(length, []).append(np.arange(rows, rows + new))
            rows += new
            _fill(room, length, size, items, done, row_of)
    return row_of


def _fill(room: dict[int, list], free: int, size: int, items: np.ndarray, done: int, row_of: np.ndarray) -> int:
    """Puts items from the `done`-th on into the rows with `free` space, until rows or items run out; returns how many
    items are placed by then."""
    rows = np.concatenate(room.pop(free))
    each = free // size
    placed = items[done : done + each * len(rows)]
    row_of[placed] = np.repeat(rows, each)[: len(placed)]
    filled, more = divmod(len(placed), each)
    for left, some in (
        (free - each * size, rows[:filled]),
        (free - more * size, rows[filled : filled + 1]),
        (free, rows[filled + 1 :]),
    ):
        if len(some) and left:
            room.setdefault(left, []).append(some)
    return done + len(placed)


class Report(NamedTuple):
    """Costs of a layout. padding: share of all places; truncated: share of the documents that are cut."""

    rows: int
    padding: float
    truncated: float


def report(packing: Packing, split: Split, length: int) -> Report:
    """The costs of a layout of a split's documents."""
    if isinstance(packing, BestFit):
        truncated = packing.truncated
    else:
        starts = split.document_starts()
        truncated = float((starts // length != (_ends(starts, split.tokens) - 1) // length).mean())
    return Report(packing.rows, 1 - (split.tokens - 1) / (packing.rows * length), truncated)


def report_line(method: str, found: Report) -> str:
    """The costs of a method as a line of text."""
    share = f"{found.padding:.2%} padding, {found.truncated:.1%} of the documents cut"
    return f"{method}: {found.rows:,} rows, {share}"
