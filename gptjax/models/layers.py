"""What blocks are made of: weights, norms, rotary positions, dropout. Letters as in transformer.py."""

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.sharding import index, spec

# One line a weight: shape, logical axes, initial scale. `decay` says whether weight decay pulls it to zero.


def weight(rngs: nnx.Rngs, dtype: str, shape: tuple[int, ...], axes: str, std: float) -> nnx.Param:
    names = tuple(axes.split())
    draw = std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec(*names))
    return nnx.Param(draw.astype(dtype), axes=names, decay=True)


def gain(dtype: str, shape: tuple[int, ...], axes: str) -> nnx.Param:
    names = tuple(axes.split())
    return nnx.Param(jnp.ones(shape, dtype, out_sharding=spec(*names)), axes=names, decay=False)


def bias(dtype: str, shape: tuple[int, ...], axes: str) -> nnx.Param:
    names = tuple(axes.split())
    return nnx.Param(jnp.zeros(shape, dtype, out_sharding=spec(*names)), axes=names, decay=False)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis, in float32."""

    def __init__(self, kind: str, dtype: str, shape: tuple[int, ...], axes: str, with_bias: bool):
        self.kind = kind
        self.gain = gain(dtype, shape, axes)
        self.bias = bias(dtype, shape, axes) if kind == "layernorm" and with_bias else None

    def __call__(self, x):
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5) * self.gain[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


def rows(table_VD, ids_BT):
    """Inside `manual`, of a table whose rows are cut over `tensor`: the rows with these ids, 0 where another has them."""
    ids_BT = ids_BT - index("tensor") * table_VD.shape[0]
    here_BT = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
    return jnp.where(here_BT[..., None], looked_up(table_VD, jnp.where(here_BT, ids_BT, 0)), 0)


@jax.custom_vjp
def looked_up(table_VD, ids_BT):
    """table_VD[ids_BT], whose gradient is summed in float32: in bfloat16 a frequent id's would stop growing."""
    return table_VD[ids_BT]


def looked_up_backward(residuals, dx_BTD):
    table_VD, ids_BT = residuals
    summed_VD = jnp.zeros_like(table_VD, jnp.float32).at[ids_BT].add(dx_BTD.astype(jnp.float32))
    return summed_VD.astype(table_VD.dtype), None


looked_up.defvjp(lambda table_VD, ids_BT: (table_VD[ids_BT], (table_VD, ids_BT)), looked_up_backward)


def soft_capped(logits, cap: float):
    """cap · tanh(logits / cap) (Gemma 2, 2024, section 2); a cap of 0 leaves them as they are."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def rope(positions_BT, head_dim: int, theta: float):
    """Rotary embedding (Su et al. 2021, section 3.4.2): cosines and sines, float32 [B, T, 1, H / 2]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, rotation):
    """Turns the pairs (i, i + H / 2), Llama's order as published with its weights."""
    cos, sin = rotation
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x_BTNH.dtype)


def dropout(x, rate: float, key, site: int):
    """Zeroes a `rate` of x and scales the rest up (Srivastava et al. 2014); `site` tells places with one key apart.

    The mask is drawn for the global array, so it is the same on any mesh.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(
        jax.random.fold_in(key, site), 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding.spec
    )
    return jnp.where(keep, x / (1 - rate), 0)
