"""The config section `optimizer`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: str = "adamw"
    peak_learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # wsd: share of num_steps over which the rate falls at the end
    final_fraction: float = 0.1  # last rate of cosine, linear and wsd, as a share of the peak
    weight_decay: float = 0.1
    beta1: float = 0.9  # muon: the momentum, and Adam's beta1 where Adam serves
    beta2: float = 0.95  # not used by adafactor, whose second moment has a decay rule of its own
    eps: float = 1e-8  # adamw only
    clip_norm: float = 1.0  # largest norm of the global gradient; 0 is off
    ema_decay: float = 0.0  # decay of the moving average of weights that evaluation and generation use; 0 is off
    state_dtype: str = "float32"  # of the moments between updates; bfloat16 halves them and loses slow changes
    offload: bool = False  # keeps the moments in host memory between updates


STATE_DTYPES = ("float32", "bfloat16")
