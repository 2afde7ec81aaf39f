"""Reads the state of a trial, an ordinary run in a workdir: the evaluations, and whether a process works there."""

import pathlib

from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import lock
from gptjax.training.monitoring import records


def evaluations(folder: pathlib.Path) -> list[tuple[int, float | None]]:
    """Returns (step, held-out loss) of the evaluations of a run; the loss of a failed evaluation is None."""
    rows = records.each_row(epath.Path(folder) / "metrics.jsonl")
    found = [(row["step"], row.get("eval_loss")) for row in rows if "eval_loss" in row or "eval_error" in row]
    return [(step, loss if type(loss) is float else None) for step, loss in found]


def busy(folder: pathlib.Path) -> bool:
    """Tells whether a run works in a folder; a trial outlives a killed sweep."""
    try:
        with lock.locked(epath.Path(folder), "", ""):
            return False
    except Refused:
        return True
