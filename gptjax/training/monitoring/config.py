"""The config section `recovery`; read before JAX is imported."""

import dataclasses

from gptjax.errors import Refused

POLICIES = ("skip", "stop", "off")


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """When a run rolls back and skips batches (`skip`), or ends (`stop`); `off` does neither.

    A spike is a loss above median + max(spike_deviations × 1.4826 × median absolute deviation, spike_floor), that many
    times in a row. The median is over the spike_window losses before the last spike_steps. The factor 1.4826 turns the
    deviation into standard deviations where losses are normally distributed. By the defaults no healthy run has a
    spike: bad batches and short spikes mend themselves before 16 steps, and chance does not explain 16 losses in a row
    that are both 12 deviations and half a nat above the median.
    """

    on_nonfinite: str = "skip"  # skip, stop or off, after a loss or gradient norm that is not finite
    nonfinite_steps: int = 3  # steps in a row with such a loss or norm, after which on_nonfinite acts
    on_spike: str = "skip"  # skip, stop or off, after a spike
    spike_steps: int = 16  # losses in a row that make a spike
    spike_window: int = 256  # steps of the median; before the window is full there are no spikes
    spike_deviations: float = 12.0  # deviations above the median from which a loss counts
    spike_floor: float = 0.5  # nats per token above the median that a loss must reach at least
    max_returns: int = 3  # rollbacks to the same checkpoint; then the run stops
    sdc_check_every: int = 0  # a step at these multiples is computed twice and compared, with two states held; 0: off


def check_recovery(config: RecoveryConfig) -> None:
    """Checks words and ranges. Raises: Refused."""
    for key in ("on_nonfinite", "on_spike"):
        if getattr(config, key) not in POLICIES:
            raise Refused(f'recovery.{key}="{getattr(config, key)}" is unknown: choose one of {", ".join(POLICIES)}.')
    for key in ("nonfinite_steps", "spike_steps", "spike_window", "max_returns"):
        if getattr(config, key) < 1:
            raise Refused(f"recovery.{key}={getattr(config, key)} must be at least 1.")
    for key in ("spike_deviations", "spike_floor", "sdc_check_every"):
        if getattr(config, key) < 0:
            raise Refused(f"recovery.{key}={getattr(config, key)} must not be negative.")
