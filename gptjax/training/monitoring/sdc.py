"""Silent corruption: a step computed twice, to find a device that computes wrongly and does not say so.

It takes the time of two steps, and the memory of two states. The step has to be deterministic, as XLA's programs on
TPUs and CPUs are; on GPUs, where some kernels add up in any order, set XLA_FLAGS=--xla_gpu_deterministic_ops=true.
"""

import socket

import jax
import numpy as np

from gptjax.errors import Failed
from gptjax.parallel.trees import named_leaves
from gptjax.runtime import distributed


def twice(step, state, batch):
    """What `step(state, batch)` returns, after it returned the same a second time, bit for bit. Donates the state.

    Args:
      step: the compiled train step.

    Raises:
      Failed: on all processes, naming the devices on which the two differ, their hosts, and the arrays.
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
    """A copy in other memory of the same devices and kind, whoever the devices belong to."""
    shards = [jax.device_put(part.data, part.data.sharding, may_alias=False) for part in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def differences(result, again) -> dict[int, list[str]]:
    """By the number of each of this process's devices, the arrays of which it holds other bits in the two trees."""
    found = {}
    for (name, one), other in zip(named_leaves(result).items(), named_leaves(again).values(), strict=True):
        for part, its in zip(one.addressable_shards, other.addressable_shards, strict=True):
            if not np.array_equal(bits(part.data), bits(its.data)):
                found.setdefault(part.device.id, []).append(name.partition(".")[2])
    return found


def bits(array: jax.Array) -> np.ndarray:
    return np.ravel(jax.device_get(array)).view(np.uint8)


def sentence(step: int, found: dict[tuple[int, int, str], list[str]], num_devices: int) -> str:
    """Of what was found, by (device, process, host)."""
    places = ", ".join(
        f"device {device} (process {process}, host {host})" for device, process, host in sorted(found)[:8]
    )
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    names = sorted(set().union(*found.values()))
    arrays = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    remedy = "take it out" if len(found) == 1 else "take them out"
    if 1 < len(found) == num_devices:
        remedy = "a sum over devices carried it to all, so test each of them, and take out the one that is at fault"
    return (
        f"Step {step}, computed twice from the same state and batch, came out differently on {places}{more}, in "
        f"{arrays}: {remedy}, and start again; nothing was saved since."
    )
