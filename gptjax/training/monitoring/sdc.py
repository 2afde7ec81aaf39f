"""Silent data corruption (SDC): computes a step twice to find a device that silently computes wrong numbers.

The check takes the time of two steps and the memory of two states. The step must be deterministic, as XLA's programs
on TPUs and CPUs are. On GPUs some kernels add in any order: set XLA_FLAGS=--xla_gpu_deterministic_ops=true.
"""

import socket

import jax
import numpy as np

from gptjax.errors import Failed
from gptjax.parallel.trees import named_leaves
from gptjax.runtime import distributed


def twice(step, state, batch):
    """Returns `step(state, batch)` after checking that a second call gives the same bits. Donates the state.

    Args:
      step: the compiled train step.
      state: the train state.
      batch: the batch of the step.

    Raises:
      Failed: on all processes, if results differ; names the devices, their hosts and the arrays.
    """
    again = step(jax.tree.map(copied, state), batch)
    result = step(state, batch)
    here = {"host": socket.gethostname(), "devices": differences(result, again)}
    found = {
        (int(device), process, each["host"]): names
        for process, each in enumerate(distributed.exchange(here))
        for device, names in each["devices"].items()
    }
    if found:
        number = int(jax.device_get(result[0].step))
        raise Failed(sentence(number, found, result[0].step.sharding.num_devices))
    return result


def copied(array: jax.Array) -> jax.Array:
    """Copies an array within the same devices and memory kind, whichever process the devices belong to."""
    shards = [jax.device_put(part.data, part.data.sharding, may_alias=False) for part in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def differences(result, again) -> dict[int, list[str]]:
    """Returns the names of arrays whose bits differ between the two trees, by the number of this process's device."""
    found = {}
    for (name, one), other in zip(named_leaves(result).items(), named_leaves(again).values(), strict=True):
        for part, repeated in zip(one.addressable_shards, other.addressable_shards, strict=True):
            if not np.array_equal(bits(part.data), bits(repeated.data)):
                found.setdefault(part.device.id, []).append(name.partition(".")[2])
    return found


def bits(array: jax.Array) -> np.ndarray:
    return np.ravel(jax.device_get(array)).view(np.uint8)


def sentence(step: int, found: dict[tuple[int, int, str], list[str]], num_devices: int) -> str:
    """Describes the differences found. found: array names by (device, process, host)."""
    places = ", ".join(
        f"device {device} (process {process}, host {host})" for device, process, host in sorted(found)[:8]
    )
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    names = sorted(set().union(*found.values()))
    arrays = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    remedy = "take it out" if len(found) == 1 else "take them out"
    if 1 < len(found) == num_devices:
        remedy = "a sum over devices spread the error to all, so test each device and take out the faulty one"
    return (
        f"Step {step}, computed twice from the same state and batch, came out differently on {places}{more}, in "
        f"{arrays}: {remedy}, and start again; nothing was saved since."
    )
