"""Early stopping (Prechelt 1998): ends a run whose held-out loss no longer falls, and keeps the best checkpoint.

Both decisions follow from the evaluations in metrics.jsonl alone, which a resumed run keeps up to the checkpoint. A
killed run therefore ends at the same step, and the processes need no further agreement.
"""

import dataclasses
import math
from collections.abc import Mapping

from gptjax.errors import Refused


@dataclasses.dataclass(frozen=True)
class StoppingConfig:
    """Says when a run ends early. With early stopping on, the checkpoint of the best evaluation so far is kept."""

    patience: int = 0  # the run ends after this many evaluations in a row without improvement; 0: never
    min_delta: float = 0.0  # the held-out loss must fall by more nats per token than this to count as improved


def check(config: StoppingConfig) -> None:
    """Raises: Refused, for a negative value."""
    for key in ("patience", "min_delta"):
        if getattr(config, key) < 0:
            raise Refused(f"stopping.{key}={getattr(config, key)} must not be negative.")


def reason(config: StoppingConfig) -> str:
    """Says in words why a run ends."""
    return f"the held-out loss has not improved in stopping.patience={config.patience} evaluations"


def over(config: StoppingConfig, losses: Mapping[int, float]) -> bool:
    """Says whether the last `patience` evaluations brought no improvement."""
    lowest, waited = math.inf, 0
    for step in sorted(step for step, loss in losses.items() if math.isfinite(loss)):
        better = losses[step] < lowest - config.min_delta
        lowest, waited = (losses[step], 0) if better else (lowest, waited + 1)
    return 0 < config.patience <= waited
