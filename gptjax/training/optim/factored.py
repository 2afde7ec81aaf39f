"""Adafactor's second moment (Shazeer and Stern 2018, sections 3 and 6), for each matrix of a stack by itself.

`optax.scale_by_factored_rms` chooses the two longest axes of an array. It would take heads and head_dim for two axes,
and the layers for one side of a matrix. Here a weight's own declarations say which axes are a side and which a stack.
The state has optax's type and names.
"""

import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gptjax.parallel.trees import is_param

MIN_SIDE = 128  # a matrix with a shorter side keeps its whole second moment, as in optax
DECAY_POWER = 0.8  # the moments' decay after t updates is 1 - t^-0.8 (section 7.2)
EPSILON = 1e-30  # added to the squared gradient (section 9)


def unstacked(param: nnx.Param) -> tuple[int, ...]:
    """The axes of one layer's weight."""
    return tuple(axis for axis, name in enumerate(param.axes) if name not in param.stacked)


def sides(param: nnx.Param) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The axes of a matrix's two sides; None for gains, biases and matrices with a side below MIN_SIDE.

    Positions and adapters declare no inputs: their first axis is one side, with head_dim if that axis is heads.
    """
    axes = unstacked(param)
    if not param.decay or len(axes) < 2:
        return None
    first = tuple(axis for axis in axes if param.axes[axis] in param.inputs)
    if not first:
        first = axes[: 2 if param.axes[axes[1]] == "head_dim" else 1]
    second = tuple(axis for axis in axes if axis not in first)
    short = min(math.prod(param.shape[axis] for axis in side) for side in (first, second))
    return (first, second) if short >= MIN_SIDE else None


def scale_by_factored_rms() -> optax.GradientTransformation:
    """Divides a gradient by the root of its second moment, which for a matrix is an outer product of two averages."""

    def init(params) -> optax.FactoredState:
        moments = zip(*(zeros(param) for param in jax.tree.leaves(params, is_leaf=is_param)), strict=True)
        return state(jnp.zeros((), jnp.int32), moments, params)

    def update(gradients, before, params=None):
        decay = 1 - (before.count + 1.0) ** -DECAY_POWER
        leaves, tree = jax.tree.flatten(gradients, is_leaf=is_param)
        moments = (tree.flatten_up_to(part) for part in (before.v_row, before.v_col, before.v))
        made = [scaled(decay, *leaf) for leaf in zip(leaves, *moments, strict=True)]
        updates, *moments = zip(*made, strict=True)
        return filled(gradients, updates), state(optax.safe_increment(before.count), moments, gradients)

    return optax.GradientTransformation(init, update)


def state(count: jax.Array, moments, like) -> optax.FactoredState:
    return optax.FactoredState(count, *(filled(like, arrays) for arrays in moments))


def filled(like, arrays):
    """A tree of parameters with other arrays."""
    leaves, tree = jax.tree.flatten(like, is_leaf=is_param)
    return tree.unflatten([leaf.replace(array) for leaf, array in zip(leaves, arrays, strict=True)])


def zeros(param: nnx.Param) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The moments of a weight before the first update: those of its first side, of its second side, and whole.

    Each is cut on the mesh as the weight is. Moments that a weight does not have are one number, as in optax.
    """

    def without(axes):
        return jnp.zeros_like(jax.eval_shape(lambda array: array.sum(axes), param[...]))

    none, split = jnp.zeros((1,), param.dtype), sides(param)
    if split is None:
        return none, none, jnp.zeros_like(param[...])
    first, second = split
    return without(second), without(first), none


def scaled(decay: jax.Array, gradient: nnx.Param, row: nnx.Param, column: nnx.Param, whole: nnx.Param):
    """The scaled gradient of a weight, and its next moments in the order of `zeros`."""
    square, split = jnp.square(gradient[...]) + EPSILON, sides(gradient)
    if split is None:
        moment = decay * whole[...] + (1 - decay) * square
        return gradient[...] * moment**-0.5, row[...], column[...], moment
    first, second = split
    rows = decay * row[...] + (1 - decay) * square.mean(second)
    columns = decay * column[...] + (1 - decay) * square.mean(first)
    by_row = jnp.expand_dims(rows, second)
    by_row = (by_row / by_row.mean(first, keepdims=True)) ** -0.5
    return gradient[...] * by_row * jnp.expand_dims(columns, first) ** -0.5, rows, columns, whole[...]


def clip_by_layer_rms(threshold: float = 1.0) -> optax.GradientTransformation:
    """Bounds the root mean square of each layer's update (section 6), as `optax.clip_by_block_rms` does of an array."""

    def clipped(param: nnx.Param) -> nnx.Param:
        size = jnp.sqrt(jnp.square(param[...]).mean(unstacked(param), keepdims=True))
        return param.replace(param[...] / jnp.maximum(1.0, size / threshold))

    def update(updates, empty, params=None):
        return jax.tree.map(clipped, updates, is_leaf=is_param), empty

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
