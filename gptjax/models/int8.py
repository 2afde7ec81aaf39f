"""Weights as int8: the matrices of the blocks and both embeddings, rounded to 255 steps with a scale for each output.

Symmetric, the largest of an output's weights at ±127 (Jacob et al. 2018, section 2.1, without the zero point; Dettmers
et al. 2022, section 2.1, by rows and columns). Norms, biases and learned positions stay as they are.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.models.layers import Int8
from gptjax.models.transformer import Transformer

# The dimensions of a weight that a product sums over, counted from its end, so that layers may be stacked before.
INPUTS = {
    "query": (-3,), "key": (-3,), "value": (-3,), "output": (-3, -2), "gate": (-2,), "up": (-2,), "down": (-2,),
    "embedding": (-1,), "head": (-1,),
}  # fmt: skip


def quantized(model: Transformer) -> Transformer:
    """The `unstacked` model with int8 weights, which `prefill` and `decode` take; the given one stays as it is."""
    model = jax.tree.map(lambda leaf: leaf, model.unstacked())
    for module, name in places(model):
        weight = getattr(module, name)
        kept = [place for place in range(-weight.ndim, 0) if place not in INPUTS[name]]
        outputs = tuple(weight.axes[place] for place in kept)
        values, scale = steps(weight[...], INPUTS[name])
        setattr(module, name, Int8(nnx.Param(values, axes=weight.axes), nnx.Param(scale, axes=outputs)))
    return model


def rounded(model: Transformer) -> Transformer:
    """The model with each weight as int8 would have it, in its own dtype: what int8 costs in loss."""
    model = jax.tree.map(lambda leaf: leaf, model)  # modules of its own, with the same arrays
    for module, name in places(model):
        weight = getattr(module, name)
        weight[...] = restored(weight[...], INPUTS[name])
    return model


def places(model: Transformer) -> list[tuple[nnx.Module, str]]:
    """(module, attribute) of each weight that there is of those in INPUTS."""
    blocks = model.blocks if isinstance(model.blocks, nnx.List) else [model.blocks]
    modules = [*blocks, model]
    return [(module, name) for module in modules for name in INPUTS if getattr(module, name, None) is not None]


@functools.partial(jax.jit, static_argnums=1)
def steps(weight: jax.Array, inputs: tuple[int, ...]):
    """(int8 of the weight's shape, float32 scale of the shape of its outputs)."""
    weight = weight.astype(jnp.float32)
    largest = jnp.abs(weight).max(inputs, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(weight / scale).astype(jnp.int8), scale.squeeze(inputs)


@functools.partial(jax.jit, static_argnums=1)
def restored(weight: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
    values, scale = steps(weight, inputs)
    return (values * jnp.expand_dims(scale, inputs)).astype(weight.dtype)
