"""Weights as int8: every matrix is rounded to 255 steps, with a scale for each output.

The steps are symmetric, the largest of an output's weights at ±127 (Jacob et al. 2018, section 2.1, without the zero
point; Dettmers et al. 2022, section 2.1, by rows and columns). A matrix is a weight that declares inputs: the matrices
of blocks and both embeddings. Norms, biases and learned positions keep their dtype.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.models.interface import LanguageModel
from gptjax.models.layers import Int8
from gptjax.parallel.trees import is_param


def quantized(model: LanguageModel) -> LanguageModel:
    """The model `for_decoding` with int8 weights; the given model stays as it is."""

    def small(weight: nnx.Param) -> nnx.Param | Int8:
        if not weight.inputs:
            return weight
        outputs = tuple(name for name in weight.axes if name not in weight.inputs)
        values, scale = steps(weight[...], input_dimensions(weight))
        return Int8(nnx.Param(values, axes=weight.axes), nnx.Param(scale, axes=outputs))

    return jax.tree.map(small, model.for_decoding(), is_leaf=is_param)


def rounded(model: LanguageModel) -> LanguageModel:
    """The model with each weight rounded as int8 would, in the weight's own dtype: shows the cost of int8 in loss."""

    def coarse(weight: nnx.Param) -> nnx.Param:
        return weight.replace(restored(weight[...], input_dimensions(weight))) if weight.inputs else weight

    return jax.tree.map(coarse, model, is_leaf=is_param)


def input_dimensions(weight: nnx.Param) -> tuple[int, ...]:
    """The dimensions that a product sums over, counted from the end, because stacked axes may have been taken off."""
    return tuple(weight.axes.index(name) - len(weight.axes) for name in weight.inputs)


@functools.partial(jax.jit, static_argnums=1)
def steps(weight: jax.Array, inputs: tuple[int, ...]):
    """(int8 with the weight's shape, float32 scale with the shape of the weight's outputs)."""
    weight = weight.astype(jnp.float32)
    largest = jnp.abs(weight).max(inputs, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(weight / scale).astype(jnp.int8), scale.squeeze(inputs)


@functools.partial(jax.jit, static_argnums=1)
def restored(weight: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
    """The weight after rounding to int8 and back."""
    values, scale = steps(weight, inputs)
    return (values * jnp.expand_dims(scale, inputs)).astype(weight.dtype)
