"""Batches of a corpus as a function of their number.

The tokens of a store make up rows (`packing.py`), for example windows. Window i covers the tokens from i*T to i*T + T,
both included, so every token but the first is predicted once an epoch. Training shuffles the rows of each store anew in
each epoch, and a formula says which store the next row comes from. Any batch can be looked up, so the position is the
only thing to save: the same batches come back on any number of hosts and after any restart.

A phase of shorter sequences takes the same rows in the same order, each row cut into as many parts as fit.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from gptjax.data.batch import Batch, padding
from gptjax.data.store.store import Split, Store
from gptjax.data.stream import curriculum, mixture
from gptjax.data.stream.augment import Augment, AugmentConfig
from gptjax.data.stream.curriculum import Phase
from gptjax.data.stream.mixture import Corpus
from gptjax.data.stream.packing import PackingConfig, Spans, packed
from gptjax.data.stream.shuffle import shuffled
from gptjax.errors import Refused, shown
from gptjax.tokenizers.tokenizer import Tokenizer


class Source(NamedTuple):
    """The origin of a row of a batch: spans of the tokens of a store, with the place of each in the row."""

    store: str
    spans: list[tuple[int, int, int]]  # place, start, length


class Stream:
    """The endless training data of a run."""

    def __init__(
        self,
        corpus: Corpus,
        phases: list[Phase],
        seq_len: int,
        seed: int,
        packing: PackingConfig = PackingConfig(),
        augment: AugmentConfig = AugmentConfig(),
    ):
        """Lays out the stores.

        Args:
          seq_len: the longest sequence length; rows of this length are shuffled.

        Raises: Refused, for a store with less than one row.
        """
        corpus.check_windows(seq_len)
        self.corpus, self.phases, self._starts = corpus, phases, curriculum.starts(phases)
        self._seq_len, self._seed, self._version = seq_len, seed, packing.version
        self._augment = Augment(augment, corpus.tokenizer, seed) if augment.on else None
        for store in corpus.stores.values():
            if augment.on and store.split("train").has_prompts:
                raise Refused(
                    f"{store.folder} has prompts, and augment={shown(asdict(augment))} would not know where they end: "
                    "turn it off."
                )
        self.packed = {name: packed(packing, store.split("train"), seq_len) for name, store in corpus.stores.items()}

    def phase(self, index: int) -> Phase:
        """The phase of batch `index`."""
        return [phase for phase in self.phases if phase.first <= index][-1]

    def batch(self, index: int, rows: np.ndarray) -> Batch:
        """Some rows of batch `index`, as used for training.

        rows: indexes into the global batch: the rows of this process, in its order. The last rows of a batch may come
        from the next epoch.
        """
        batch = self.plain(index, rows)
        if self._augment and len(rows):
            changed = [
                self._augment.row(index, int(row), *fields)
                for row, *fields in zip(rows, batch.inputs, batch.targets, batch.segments, strict=True)
            ]
            inputs, targets, opens, real = (np.stack(each) for each in zip(*changed, strict=True))
            batch = _batch(inputs, targets, opens, real)
        return batch

    def plain(self, index: int, rows: np.ndarray) -> Batch:
        """The rows of `batch` before augmentation."""
        seq_len, tokenizer = self.phase(index).seq_len, self.corpus.tokenizer
        whole = None
        for name, places, spans in self._spans(index, rows):
            part = _rows(self.corpus.stores[name].split("train"), spans, len(places), seq_len, tokenizer)
            if len(places) == len(rows):
                return part
            whole = padding(len(rows), seq_len) if whole is None else whole
            for field, values in zip(whole, part, strict=True):
                field[places] = values
        return padding(0, seq_len) if whole is None else whole

    def _spans(self, index: int, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray, Spans]]:
        """For each store, its places in `rows` and the spans of the rows there."""
        phase, at = [pair for pair in zip(self.phases, self._starts, strict=True) if pair[0].first <= index][-1]
        stores, before = mixture.taken(phase.shares, (index - phase.first) * phase.batch_size + rows)
        for number, name in enumerate(phase.shares):
            (places,) = np.nonzero(stores == number)
            if len(places):
                if name not in self.packed:
                    raise Refused(
                        f"batch {index} has rows of the store {name}, which mixture.stores no longer has: add "
                        f"{name}=FOLDER there; mixture.weights may leave {name} out."
                    )
                examples, first = np.divmod(at[name] + before[places] * phase.seq_len, self._seq_len)
                order = shuffled(examples, self.packed[name].rows, self._seed, name, self._version)
                yield name, places, self.packed[name].spans(order, first, phase.seq_len)

    def sources(self, index: int) -> list[Source]:
        """The origin of each row of batch `index`."""
        rows = np.arange(self.phase(index).batch_size)
        found = [Source("", [])] * len(rows)
        for name, places, spans in self._spans(index, rows):
            for number, place in enumerate(places):
                spans_of_row = zip(*(field[spans.rows == number].tolist() for field in spans[1:]), strict=True)
                found[place] = Source(name, [span for span in spans_of_row if span[2]])
        return found

    def documents(self, index: int) -> list[dict]:
        """Name and offset of each document with tokens in batch `index`, by store, in the store's order."""
        numbers = {name: set() for name in self.corpus.stores}
        for source in self.sources(index):
            split = self.corpus.stores[source.store].split("train")
            for _, start, length in source.spans:
                found = range(split.document_at(start), split.document_at(start + length) + 1)
                numbers[source.store].update(found)
        return [
            ({"store": name} if name else {}) | row
            for name, found in numbers.items()
            for row in self.corpus.stores[name].split("train").names(found)
        ]


