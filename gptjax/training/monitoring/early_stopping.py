"""Early stopping: the end of a run whose held-out loss goes down no more, and its best checkpoint (Prechelt 1998).

Both follow from the evaluations in metrics.jsonl alone, which a run that goes on keeps up to its checkpoint. So a run
that was killed, whenever it was, ends at the same step, and nothing has to be told between its processes.
"""

import dataclasses
import math
from collections.abc import Mapping

from gptjax.errors import Refused


@dataclasses.dataclass(frozen=True)
class StoppingConfig:
    """When a run ends early. With it on, the checkpoint of the best evaluation so far is kept."""

    patience: int = 0  # evaluations in a row that improve nothing, after which the run ends; 0 is never
    min_delta: float = 0.0  # nats a token by which the held-out loss has to fall to count as better


def check(config: StoppingConfig) -> None:
    """Raises: Refused."""
    for key in ("patience", "min_delta"):
        if getattr(config, key) < 0:
            raise Refused(f"stopping.{key}={getattr(config, key)} must not be negative.")


def told(config: StoppingConfig) -> str:
    """Why a run ends, in words."""
    return f"the held-out loss has not improved in stopping.patience={config.patience} evaluations"


def over(config: StoppingConfig, losses: Mapping[int, float]) -> bool:
    """Whether the last `patience` evaluations have improved nothing."""
    lowest, waited = math.inf, 0
    for step in sorted(step for step, loss in losses.items() if math.isfinite(loss)):
        better = losses[step] < lowest - config.min_delta
        lowest, waited = (losses[step], 0) if better else (lowest, waited + 1)
    return 0 < config.patience <= waited
