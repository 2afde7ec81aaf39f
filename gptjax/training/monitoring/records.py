"""Reads metrics.jsonl."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import untrusted


def evaluations(rows: Iterable[Mapping]) -> dict[int, float]:
    """The held-out loss by step, of the rows of metrics.jsonl."""
    return {row["step"]: row["eval_loss"] for row in rows if type(row.get("eval_loss")) is float}


MAX_ROW_BYTES = 1 << 20  # what is longer is no row


def rows_until(path: epath.Path, start: int) -> list[dict]:
    """The rows of metrics.jsonl up to step `start`: a run that goes on from there writes the later ones again.

    A last line that a kill cut short is dropped with them, and so is what is no row.
    """
    return [row for row in each_row(path) if row["step"] <= start]


def each_row(path: epath.Path) -> Iterator[dict]:
    """The rows of metrics.jsonl, one after the other; what is no row with a step is left out."""
    if not untrusted.is_file(path):
        return
    with untrusted.opened(path) as file:
        while line := file.readline(MAX_ROW_BYTES):
            with contextlib.suppress(Refused):
                row = untrusted.json_object(line, path, "it is dropped")
                if type(row.get("step")) is int:
                    yield row
