"""What a source is asked for, and what it gives.

A source is a list of parts, in an order that is the same every time; each part can be read on its own, by any process,
and gives documents. Parts are what is shared out among workers, so nothing depends on how many there are.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from gptjax.errors import Refused, nearest

# A part of a file that can be read from its middle: large beside what it costs to begin, small beside a share of a corpus.
PART_BYTES = 8 << 20
# What one record (a line, a row, a page) may have at most, so that memory is bounded whatever a file holds.
RECORD_BYTES = 64 << 20
END = sys.maxsize
# How many damaged places are named.
PLACES = 5


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    source: `stdlib` (the source code of Python's standard library) or one of the others in `sources.GIVEN`.
    path: a file, glob, folder or name, as the source says; local or gs://.
    text_field: the field, column or feature that holds the text, in formats that have names for them.
    prompt_field: of jsonl, the field of a prompt, which is put before the text and carries no loss; empty is none.
    damaged: what becomes of a record or file that can't be read: `stop` refuses it, `skip` leaves it out and counts it.
    store: folder of the token store; empty means `store` inside the workdir.
    heldout_fraction: about which part of the documents is kept for evaluation, more than 0 and less than 1.
    """

    source: str = "stdlib"
    path: str = ""
    text_field: str = "text"
    prompt_field: str = ""
    damaged: str = "stop"
    store: str = ""
    heldout_fraction: float = 0.02


class Document(NamedTuple):
    """A text, the file it is from, and where it starts there: a byte, row or record, as its source says.

    prompt: how many characters the text begins with that carry no loss.
    """

    name: str
    offset: int
    text: str
    prompt: int = 0


class Part(NamedTuple):
    """A file of a source, or a range of one.

    start, stop: what of it, in the unit of its reader; END is as far as it goes. size: its bytes on disk, by which
    parts are shared out, and another file noticed.
    """

    source: str
    path: str
    start: int
    stop: int
    size: int


class Damages:
    """What of a part can't be read: refused at once, or counted and its first places kept.

    Call it with the place (a file, and what in it, or a function that finds out), what is wrong with it, and what to
    do, as parts of a sentence. without_text: pages that have none, which is no damage.
    """

    def __init__(self, setting: str):
        settings = {"stop": True, "skip": False}
        if setting not in settings:
            hint = nearest(setting, settings)
            raise Refused(f'data.damaged is "{setting}", which is none of {", ".join(settings)}.{hint}')
        self._stop = settings[setting]
        self.count, self.places, self.without_text = 0, [], 0

    def __call__(self, where: str | Callable[[], str], why: str, remedy: str):
        if self._stop:
            where = where() if callable(where) else where
            raise Refused(f"{where} {why}: {remedy}, or leave out what is damaged with data.damaged=skip.")
        self.count += 1
        if len(self.places) < PLACES:
            where = where() if callable(where) else where
            self.places.append(f"{where} {why}")