def iterate(
    read: Callable[[int], Batch], start: int, stop: int, threads: int = 2, prefetch: int = 8
) -> Iterator[Batch]:
    """Yields `read(start)` to `read(stop - 1)` in order, with `prefetch` of them read ahead by `threads`."""
    pool = ThreadPoolExecutor(threads, "stream")
    try:
        waiting = collections.deque()
        for index in range(start, stop):
            waiting.append(pool.submit(read, index))
            if len(waiting) > prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def heldout_batches(store: Store, *, seq_len: int, batch_size: int, rows: np.ndarray) -> Sequence[Batch]:
    """All held-out windows in order, only `rows` of each batch; rows after the last window have weight 0.

    A store with prompts is read in rows of `best_fit`, whatever the training layout, so that each response is judged
    after its prompt.
    """
    return _HeldoutBatches(store, seq_len, batch_size, np.asarray(rows))


class _HeldoutBatches(Sequence):
    def __init__(self, store: Store, seq_len: int, batch_size: int, rows: np.ndarray):
        self._store, self._seq_len, self._batch_size, self._rows = store, seq_len, batch_size, rows
        split = store.split("heldout")
        self._packed = packed(PackingConfig("best_fit" if split.has_prompts else "concat"), split, seq_len)

    def __len__(self) -> int:
        return -(-self._packed.rows // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = index * self._batch_size + self._rows
        spans = self._packed.spans(rows, np.zeros_like(rows), self._seq_len)
        return _rows(self._store.split("heldout"), spans, len(rows), self._seq_len, self._store.tokenizer)


def _rows(split: Split, spans: Spans, rows: int, seq_len: int, tokenizer: Tokenizer) -> Batch:
    """The batch of `rows` rows made of some spans, filled from the left."""
    batch = _unweighted(split, spans, rows, seq_len, tokenizer)
    if not split.has_prompts:
        return batch
    weights = np.zeros((rows, seq_len), np.float32)
    weights.ravel()[_places(spans, seq_len)] = ~split.in_prompts(spans.starts + 1, spans.lengths)
    return batch._replace(weights=weights)


def _places(spans: Spans, seq_len: int) -> np.ndarray:
    """The index of each token of some spans in rows of `seq_len` that are laid end to end."""
    ends = np.cumsum(spans.lengths)
    begins = spans.rows * seq_len + spans.places - (ends - spans.lengths)
    return np.repeat(begins, spans.lengths) + np.arange(spans.lengths.sum())


def _unweighted(split: Split, spans: Spans, rows: int, seq_len: int, tokenizer: Tokenizer) -> Batch:
    """The batch of some spans, with prompts weighted like other tokens."""
    tokens = split.spans(spans.starts, spans.lengths + 1)
    if len(spans.starts) == rows and (spans.lengths == seq_len).all():
        tokens = tokens.reshape(rows, seq_len + 1)
        opens = tokens[:, :-1] == tokenizer.end_of_text
        opens[:, 0] = True
        tokens = tokens.astype(np.int32)
        return _batch(_with_begin(tokens[:, :-1], tokenizer), tokens[:, 1:], opens)
    inputs, targets = np.zeros((2, rows, seq_len), np.int32)
    opens = np.zeros((rows, seq_len), bool)
    at, places = spans.rows * seq_len + spans.places, _places(spans, seq_len)
    last = np.cumsum(spans.lengths + 1) - 1
    inputs.ravel()[places] = np.delete(tokens, last)
    targets.ravel()[places] = np.delete(tokens, last - spans.lengths)
    opens.ravel()[places] = inputs.ravel()[places] == tokenizer.end_of_text
    opens.ravel()[at[spans.lengths > 0]] = True
    opens[:, 0] = True
    real = np.bincount(spans.rows, spans.lengths, rows).astype(np.int64)
    return _batch(_with_begin(inputs, tokenizer), targets, opens, real)


def _with_begin(inputs: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Replaces the end-of-text that opens documents in a store by the token that opens documents for the model."""
    if tokenizer.begin == tokenizer.end_of_text:
        return inputs
    return np.where(inputs == tokenizer.end_of_text, np.int32(tokenizer.begin), inputs)


def _batch(inputs: np.ndarray, targets: np.ndarray, opens: np.ndarray, real: np.ndarray | None = None) -> Batch:
    """The batch of some rows.

    Computed by documents instead of tokens, since there are some hundred times fewer of them (benchmarks/NOTES.md).

    Args:
      inputs, targets: int32 [rows, seq_len].
      opens: bool [rows, seq_len], where documents begin; True in the first place of each row.
      real: int64 [rows], how many places of each row, from the left, are not padding; None means all.
    """
    rows, seq_len = inputs.shape
    at = np.flatnonzero(opens).astype(np.int32)
    lengths = np.diff(at, append=rows * seq_len)
    first = np.searchsorted(at, np.arange(rows) * seq_len)
    number = np.arange(1, len(at) + 1, dtype=np.int32) - first[at // seq_len].astype(np.int32)
    segments = np.repeat(number, lengths).reshape(rows, seq_len)
    positions = np.repeat(at, lengths)
    positions = np.subtract(_numbers(rows * seq_len), positions, out=positions).reshape(rows, seq_len)
    if real is None:
        return Batch(inputs, targets, positions, segments, np.broadcast_to(np.float32(1), (rows, seq_len)))
    batch = Batch(inputs, targets, positions, segments, np.ones((rows, seq_len), np.float32))
    for row in np.flatnonzero(real < seq_len):
        for field in batch:
            field[row, real[row] :] = 0
    return batch


@functools.lru_cache(maxsize=4)
def _numbers(stop: int) -> np.ndarray:
    return np.arange(stop, dtype=np.int32)
