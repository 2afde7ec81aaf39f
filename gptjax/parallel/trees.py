"""Trees of arrays: names, placement, and what is a parameter."""

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec


def named_leaves(tree) -> dict:
    """The leaves of a tree by path: {"model.blocks.query": leaf, …}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }


def placed(shapes, mesh: jax.sharding.Mesh):
    """Places an abstract tree on the devices of `mesh`. A leaf without a sharding is whole on each device."""

    def put(leaf):
        spec = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(put, shapes)


def is_param(leaf) -> bool:
    return isinstance(leaf, nnx.Param)


def put(array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Places an array that every process holds whole on devices, which may belong to several processes."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
