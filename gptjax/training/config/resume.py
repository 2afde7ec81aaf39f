"""Which keys of a config may differ when a run resumes."""

import dataclasses

from gptjax.runtime.files import flatten
from gptjax.training.config.schema import RETIRED_KEYS, Config, default

# What a run may change when it goes on: neither the parameters, nor the optimizer's state, nor which tokens a step
# sees depends on these. A section stands for all its keys.
FREE_KEYS = (
    "num_steps", "grad_accum_steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "num_samples",
    "tracker", "sample_prompt", "compiler_options", "mesh", "mixture", "curriculum", "loss", "checkpoint", "tasks",
    "stopping", "recovery", "watchdog", "model.dropout", "model.remat", "model.scan_unroll", "model.dtype",
    "optimizer.peak_learning_rate", "optimizer.schedule", "optimizer.warmup_steps",
    "optimizer.decay_fraction", "optimizer.final_fraction", "optimizer.weight_decay",
    "optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.clip_norm", "optimizer.state_dtype",
    "optimizer.offload", "data.store",
)  # fmt: skip


def differences(old: dict, new: Config) -> list[str]:
    """Keys that a run must not change when it goes on, as `key (old there, new here)`.

    Args:
      old: the resolved config that the run was started with, as a dict.
    """

    def bound(key: str) -> bool:
        return not any(key == free or key.startswith(free + ".") for free in (*FREE_KEYS, *RETIRED_KEYS))

    # What a run of an earlier version does not name had no effect on it, and that is what a default is.
    old, new = flatten(default()) | flatten(old), flatten(dataclasses.asdict(new))
    # One average of the weights is kept or none; how fast it moves is free.
    for flat in (old, new):
        flat["optimizer.ema_decay"] = "on" if flat.get("optimizer.ema_decay") else "off"
    return [
        f"{key} ({old.get(key, 'not set')} there, {new.get(key, 'not set')} here)"
        for key in sorted(old.keys() | new.keys())
        if bound(key) and old.get(key) != new.get(key)
    ]
