"""Tasks for the executor. Imports no JAX, since the worker processes import this file."""

import json
import os
import pathlib
import signal
import sys
import time
from dataclasses import dataclass

from gptjax.errors import Refused


@dataclass(frozen=True)
class Step:
    """Leaves a file a task, with what it was done by. kill, refuse: tasks at which that happens."""

    folder: pathlib.Path
    kill: int = -1
    refuse: int = -1
    by: signal.Signals = signal.SIGKILL

    def __call__(self, task, report):
        report(1, 10, 100)
        if task == self.kill:
            os.kill(os.getpid(), self.by)
        if task == self.refuse:
            raise Refused(f"task {task} is damaged.")
        report(0, 1, 0)
        (self.folder / f"{task}.json").write_text(json.dumps([os.getpid(), "jax" in sys.modules]))


@dataclass(frozen=True)
class Endless:
    """Never tells anything."""

    folder: pathlib.Path

    def __call__(self, task, report):
        (self.folder / f"{os.getpid()}.pid").touch()
        while True:
            time.sleep(0.1)
