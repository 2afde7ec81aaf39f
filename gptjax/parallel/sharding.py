"""The mesh, the one table of logical axes, and the collectives that training needs.

Mesh axes name the strategy (`slices`, `data`, `fsdp`, `tensor`) and are Explicit: an array's sharding is part of its
type, so a mistake is an error in the line that makes it. Arrays name their dimensions by meaning; `LOGICAL_AXES` alone
says which mesh axis a meaning is cut along. An axis of one device cuts nothing, and appears in no type.

Where devices have to talk, the code says so: inside `manual` by `gather`, `gather_sequence`, `reduce_sequence` and
`summed`, whose transposes are what the backward pass has to send. Left to the compiler, the gradients of some weights
come out as an all-reduce of the whole matrix (benchmarks/NOTES.md, Collectives).
"""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.errors import Refused

# `ring` is a part of full sharding: the third side of a torus (see `ring_size`), 1 elsewhere.
AXES = ("slices", "data", "fsdp", "ring", "tensor")

# Activations carry the prefix `act_`: `embed` is cut over `fsdp` in a stored weight and whole in an activation.
LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "positions": "tensor",
    "embed": ("fsdp", "ring"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "rank": None,
    "act_batch": ("slices", "data", "fsdp", "ring"),
    "act_seq": None,
    "act_stream": "tensor",  # the sequence of the residual stream between blocks (Korthikanti et al. 2022, section 4.2)
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_head_dim": None,
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}
BATCH_AXES = LOGICAL_AXES["act_batch"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes what the others leave."""

    data: int = 1  # replicas of the whole model
    fsdp: int = -1  # weights, gradients and optimizer state cut over this many devices, gathered for use
    tensor: int = 1  # heads, MLP, vocabulary and the sequence between blocks cut over this many devices
    slices: int = 0  # replicas joined by the data-centre network; 0: as many as the TPU slices, 1 on other devices


def num_slices(devices: list[jax.Device]) -> int:
    """TPU slices among the devices. GPUs have a slice index too, one a host: that is no reason to replicate."""
    return len({slice_index(device) for device in devices}) if devices[0].platform == "tpu" else 1


def slice_index(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0  # a single slice has none


def mesh_shape(config: MeshConfig, num_devices: int, tpu_slices: int) -> tuple[int, int, int, int]:
    """The sizes of (slices, data, fsdp, tensor) on `num_devices` in `tpu_slices`, with 0 and -1 filled in.

    Raises:
      Refused: more than one -1, a size below 1, a product other than the number of devices, or other slices than
        they are in.
    """
    sizes = {"slices": config.slices or tpu_slices} | {
        axis: getattr(config, axis) for axis in ("data", "fsdp", "tensor")
    }
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
    if tpu_slices > 1 and sizes["slices"] != tpu_slices:
        raise Refused(
            f"mesh.slices={sizes['slices']}, but the devices are {tpu_slices} TPU slices: set it to {tpu_slices}, or "
            "to 0."
        )
    return tuple(sizes.values())


def make_mesh(config: MeshConfig, devices: list[jax.Device]) -> jax.sharding.Mesh:
    """The mesh over these devices: slices outermost, and within one the order of the hardware's links.

    Raises:
      Refused: sizes that do not make up the devices, or other slices than they have.
    """
    found = num_slices(devices)
    slices, *inside = mesh_shape(config, len(devices), found)
    devices = sorted(devices, key=slice_index) if found > 1 else devices
    order = np.stack([linked(inside, list(group)) for group in np.array(devices).reshape(slices, -1)])
    ring = ring_size(order[0, 0, :, 0])
    data, fsdp, tensor = inside
    order = order.reshape(slices, data, fsdp // ring, ring, tensor)
    return jax.sharding.Mesh(order, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def ring_size(devices: np.ndarray) -> int:
    """Of devices that share a model, how many make up one side of the torus, if they fill all three sides of one.

    For a whole three-dimensional torus XLA makes an all-gather of an all-reduce, at twice the bytes; along one side and
    then along the other two it gathers (benchmarks/NOTES.md, Collectives).
    """
    if devices[0].platform != "tpu":
        return 1
    places = np.array([device.coords for device in devices])
    sides = [len(set(places[:, side])) for side in range(3)]
    if min(sides) == 1 or math.prod(sides) != len(devices):
        return 1
    side = np.argmax(places[1] != places[0])
    rows = places.reshape(-1, sides[side], 3)
    others = np.delete(rows, side, axis=-1)
    return sides[side] if (others == others[:, :1]).all() else 1


def sizes(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """A mesh's axes as the config has them: `ring` is a part of `fsdp`."""
    shape = dict(mesh.shape)
    ring = shape.pop("ring")
    return shape | {"fsdp": shape["fsdp"] * ring}


def linked(shape: list[int], devices: list[jax.Device]) -> np.ndarray:
    """One slice's devices in this shape, its last axis on the shortest rings that there are."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis that is no product of whole physical ones
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def spec(*names: str) -> PartitionSpec:
    """How an array whose dimensions have these names is cut on the mesh in use; an unknown name is a KeyError."""
    return _spec(names, jax.sharding.get_abstract_mesh())


def _spec(names, mesh) -> PartitionSpec:
    cut = (_cut(mesh_axes(name), mesh) for name in names)
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in cut))


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that a logical name is cut along, whatever their sizes; an unknown name is a KeyError."""
    axes = LOGICAL_AXES[name]
    return (axes,) if isinstance(axes, str) else axes or ()


def _cut(axes, mesh) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def _cut_here(*axes: str) -> tuple[str, ...]:
    return _cut(axes, jax.sharding.get_abstract_mesh())


def manual(function, *names: str):
    """`function` on each device's shard of its arguments, which are cut as their types say.

    Args:
      names: of each result, the logical names of its dimensions, in one string.
    """
    outs = tuple(spec(*result.split()) for result in names)
    return jax.shard_map(function, out_specs=outs if len(outs) > 1 else outs[0])


def gather(weight: nnx.Param, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Inside `manual`: a stored weight as it is used, in the compute dtype, whole over `fsdp`, still cut over `tensor`.

    This is the all-gather of fully-sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020, section 5.3), of the
    compute dtype's bytes; its transpose reduce-scatters the gradient over `fsdp` and then sums the shards over the
    replicas. A scan over layers has taken the leading axis off.
    """
    array = varying(weight[...].astype(dtype), "slices", "data")
    for dimension, name in enumerate(weight.axes[-array.ndim :]):
        if name == "embed":
            for axis in reversed(_cut_here(*mesh_axes(name))):
                array = jax.lax.all_gather(array, axis, axis=dimension, tiled=True)
    return array


def gather_sequence(x_BTD: jax.Array, sequence: str) -> jax.Array:
    """Inside `manual`: activations that are cut along `sequence`, whole; its transpose is `reduce_sequence`."""
    (axis,) = spec(sequence)
    return jax.lax.all_gather(x_BTD, axis, axis=1, tiled=True) if axis else x_BTD


def reduce_sequence(x_BTD: jax.Array, sequence: str) -> jax.Array:
    """Inside `manual`: partial sums over `tensor`, added up; each device keeps its part of the sequence, or all."""
    (axis,) = spec(sequence)
    return jax.lax.psum_scatter(x_BTD, axis, scatter_dimension=1, tiled=True) if axis else summed(x_BTD, "tensor")


def summed(x, *axes: str):
    """Inside `manual`: the sum over these mesh axes, of a tree of arrays that differ along them."""
    axes = _cut_here(*axes)
    return jax.lax.psum(x, axes) if axes else x


def largest(x: jax.Array, *axes: str) -> jax.Array:
    """Inside `manual`: the largest value over these mesh axes."""
    axes = _cut_here(*axes)
    return jax.lax.pmax(x, axes) if axes else x


def varying(x: jax.Array, *axes: str) -> jax.Array:
    """Inside `manual`: the same, taken to differ along these mesh axes, so that its gradient is summed over them."""
    axes = _cut_here(*axes)
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def index(axis: str) -> jax.Array | int:
    """Inside `manual`: where this device stands along a mesh axis."""
    return jax.lax.axis_index(axis) if _cut_here(axis) else 0


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
        axes = mesh_axes(name)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if sizes[name] % parts:
            raise Refused(
                f"{keys.get(name, name)}={sizes[name]} is not divisible by mesh.{axes[0]}={parts}: change one of them."
            )


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
