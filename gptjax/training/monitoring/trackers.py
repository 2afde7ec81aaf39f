"""Trackers: where a run's rows go besides metrics.jsonl and TensorBoard, chosen by the config key `tracker`.

A tracker is a function of the config (a dict of sections) and the workdir. gptjax calls the tracker when a run starts
or resumes; the tracker returns a function of a step and a row:

    def mine(config: dict, workdir: str):
        board = open(f"{workdir}/mine.txt", "a")
        return lambda step, row: print(step, row.get("loss"), file=board, flush=True)

`tracker=package.module:mine` loads the tracker from any module that Python finds. Only process 0 calls the tracker, and
an exception from the tracker becomes a single warning.
"""

import importlib
import typing
from collections.abc import Callable

from gptjax.errors import Refused
from gptjax.runtime import optional

Log = Callable[[int, dict], None]


def find(name: str) -> Callable[[dict, str], Log] | None:
    """Returns the tracker of a name; None for an empty name. Raises: Refused, if the tracker can't be used."""
    if not name:
        return None
    if name == "wandb":
        wandb_run = optional.package("gptjax.training.monitoring.wandb_tracker", "tracker=wandb", "wandb")
        wandb_run.check()
        return wandb_run.start
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise Refused(f"tracker={name} is unknown: write wandb, or package.module:function for your own tracker.")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        raise Refused(
            f"tracker={name} can't be imported ({type(error).__name__}: {' '.join(str(error).split())[:300]}): set "
            f"PYTHONPATH to the folder that holds {module}."
        ) from error
    if not callable(found):
        raise Refused(f"tracker={name}: {module} has no function {function}; name a function of that module.")
    return typing.cast(Callable[[dict, str], Log], found)
