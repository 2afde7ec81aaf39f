"""Low-rank adaptation (Hu et al. 2021, section 4.1).

An existing model stays as it is. Each matrix W of its blocks becomes W + alpha / rank · A · B. Only the narrow matrices
A and B are trained; B starts as zeros. So summed gradients, moments and averages belong to A and B alone. Each step
adds the products anew, and so does loading a run.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.models.interface import LanguageModel
from gptjax.models.layers import Weights, declared
from gptjax.models.sections import LoraConfig
from gptjax.parallel.sharding import spec
from gptjax.parallel.trees import is_param


class Adapter(nnx.Module):
    """A and B of a stacked matrix W, whose inputs stand before its outputs: [L, inputs, rank] and [L, rank, outputs].

    Both declare no inputs, so Muon leaves them to Adam.
    """

    def __init__(self, matrix: nnx.Param, rank: int, rngs: nnx.Rngs):
        first = len(matrix.stacked)
        last = first + len(matrix.inputs)
        (names, sizes), w = (matrix.axes, matrix.shape), Weights(rngs, "float32")
        std = math.prod(sizes[first:last]) ** -0.5
        self.a = w.matrix((*sizes[:last], rank), " ".join((*names[:last], "rank")), "", std)
        axes = (*names[:first], "rank", *names[last:])
        self.b = declared(jnp.zeros((*sizes[:first], rank, *sizes[last:]), out_sharding=spec(*axes)), axes, decay=True)

    def product(self) -> jax.Array:
        """A · B, with the shape of W."""
        stacked = "LMN"[: len(self.a.stacked)]
        inputs, outputs = ("abcd"[: self.a.ndim - len(stacked) - 1], "wxyz"[: self.b.ndim - len(stacked) - 1])
        equation = f"{stacked}{inputs}r,{stacked}r{outputs}->{stacked}{inputs}{outputs}"
        return jnp.einsum(equation, self.a[...], self.b[...])


class Adapters(nnx.Module):
    """An adapter for each stacked matrix of a model, by `name_of` the matrix."""

    def __init__(self, model: LanguageModel, config: LoraConfig, seed: int):
        rngs = nnx.Rngs(seed)
        self.config = config
        leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_param)
        matrices = {name_of(path): param for path, param in leaves if is_adapted(param)}
        for name, matrix in sorted(matrices.items()):
            setattr(self, name, Adapter(matrix, config.rank, rngs))


def is_adapted(param: nnx.Param) -> bool:
    """Whether a weight is a stacked matrix."""
    return bool(param.stacked and param.inputs)


def name_of(path) -> str:
    """The name of an adapter: `query` for the weight `blocks.query`."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removeprefix("blocks.").replace(".", "_")


@jax.jit
def merged(base: LanguageModel, adapters: Adapters) -> LanguageModel:
    """The whole model, whose adapted matrices are in float32."""
    scale = adapters.config.alpha / adapters.config.rank

    def added(path, param: nnx.Param) -> nnx.Param:
        if not is_adapted(param):
            return param
        return param.replace(param[...].astype(jnp.float32) + scale * getattr(adapters, name_of(path)).product())

    return jax.tree_util.tree_map_with_path(added, base, is_leaf=is_param)
