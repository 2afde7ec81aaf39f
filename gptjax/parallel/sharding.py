"""The one table of logical axes.

Mesh axes name the strategy (`slices`, `data`, `fsdp`, `tensor`) and are Explicit: shardings are part of array types,
so a mistake is an error in the line that makes the array. Arrays name their dimensions by meaning. `LOGICAL_AXES` alone
says which mesh axis a meaning is cut along. An axis of one device cuts nothing, and appears in no type.

Where devices have to talk, the code says so: see collectives.py, whose transposes are what the backward pass has to
send. Left to the compiler, the gradients of some weights become an all-reduce of the whole matrix (benchmarks/NOTES.md,
Collectives).
"""

import math

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from gptjax.errors import Refused

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
    "experts": None,
    "router": None,  # the outputs of a router, one an expert
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


def spec(*names: str) -> PartitionSpec:
    """How an array with these dimensions is cut on the mesh in use. An unknown name is a KeyError."""
    return _spec(names, jax.sharding.get_abstract_mesh())


def _spec(names, mesh) -> PartitionSpec:
    cut = (_cut(mesh_axes(name), mesh) for name in names)
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in cut))


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that a logical name is cut along, whatever their sizes. An unknown name is a KeyError."""
    axes = LOGICAL_AXES[name]
    return (axes,) if isinstance(axes, str) else axes or ()


def fully_sharded(name: str) -> bool:
    """Whether a weight's axis of this name is cut over `fsdp` in storage, and gathered for use."""
    return "fsdp" in mesh_axes(name)


def _cut(axes, mesh) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def _cut_here(*axes: str) -> tuple[str, ...]:
    return _cut(axes, jax.sharding.get_abstract_mesh())


def check_divides(weights, mesh: jax.sharding.Mesh, keys: dict[str, str]) -> None:
    """Checks that every dimension of a weight divides by the mesh axes that cut it.

    Args:
      weights: a tree of `nnx.Param` (shapes suffice).
      keys: logical axis → the config key to name in the message.

    Raises:
      Refused: with the key, the size and the mesh axis.
    """
    params = jax.tree.leaves(weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    sizes = {name: size for param in params for name, size in zip(param.axes, param.shape, strict=True)}
    for name in sorted(sizes, key=lambda name: list(keys).index(name) if name in keys else -1):
        axes = mesh_axes(name)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if sizes[name] % parts:
            raise Refused(
                f"{keys.get(name, name)}={sizes[name]} is not divisible by mesh.{axes[0]}={parts}: change one of them."
            )
