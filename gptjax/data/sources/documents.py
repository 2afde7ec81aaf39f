"""The input and the output of a source: its config, parts and documents.

A source is a list of parts in a fixed order. Any process can read a part on its own, which gives documents. Workers
share parts out, so nothing depends on how many workers there are.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from gptjax.errors import Refused, nearest

# A part of a file that can be read from the middle: large against the cost of opening, small against a worker's share.
PART_BYTES = 8 << 20
# Largest record (a line, a row, a page), so that memory is bounded for any file.
RECORD_BYTES = 64 << 20
END = sys.maxsize
# Number of damaged places that are named.
PLACES = 5


@dataclass(frozen=True)
class DataConfig:
    """The corpus to train on.

    source: `stdlib` (the source code of Python's standard library) or another source in `sources.GIVEN`.
    path: a file, glob, folder or name, depending on the source; local or gs://.
    text_field: the field, column or feature that holds the text, in formats with named fields.
    prompt_field: for jsonl, the field of a prompt that precedes the text and carries no loss; empty: no prompts.
    quoting: for csv, whether quotes enclose fields: `quotes`, or `none` (a row a line); empty: quotes, none in .tsv.
    damaged: for a record or file that can't be read: `stop` refuses, `skip` leaves the record out and counts it.
    store: folder of the token store; empty means `store` inside the workdir.
    heldout_fraction: approximate share of the documents kept for evaluation, above 0 and below 1.
    """

    source: str = "stdlib"
    path: str = ""
    text_field: str = "text"
    prompt_field: str = ""
    quoting: str = ""
    damaged: str = "stop"
    store: str = ""
    heldout_fraction: float = 0.02


class Document(NamedTuple):
    """A text, its file, and its offset there: a byte, row or record, depending on the source.

    prompt: number of characters at the start of the text that carry no loss.
    """

    name: str
    offset: int
    text: str
    prompt: int = 0


class Part(NamedTuple):
    """A file of a source, or a range of the file.

    start, stop: the range, in the unit of the file's reader; END means the end of the file.
    size: bytes on disk, used to share parts out and to notice another file.
    """

    source: str
    path: str
    start: int
    stop: int
    size: int


QUOTING = "", "quotes", "none"


class Damages:
    """Handles what can't be read of a part: refuses at once, or counts and keeps the first places.

    Call the object with the place, the problem and the remedy, as parts of a sentence. The place is a file and a
    position, or a function that finds them.

    left_out: number of pages that were left out by reason, which are not damage.
    """

    def __init__(self, setting: str):
        settings = {"stop": True, "skip": False}
        if setting not in settings:
            hint = nearest(setting, settings)
            raise Refused(f'data.damaged="{setting}" must be one of {", ".join(settings)}.{hint}')
        self._stop = settings[setting]
        self.count = 0
        self.left_out: dict[str, int] = {}
        self.places: list[str] = []

    def leave_out(self, reason: str) -> None:
        """Counts a page that has no document."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def __call__(self, where: str | Callable[[], str], why: str, remedy: str):
        if self._stop:
            where = where() if callable(where) else where
            raise Refused(f"{where} {why}: {remedy}, or leave out what is damaged with data.damaged=skip.")
        self.count += 1
        if len(self.places) < PLACES:
            where = where() if callable(where) else where
            self.places.append(f"{where} {why}")
