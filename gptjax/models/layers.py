"""The parts of a block: weights, norms, rotary positions, dropout. Letters as in transformer.py."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.parallel.collectives import gather, index
from gptjax.parallel.sharding import spec

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
}

# The axes along which blocks and experts are stacked: each index holds a matrix of its own.
STACKED = ("layers", "experts")

# A weight declares what generic code needs to know:
#   axes     the logical name of each dimension (parallel/sharding.py)
#   inputs   the names of the axes that a product with it sums over; empty for all but matrices
#   stacked  the names of its stacked axes
#   decay    whether weight decay pulls it to zero
#   widened  how many times more inputs a matrix has than at the base width; the optimizer divides its update by that


def declared(
    array: jax.Array, axes: tuple[str, ...], inputs: tuple[str, ...] = (), decay: bool = False, widened: float = 1.0
) -> nnx.Param:
    """A parameter with its declarations."""
    stacked = tuple(name for name in axes if name in STACKED)
    return nnx.Param(array, axes=axes, inputs=inputs, stacked=stacked, decay=decay, widened=widened)


class Weights(NamedTuple):
    """Makes the weights of a model: one line a weight."""

    rngs: nnx.Rngs
    dtype: str
    widened: float = 1.0

    def matrix(self, shape: tuple[int, ...], axes: str, inputs: str, std: float) -> nnx.Param:
        """Draws a weight from a normal distribution of standard deviation `std`."""
        names = tuple(axes.split())
        draw = std * jax.random.normal(self.rngs.params(), shape, jnp.float32, out_sharding=spec(*names))
        return declared(draw.astype(self.dtype), names, tuple(inputs.split()), decay=True, widened=self.widened)

    def ones(self, shape: tuple[int, ...], axes: str) -> nnx.Param:
        names = tuple(axes.split())
        return declared(jnp.ones(shape, self.dtype, out_sharding=spec(*names)), names)

    def zeros(self, shape: tuple[int, ...], axes: str) -> nnx.Param:
        names = tuple(axes.split())
        return declared(jnp.zeros(shape, self.dtype, out_sharding=spec(*names)), names)


class Int8(nnx.Module):
    """A matrix as int8, with a float32 scale for each output; int8.py makes it."""

    def __init__(self, values: nnx.Param, scale: nnx.Param):
        self.values, self.scale = values, scale


def product(equation: str, x, matrix: nnx.Param | Int8, dtype: jax.typing.DTypeLike | None = None):
    """Inside `manual`: x times a matrix in the compute dtype of x; the scales of an `Int8` multiply the result.

    The outputs of the matrix are the last dimensions of the result. dtype: of the result; None takes that of x.
    """
    dtype = dtype or x.dtype
    if isinstance(matrix, Int8):
        y = contract(equation, dtype, x, gather(matrix.values, jnp.int8).astype(x.dtype))
        return y * gather(matrix.scale, dtype)
    return contract(equation, dtype, x, gather(matrix, x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def contract(equation: str, dtype: jax.typing.DTypeLike, x, w):
    """`einsum` of activations x and a matrix w, which share no dimension that the result keeps.

    The gradient of w contracts x and dy over rows, for which one of the two is transposed in memory. Here it is the
    smaller one. JAX's own rule leaves it to XLA, which on CPUs transposes the wide side of an MLP, fused with the
    gradient of its activation: the whole step takes 1.16 and 1.12 times as long (benchmarks/NOTES.md, The spine beside
    plain JAX).
    """
    return jnp.einsum(equation, x, w, preferred_element_type=dtype)


def contract_backward(equation, dtype, operands, dy):
    x, w = operands
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    dx = jnp.einsum(f"{result},{right}->{left}", dy, w, preferred_element_type=x.dtype)
    (first, a), (second, b) = sorted([(left, x), (result, dy)], key=lambda side: side[1].size)
    rows = [letter for letter in left if letter in result]
    over = tuple([names.index(letter) for letter in rows] for names in (first, second))
    dw = jax.lax.dot_general(a, b, (over, ((), ())), preferred_element_type=w.dtype)
    made = [letter for letter in first + second if letter not in rows]
    return dx, dw.transpose([made.index(letter) for letter in right])


contract.defvjp(lambda equation, dtype, x, w: (contract(equation, dtype, x, w), (x, w)), contract_backward)


def looked_up_in(table: nnx.Param | Int8, ids_BT, dtype: str):
    """Inside `manual`: `rows` of a table in the compute dtype, still partial over `tensor`."""
    if isinstance(table, Int8):
        values_BTD = rows(gather(table.values, jnp.int8), ids_BT).astype(dtype)
        return values_BTD * rows(gather(table.scale, dtype)[:, None], ids_BT)
    return rows(gather(table, dtype), ids_BT)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis, in float32."""

    def __init__(self, kind: str, eps: float, w: Weights, shape: tuple[int, ...], axes: str, with_bias: bool):
        self.kind, self.eps = kind, eps
        self.gain = w.ones(shape, axes)
        self.bias = w.zeros(shape, axes) if kind == "layernorm" and with_bias else None

    def __call__(self, x):
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * self.gain[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


def rows(table_VD, ids_BT):
    """Inside `manual`: the rows with these ids of a table cut over `tensor`, 0 where another device has them."""
    ids_BT = ids_BT - index("tensor") * table_VD.shape[0]
    here_BT = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
    return jnp.where(here_BT[..., None], looked_up(table_VD, jnp.where(here_BT, ids_BT, 0)), 0)


@jax.custom_vjp
def looked_up(table_VD, ids_BT):
    """table_VD[ids_BT]. The gradient is summed in float32: in bfloat16 a frequent id's sum would stop growing."""
    return table_VD[ids_BT]


def looked_up_backward(residuals, dx_BTD):
    table_VD, ids_BT = residuals
    summed_VD = jnp.zeros_like(table_VD, jnp.float32).at[ids_BT].add(dx_BTD.astype(jnp.float32))
    return summed_VD.astype(table_VD.dtype), None


looked_up.defvjp(lambda table_VD, ids_BT: (table_VD[ids_BT], (table_VD, ids_BT)), looked_up_backward)


def soft_capped(logits, cap: float):
    """cap · tanh(logits / cap) (Gemma 2, 2024, section 2); a cap of 0 changes nothing."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def rope_frequencies(head_dim: int, theta: float):
    """Radians that each pair turns per position (Su et al. 2021, section 3.4.2): float32 [H / 2]."""
    return theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def stretched(frequencies, factor: float, low: float, high: float, length: int):
    """Frequencies as Llama 3.1 lowers them for a longer context (`apply_scaling` in the code that Meta published).

    A pair that turns at least `high` times within the original `length` stays. A pair that turns at most `low` times
    there is slowed down `factor` times. Pairs in between are blended, linearly in the number of turns.
    """
    turns = length * frequencies / (2 * jnp.pi)
    stays = jnp.clip((turns - low) / (high - low), 0, 1)
    return stays * frequencies + (1 - stays) * frequencies / factor


def rope(positions_BT, frequencies):
    """Rotary embedding: cosines and sines, float32 [B, T, 1, H / 2]."""
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, rotation):
    """Turns the pairs (i, i + H / 2), Llama's order as published with its weights."""
    cos, sin = rotation
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x_BTNH.dtype)


def dropout(x, rate: float, key, site: int):
    """Zeroes a share `rate` of x and scales the rest up (Srivastava et al. 2014).

    The mask is drawn for the global array, so it is the same on any mesh.

    Args:
      key: a key, or None for no dropout.
      site: a number that tells places with one key apart.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(
        jax.random.fold_in(key, site), 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding.spec
    )
    return jnp.where(keep, x / (1 - rate), 0)
