"""One split of a token store: windows of tokens, where documents start, prompts, names."""

import bisect
import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import tensorstore as ts
from etils import epath

from gptjax.data.store.memory_map import Mapped
from gptjax.errors import Refused
from gptjax.runtime import untrusted

REMEDY = "copy the whole store again, or prepare the data again in another folder"


@dataclass(frozen=True)
class Split:
    """The training or held-out part of a store.

    tokens, documents: how many there are.
    bytes: size of the text in UTF-8.
    """

    tokens: int
    documents: int
    bytes: int
    folder: epath.Path
    _tokens: ts.TensorStore = field(repr=False)
    _document_starts: ts.TensorStore = field(repr=False)
    _mapped: Mapped | None = field(repr=False)  # None unless the store is local
    _prompts: ts.TensorStore | None = field(repr=False, default=None)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Reads windows of tokens together: [len(starts), length] in the store's dtype, 0 beyond the last token.

        Raises: ValueError, if tokens do not match their checksum.
        """
        return self.spans(np.asarray(starts), np.full(len(starts), length)).reshape(len(starts), length)

    def spans(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Reads spans of tokens of different lengths, end to end; otherwise like `read`."""
        ends = np.cumsum(lengths)
        there = np.clip(self.tokens - starts, 0, lengths)
        new = np.empty if (there == lengths).all() else np.zeros
        tokens = new(ends[-1] if len(ends) else 0, self._tokens.dtype.numpy_dtype)
        if self._mapped:
            self._mapped.copy(starts, ends - lengths, there, tokens)
            return tokens
        places = [(int(a), int(b), int(n)) for a, b, n in zip(starts, ends - lengths, there, strict=True)]
        with ts.Batch() as batch:
            reads = [self._tokens[start : start + length].read(batch=batch) for start, _, length in places]
        for (_, place, length), read in zip(places, reads, strict=True):
            tokens[place : place + length] = read.result()
        return tokens

    def document_starts(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """First token of documents `start` to `stop`: int64, ascending. Raises: Refused."""
        stop = self.documents if stop is None else stop
        try:
            starts = self._document_starts[start:stop].read().result()
            # Every document has at least one token, and the first document begins at token 0.
            if (np.diff(starts, append=self.tokens) < 1).any() or starts[0] < start or starts[0] > start == 0:
                raise ValueError(f"documents {start} to {stop} do not follow one another")
        except ValueError as error:
            where, reason = self.folder / "document_starts", " ".join(str(error).split())[:200]
            raise Refused(f"{where} is not as it was written ({reason}): {REMEDY}.") from error
        return starts

    @property
    def has_prompts(self) -> bool:
        return self._prompts is not None

    @functools.cached_property
    def _prompt_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """For each document, the first token of the prompt and the first token after the prompt. Raises: Refused."""
        starts = self.document_starts()
        if self._prompts is None:
            return starts + 1, starts + 1
        try:
            prompts = self._prompts.read().result()
            if (prompts < 0).any() or (prompts >= np.diff(starts, append=self.tokens)).any():
                raise ValueError("a prompt is longer than its document")
        except ValueError as error:
            where, reason = self.folder / "prompts", " ".join(str(error).split())[:200]
            raise Refused(f"{where} is not as it was written ({reason}): {REMEDY}.") from error
        return starts + 1, starts + 1 + prompts

    def in_prompts(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Whether each token of some spans, laid end to end, is part of a prompt: bool. Raises: Refused."""
        first, stop = self._prompt_spans
        tokens = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        document = np.searchsorted(first, tokens, "right") - 1
        return (document >= 0) & (tokens < stop[document])

    def document_at(self, token: int) -> int:
        """The number of the document that holds a token."""
        return bisect.bisect_right(range(self.documents), token, key=self._document_start) - 1

    def _document_start(self, number: int) -> int:
        return self.document_starts(number, number + 1)[0]

    def names(self, numbers: Collection[int]) -> list[dict]:
        """Name and byte offset of the documents with these numbers, in ascending order. Raises: Refused."""
        path = self.folder / "documents.jsonl"
        with path.open("rb") as lines:
            until_last = itertools.islice(lines, max(numbers, default=-1) + 1)
            wanted = [line for number, line in enumerate(until_last) if number in numbers]
        rows = [untrusted.json_object(line, path, REMEDY) for line in wanted]
        for row in rows:
            untrusted.check_types(row, {"name": str, "offset": int}, path, REMEDY)
        return rows
