"""The mesh, the one table of logical axes, and what it means for a weight to be stored and to be used.

Mesh axes name the strategy (`data`, `fsdp`, `tensor`) and are Explicit: an array's sharding is part of its type, so a
mistake is an error in the line that makes it. Arrays name their dimensions by meaning; `LOGICAL_AXES` alone says which
mesh axis a meaning is cut along.
"""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.errors import Refused

AXES = ("data", "fsdp", "tensor")

# Activations carry the prefix `act_`: `embed` is cut over `fsdp` in a stored weight and whole in an activation.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "positions": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "act_batch": ("data", "fsdp"),
    "act_seq": None,
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_head_dim": None,
}
BATCH_AXES = LOGICAL_AXES["act_batch"]
GATHERED = "gathered_weight"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes what the others leave."""

    data: int = 1  # replicas of the whole model
    fsdp: int = -1  # weights, gradients and optimizer state cut over this many devices, gathered for use
    tensor: int = 1  # heads, MLP and vocabulary cut over this many devices


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """The sizes of (data, fsdp, tensor) on `num_devices`, with the -1 filled in.

    Raises:
      Refused: more than one -1, a size below 1, or a product other than the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    shown = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise Refused(f"mesh.{axis}={size} is no size: give at least 1, or -1 for what the other axes leave.")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise Refused(f"Only one mesh axis may be -1, but {' and '.join('mesh.' + a for a in open_axes)} are.")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and num_devices % taken == 0:
        sizes[open_axes[0]] = num_devices // taken
    elif open_axes or taken != num_devices:
        raise Refused(
            f"{shown} asks for {'a multiple of ' if open_axes else ''}{taken} devices, but there are "
            f"{num_devices}: change a size, or set one to -1 to take what is left."
        )
    return tuple(sizes.values())


def make_mesh(config: MeshConfig, devices: list[jax.Device]) -> jax.sharding.Mesh:
    """The mesh over these devices, in the order of the hardware's links. Raises: Refused."""
    return jax.make_mesh(mesh_shape(config, len(devices)), AXES, devices=devices)


def spec(*names: str) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names; an unknown name is a KeyError."""
    return PartitionSpec(*(LOGICAL_AXES[name] for name in names))


def gather(weight: nnx.Param, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A stored weight as it is used: in the compute dtype, whole over `fsdp`, still cut over `tensor`.

    This is the all-gather of fully-sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020, section 5.3), of the
    compute dtype's bytes; its transpose reduce-scatters the gradient. The name keeps rematerialization from holding
    the gathered copies of all layers at once. A scan over layers has taken the leading axis off.
    """
    names = weight.axes[-weight.ndim :]
    used = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec(*names)))
    return checkpoint_name(jax.sharding.reshard(weight[...].astype(dtype), used), GATHERED)


def check_divides(weights, mesh: jax.sharding.Mesh, keys: dict[str, str]) -> None:
    """Every weight's dimension divides by the mesh axes it is cut along.

    Args:
      weights: a tree of `nnx.Param` (shapes suffice).
      keys: logical axis → the config key to name in the message.

    Raises:
      Refused: naming the key, the size and the mesh axis.
    """
    params = jax.tree.leaves(weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    sizes = {name: size for param in params for name, size in zip(param.axes, param.shape)}
    for name in sorted(sizes, key=lambda name: list(keys).index(name) if name in keys else -1):
        axis = LOGICAL_AXES[name]
        if axis is not None and sizes[name] % mesh.shape[axis]:
            raise Refused(
                f"{keys.get(name, name)}={sizes[name]} is not divisible by mesh.{axis}={mesh.shape[axis]}: "
                "change one of them."
            )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of a batch's [micro-batch, row, position] arrays: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))


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
