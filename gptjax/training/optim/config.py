"""The config section `optimizer`; read before JAX is imported."""

import dataclasses

from gptjax.errors import Refused

NAMES = ("adamw", "lion", "adafactor", "muon")  # optimizers.py makes them
SCHEDULE_NAMES = ("constant", "cosine", "linear", "wsd", "inverse_sqrt")  # schedules.py makes them
STATE_DTYPES = ("float32", "bfloat16")
VERSIONS = (1, 2)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: str = "adamw"  # adamw, lion, adafactor or muon
    peak_learning_rate: float = 1e-3  # the rate at the end of the warmup
    schedule: str = "cosine"  # the rate after the warmup: constant, cosine, linear, wsd or inverse_sqrt
    warmup_steps: int = 100  # updates over which the rate rises from 0 to the peak; at most num_steps of them
    decay_fraction: float = 0.2  # share of num_steps over which `wsd` goes down at the end
    final_fraction: float = 0.1  # share of the peak at which cosine, linear and wsd end
    weight_decay: float = 0.1  # times the learning rate, the share of a matrix taken away by an update
    beta1: float = 0.9  # decay of the first moment; for muon of its momentum, and of Nadam's where Nadam serves
    beta2: float = 0.95  # decay of the second moment; adafactor has a rule of its own
    eps: float = 1e-8  # added to the denominator of adamw
    clip_norm: float = 1.0  # largest norm of the global gradient; 0: off
    ema_decay: float = 0.0  # decay of an average of the weights that evaluation and generation use; 0: off
    state_dtype: str = "float32"  # of the moments between updates; bfloat16 halves them and forgets slow changes
    offload: bool = False  # the moments wait in host memory between updates
    version: int = 2  # of adafactor's rules; 1: factored across layers; a run keeps the version that it began with


def check(config: OptimizerConfig, num_steps: int) -> None:
    """Raises: Refused, for an unknown name or a number out of range."""
    for key, words in (("name", NAMES), ("schedule", SCHEDULE_NAMES), ("state_dtype", STATE_DTYPES)):
        if getattr(config, key) not in words:
            raise Refused(f'optimizer.{key}="{getattr(config, key)}" is unknown: choose one of {", ".join(words)}.')
    if config.version not in VERSIONS:
        raise Refused(f"optimizer.version={config.version} must be 1 or 2; a newer gptjax may know it.")
    for key in ("decay_fraction", "final_fraction"):
        if not 0 <= getattr(config, key) <= 1:
            raise Refused(f"optimizer.{key}={getattr(config, key)} must lie between 0 and 1.")
    for key in ("beta1", "beta2", "ema_decay"):
        if not 0 <= getattr(config, key) < 1:
            raise Refused(f"optimizer.{key}={getattr(config, key)} must be at least 0 and below 1.")
    for key in ("peak_learning_rate", "weight_decay", "clip_norm", "warmup_steps"):
        if getattr(config, key) < 0:
            raise Refused(f"optimizer.{key}={getattr(config, key)} must not be negative.")
