"""Reads metrics.jsonl."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import untrusted


def evaluations(rows: Iterable[Mapping]) -> dict[int, float]:
    """Returns the held-out loss by step from rows of metrics.jsonl."""
    return {row["step"]: row["eval_loss"] for row in rows if type(row.get("eval_loss")) is float}


MAX_ROW_BYTES = 1 << 20  # a longer line is not a row


def rows_until(path: epath.Path, start: int) -> list[dict]:
    """Returns the rows of metrics.jsonl up to step `start`; a run resumed there writes the later rows again.

    Anything that is not a row is dropped too, such as a last line that a kill cut short.
    """
    return [row for row in each_row(path) if row["step"] <= start]


def each_row(path: epath.Path) -> Iterator[dict]:
    """Yields the rows of metrics.jsonl in order; a line that is not a row with a step is left out."""
    if not untrusted.is_file(path):
        return
    with untrusted.opened(path) as file:
        while line := file.readline(MAX_ROW_BYTES):
            with contextlib.suppress(Refused):
                row = untrusted.json_object(line, path, "it is dropped")
                if type(row.get("step")) is int:
                    yield row
