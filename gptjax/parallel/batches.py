"""How a global batch is divided over hosts and devices."""

import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.parallel.sharding import BATCH_AXES, _spec


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of a batch's [micro-batch, row, position] arrays: rows over all axes but `tensor`."""
    return NamedSharding(mesh, PartitionSpec(None, *_spec(("act_batch", "act_seq"), mesh)))


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(mesh: jax.sharding.Mesh, batch_size: int, accumulation: int) -> np.ndarray:
    """The rows of the global batch [0, batch_size) that this process's devices hold, ascending."""
    shape = (accumulation, batch_size // accumulation, 1)
    rows = np.arange(batch_size).reshape(shape)
    shards = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([rows[shard].ravel() for shard in shards]))


def place(local, rows: np.ndarray, mesh: jax.sharding.Mesh, batch_size: int, accumulation: int):
    """This process's rows, a tree of [len(rows), T] arrays, as global [accumulation, batch/accumulation, T] arrays."""
    row_of = np.arange(batch_size).reshape(accumulation, batch_size // accumulation)
    sharding = batch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        shape = (*row_of.shape, array.shape[-1])
        shards = [
            jax.device_put(array[np.searchsorted(rows, row_of[index[:2]])], device)
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return jax.tree.map(put, local)
