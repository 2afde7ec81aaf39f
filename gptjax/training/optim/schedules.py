"""Learning rate schedules."""

import dataclasses

import jax.numpy as jnp
import optax

from gptjax.training.optim.config import OptimizerConfig


def wsd(peak: float, final: float, steps: int, config: OptimizerConfig) -> optax.Schedule:
    """Warmup, stable, decay (Hu et al. 2024, MiniCPM, section 4): flat, then a straight line down."""
    down = max(1, round(config.decay_fraction * (steps + config.warmup_steps)))
    return optax.linear_schedule(peak, final, down, transition_begin=max(0, steps - down))


def inverse_sqrt(peak: float, final: float, steps: int, config: OptimizerConfig) -> optax.Schedule:
    """peak · √(warmup / step) (Vaswani et al. 2017, section 5.3)."""
    warmup = max(1, config.warmup_steps)
    return lambda step: peak * (warmup / (step + warmup)) ** 0.5


def constant(peak: float, final: float, steps: int, config: OptimizerConfig) -> optax.Schedule:
    return optax.constant_schedule(peak)


def cosine(peak: float, final: float, steps: int, config: OptimizerConfig) -> optax.Schedule:
    """Half a cosine from the peak to the final rate (Loshchilov and Hutter 2017)."""
    return optax.cosine_decay_schedule(peak, steps, final / peak)


def linear(peak: float, final: float, steps: int, config: OptimizerConfig) -> optax.Schedule:
    return optax.linear_schedule(peak, final, steps)


# The shape after the warmup: (peak, final, steps after the warmup, config) → schedule of the steps since the warmup.
SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear, "wsd": wsd, "inverse_sqrt": inverse_sqrt}


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Completed updates → rate of the next update: a straight line up to the peak, then the schedule's shape."""
    peak = config.peak_learning_rate or 1e-30  # a peak of 0 freezes a model, and cosine divides by the peak
    warmup = min(config.warmup_steps, num_steps)
    config = dataclasses.replace(config, warmup_steps=warmup)
    after = SCHEDULES[config.schedule](peak, peak * config.final_fraction, max(1, num_steps - warmup), config)
    joined = optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])
    # The first update has a rate above 0, the last update the final rate. Rounding may take a final rate of 0 below it.
    return lambda step: jnp.maximum(joined(step + 1), 0.0)
