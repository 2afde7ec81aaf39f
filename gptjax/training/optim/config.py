"""The config section `optimizer`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: str = "adamw"
    peak_learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # share of num_steps over which `wsd` goes down at the end
    final_fraction: float = 0.1  # of the peak, where cosine, linear and wsd end
    weight_decay: float = 0.1
    beta1: float = 0.9  # muon: its momentum, and Adam's where Adam serves
    beta2: float = 0.95  # not of adafactor, whose second moment forgets by a rule of its own
    eps: float = 1e-8  # of adamw
    clip_norm: float = 1.0  # of the global gradient; 0 is off
    ema_decay: float = 0.0  # of an average of the weights that evaluation and generation use; 0 is off
    state_dtype: str = "float32"  # of the moments between updates; bfloat16 halves them and forgets what moves slowly
    offload: bool = False  # the moments wait in host memory between updates


STATE_DTYPES = ("float32", "bfloat16")
