"""The collectives of a model, each written out inside `shard_map`."""

import jax
from flax import nnx

from gptjax.parallel.sharding import _cut_here, fully_sharded, mesh_axes, spec


def manual(function, *names: str):
    """Runs a function on each device's shards of the arguments, which are cut as their types say.

    Args:
      names: a string for each result, with the logical names of the dimensions.
    """
    outs = tuple(spec(*result.split()) for result in names)
    return jax.shard_map(function, out_specs=outs if len(outs) > 1 else outs[0])


def gather(weight: nnx.Param, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Inside `manual`: a stored weight as it is used, in the compute dtype, whole over `fsdp`, still cut over `tensor`.

    This is the all-gather of fully-sharded data parallelism (ZeRO-3, Rajbhandari et al. 2020, section 5.3), in the
    compute dtype. The transpose reduce-scatters the gradient over `fsdp` and then sums the shards over the replicas.
    A scan over layers has removed the leading axis.
    """
    array = varying(weight[...].astype(dtype), "slices", "data")
    for dimension, name in enumerate(weight.axes[-array.ndim :]):
        if fully_sharded(name):
            for axis in reversed(_cut_here(*mesh_axes(name))):
                array = jax.lax.all_gather(array, axis, axis=dimension, tiled=True)
    return array


def gather_sequence(x_BTD: jax.Array, sequence: str) -> jax.Array:
    """Inside `manual`: makes activations whole that are cut along `sequence`. The transpose is `reduce_sequence`."""
    (axis,) = spec(sequence)
    return jax.lax.all_gather(x_BTD, axis, axis=1, tiled=True) if axis else x_BTD


def reduce_sequence(x_BTD: jax.Array, sequence: str) -> jax.Array:
    """Inside `manual`: adds up partial sums over `tensor`. Each device keeps its part of a cut sequence, or all."""
    (axis,) = spec(sequence)
    return jax.lax.psum_scatter(x_BTD, axis, scatter_dimension=1, tiled=True) if axis else summed(x_BTD, "tensor")


def summed(x, *axes: str):
    """Inside `manual`: sums a tree of arrays that differ along these mesh axes over those axes."""
    axes = _cut_here(*axes)
    return jax.lax.psum(x, axes) if axes else x


def largest(x: jax.Array, *axes: str) -> jax.Array:
    """Inside `manual`: the largest value over these mesh axes."""
    axes = _cut_here(*axes)
    return jax.lax.pmax(x, axes) if axes else x


def varying(x: jax.Array, *axes: str) -> jax.Array:
    """Inside `manual`: marks x as differing along these mesh axes, so that the gradient of x is summed over them."""
    axes = _cut_here(*axes)
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def index(axis: str) -> jax.Array | int:
    """Inside `manual`: this device's index along a mesh axis."""
    return jax.lax.axis_index(axis) if _cut_here(axis) else 0
