"""Which keys of a config may differ when a run resumes."""

import dataclasses
import os

from gptjax.data.stream import packing
from gptjax.runtime.files import flatten, stated
from gptjax.training.config.schema import PATHS, RETIRED_KEYS, Config, default
from gptjax.training.optim import config as optimizer

# Keys that may change when a run resumes: the parameters, the optimizer's state and the tokens of a step do not depend
# on them. A section stands for all its keys.
FREE_KEYS = (
    "num_steps", "grad_accum_steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "num_samples",
    "tracker", "sample_prompt", "compiler_options", "mesh", "mixture", "curriculum", "loss", "checkpoint", "tasks",
    "stopping", "recovery", "watchdog", "model.dropout", "model.remat", "model.scan_unroll", "model.dtype",
    "optimizer.peak_learning_rate", "optimizer.schedule", "optimizer.warmup_steps",
    "optimizer.decay_fraction", "optimizer.final_fraction", "optimizer.weight_decay",
    "optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.clip_norm", "optimizer.state_dtype",
    "optimizer.offload", "optimizer.version", "packing.version", "data.store",
)  # fmt: skip


def differences(old: dict, new: Config) -> list[str]:
    """The keys that a run must not change when it resumes, as `key (old there, new here)`.

    Args:
      old: the resolved config that the run was started with, as a dict.
    """

    def bound(key: str) -> bool:
        return not any(key == free or key.startswith(free + ".") for free in (*FREE_KEYS, *RETIRED_KEYS))

    # A key that an earlier version did not know had no effect, like its default now.
    before, now = flatten(default()) | flatten(old), flatten(dataclasses.asdict(new))
    before |= {key: os.path.expanduser(str(before[key])) for key in PATHS}  # earlier versions kept a leading ~
    # The average of the weights is kept or not; its decay is free.
    for flat in (before, now):
        flat["optimizer.ema_decay"] = "on" if flat.get("optimizer.ema_decay") else "off"
    return [
        f"{key} ({stated(before, key)} there, {stated(now, key)} here)"
        for key in sorted(before.keys() | now.keys())
        if bound(key) and before.get(key) != now.get(key)
    ]


def as_begun(old: dict, new: Config) -> Config:
    """The new config with the versions of the optimizer and of the order of rows that the run began with.

    Args:
      old: the resolved config that the run was started with, as a dict; without a version it began with the first.

    Raises: Refused, for a version of a newer gptjax.
    """
    sections = {
        name: dataclasses.replace(getattr(new, name), version=flatten(old).get(f"{name}.version", 1))
        for name in ("optimizer", "packing")
    }
    config = dataclasses.replace(new, **sections)
    optimizer.check(config.optimizer, config.num_steps)
    packing.check(config.packing)
    return config
