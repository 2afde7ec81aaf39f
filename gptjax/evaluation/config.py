"""The config section `tasks`; read before JAX is imported."""

import dataclasses

from gptjax.errors import Refused


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """lm-eval tasks that score a run, besides the held-out loss."""

    names: str = ""  # tasks and groups, separated by commas
    folder: str = ""  # folder with YAML files of more tasks; they may run code, so use only your own
    every: int = 0  # steps between two scores; 0: only at the end
    limit: int = 0  # documents of each task; 0: all
    num_fewshot: int = -1  # examples before a question; -1: the number that the task gives


def check(config: TasksConfig) -> None:
    """Checks the numbers; `lm_eval.load` finds the tasks. Raises: Refused."""
    for key, least in (("every", 0), ("limit", 0), ("num_fewshot", -1)):
        if getattr(config, key) < least:
            raise Refused(f"tasks.{key}={getattr(config, key)} must be at least {least}.")
