"""What `tracker` names: where a run's rows go besides metrics.jsonl and TensorBoard.

A tracker is a function that is called with the config, a dict of its sections, and the workdir, when the run begins or
goes on, and returns a function of a step and a row:

    def mine(config: dict, workdir: str):
        board = open(f"{workdir}/mine.txt", "a")
        return lambda step, row: print(step, row.get("loss"), file=board, flush=True)

`tracker=package.module:mine` takes it from any module that Python finds. Only process 0 calls it, and what it raises is
one warning.
"""

import importlib
from collections.abc import Callable

from gptjax.errors import Refused
from gptjax.runtime import optional

Log = Callable[[int, dict], None]


def find(name: str) -> Callable[[dict, str], Log] | None:
    """The tracker of that name; None for an empty one. Raises: Refused, where it can't be used."""
    if not name:
        return None
    if name == "wandb":
        wandb_run = optional.package("gptjax.training.monitoring.wandb_tracker", "tracker=wandb", "wandb")
        wandb_run.check()
        return wandb_run.start
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise Refused(f"tracker={name} is unknown: write wandb, or package.module:function for one of your own.")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        raise Refused(
            f"tracker={name} can't be imported ({type(error).__name__}: {' '.join(str(error).split())[:300]}): set "
            "PYTHONPATH to the folder it is in."
        ) from error
    if not callable(found):
        raise Refused(f"tracker={name}: {module} has no function {function}, so name one of its own.")
    return found
