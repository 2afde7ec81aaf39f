"""Low-rank adaptation (Hu et al. 2021, section 4.1).

A model that there is stays as it is, and of each matrix W of its blocks, attention's and the MLP's, only what is added is
trained: W + alpha / rank · A · B, narrow matrices of which B begins as zeros. So gradients that are summed, moments and
averages are those of A and B alone. A step computes with the sums, which it makes anew; so does whoever loads a run.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.models.layers import weight
from gptjax.models.sections import LoraConfig
from gptjax.models.transformer import Block, Transformer
from gptjax.parallel.sharding import spec


class Adapter(nnx.Module):
    """A and B of a matrix of all layers: its inputs and outputs are those of W, [L, …, rank] and [L, rank, …]."""

    def __init__(self, matrix: nnx.Param, rank: int, rngs: nnx.Rngs):
        layers, *axes = matrix.axes
        num_layers, *sizes = matrix.shape
        inputs = 1 if axes[0] == "embed" else len(axes) - 1  # as `embed` is one of the sides
        shape, names = (num_layers, *sizes[:inputs], rank), (layers, *axes[:inputs], "rank")
        self.a = weight(rngs, "float32", shape, " ".join(names), math.prod(sizes[:inputs]) ** -0.5)
        shape, names = (num_layers, rank, *sizes[inputs:]), (layers, "rank", *axes[inputs:])
        self.b = nnx.Param(jnp.zeros(shape, out_sharding=spec(*names)), axes=names, decay=True, widened=1.0)

    def product(self) -> jax.Array:
        """A · B, of the shape of W."""
        inputs, outputs = "abcd"[: self.a.ndim - 2], "wxyz"[: self.b.ndim - 2]
        return jnp.einsum(f"L{inputs}r,Lr{outputs}->L{inputs}{outputs}", self.a[...], self.b[...])


class Adapters(nnx.Module):
    """An adapter for each matrix of a model's blocks, by its name."""

    def __init__(self, model: Transformer, config: LoraConfig, seed: int):
        rngs = nnx.Rngs(seed)
        self.config = config
        for name, matrix in matrices(model.blocks).items():
            setattr(self, name, Adapter(matrix, config.rank, rngs))


def matrices(block: Block) -> dict[str, nnx.Param]:
    return {name: param for name, param in sorted(vars(block).items()) if isinstance(param, nnx.Param) and param.decay}


@jax.jit
def merged(base: Transformer, adapters: Adapters) -> Transformer:
    """The whole model, whose matrices are in float32."""
    whole = jax.tree.map(lambda leaf: leaf, base)
    for name, matrix in matrices(base.blocks).items():
        scale = adapters.config.alpha / adapters.config.rank
        added = scale * getattr(adapters, name).product()
        setattr(whole.blocks, name, matrix.replace(matrix[...].astype(jnp.float32) + added))
    return whole
