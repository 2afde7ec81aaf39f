"""A trial, which is an ordinary run in a workdir of its own: how far it is, and whether somebody works on it."""

import pathlib

from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import lock
from gptjax.training.monitoring import records


def evaluations(folder: pathlib.Path) -> list[tuple[int, float | None]]:
    """(step, held-out loss) of the evaluations that a run in a folder has done; None for one that failed."""
    rows = records.each_row(epath.Path(folder) / "metrics.jsonl")
    found = [(row["step"], row.get("eval_loss")) for row in rows if "eval_loss" in row or "eval_error" in row]
    return [(step, loss if type(loss) is float else None) for step, loss in found]


def busy(folder: pathlib.Path) -> bool:
    """Whether a run works in a folder: that of a sweep which was killed goes on by itself."""
    try:
        with lock.locked(epath.Path(folder), "", ""):
            return False
    except Refused:
        return True
