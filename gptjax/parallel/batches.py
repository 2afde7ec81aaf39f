"""How a global batch is divided over hosts and devices."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.parallel.sharding import BATCH_AXES, _spec


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """The layout of a global batch on a mesh.

    Args:
      mesh: the mesh whose devices hold the batch.
      batch_size: rows of the global batch.
      accumulation: micro-batches that the rows are cut into.
    """

    mesh: jax.sharding.Mesh
    batch_size: int
    accumulation: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(micro-batches, rows of each)."""
        return self.accumulation, self.batch_size // self.accumulation


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of a batch's [micro-batch, row, position] arrays: rows over all axes but `tensor`."""
    return NamedSharding(mesh, PartitionSpec(None, *_spec(("act_batch", "act_seq"), mesh)))


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """The number of parts that the rows of a batch are cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(layout: BatchLayout) -> np.ndarray:
    """The rows of the global batch [0, batch_size) that this process's devices hold, ascending."""
    shape = (*layout.shape, 1)
    rows = np.arange(layout.batch_size).reshape(shape)
    shards = batch_sharding(layout.mesh).addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([rows[shard].ravel() for shard in shards]))


def place(local, rows: np.ndarray, layout: BatchLayout):
    """Places this process's rows as global [accumulation, batch/accumulation, T] arrays.

    Args:
      local: a tree of [len(rows), T] arrays.
      rows: the layout's `local_rows`.
      layout: the layout of the global batch.
    """
    row_of = np.arange(layout.batch_size).reshape(layout.shape)
    sharding = batch_sharding(layout.mesh)

    def put(array: np.ndarray) -> jax.Array:
        shape = (*row_of.shape, array.shape[-1])
        shards = [
            jax.device_put(array[np.searchsorted(rows, row_of[index[:2]])], device)
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return jax.tree.map(put, local)
