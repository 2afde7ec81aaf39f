"""Looks inside a model: where weights live, where heads look, the cost of each token, and gradients."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data.batch import Batch
from gptjax.models.attention import masked_attention
from gptjax.models.interface import Inputs, LanguageModel
from gptjax.models.loss import LossConfig, next_token_scores
from gptjax.models.objective import batch_sums
from gptjax.models.transformer import Transformer
from gptjax.parallel import batches, trees
from gptjax.parallel.sharding import spec
from gptjax.parallel.trees import is_param


class Weight(NamedTuple):
    """A weight of a model. A weight of a block has the layers as its leading axis."""

    name: str  # as in a checkpoint: blocks.query
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical name of each dimension: sharding.LOGICAL_AXES
    cut: tuple[tuple[str, ...], ...]  # mesh axes that cut each dimension
    parts: dict[int, tuple[slice, ...]]  # the part that each device holds, by device id

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def weights(model: LanguageModel) -> list[Weight]:
    """All weights of a model, ordered by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_param)
    found = []
    for path, param in leaves:
        array = param[...]
        held = array.sharding.devices_indices_map(array.shape)
        parts = {
            device.id: tuple(slice(*of.indices(size)) for of, size in zip(index, array.shape, strict=True))
            for device, index in held.items()
        }
        axes_of = (*array.sharding.spec, *[None] * array.ndim)[: array.ndim]
        cut = tuple((axes,) if isinstance(axes, str) else axes or () for axes in axes_of)
        found.append(Weight(_name(path), array.shape, param.axes, cut, parts))
    return found


def attention_maps(model: Transformer, tokens: Sequence[int]) -> np.ndarray:
    """The attention weights of each head for these tokens read as one document: float32 [layer, head, T, S].

    Row t has the weights that position t gives to the positions s ≤ t, which add up to 1. Only transformers have them.
    """
    return jax.device_get(_attention_maps(model.for_decoding(), _rows(tokens))[:, 0])


@jax.jit
def _attention_maps(model: Transformer, tokens_BT):
    """[L, B, N, T, S], whole on every device."""
    c = model.config
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    back_TS = jnp.arange(T)[:, None] - jnp.arange(T)
    looks_TS = (back_TS >= 0) & (back_TS < (c.sliding_window or T))
    (batch,), (kv_heads,) = spec("act_batch"), spec("act_kv_heads")
    positions_BT = jax.sharding.reshard(positions_BT, jax.P(batch, None))
    mask_BTS = jax.sharding.reshard(jnp.broadcast_to(looks_TS, (B, T, T)), jax.P(batch, None, None))
    q_spec, kv_spec = (spec("act_batch", "act_seq", heads, "act_head_dim") for heads in ("act_heads", "act_kv_heads"))
    masked = jax.shard_map(
        masked_attention,
        in_specs=(q_spec, kv_spec, kv_spec, spec("act_batch", "act_seq", "act_seq")),
        out_specs=q_spec,
    )
    # The attention of unit vectors, one for each position, equals the weights of attention.
    units = jnp.broadcast_to(jnp.eye(T, dtype=jnp.float32)[:, None], (B, T, c.num_kv_heads, T))
    units, maps = jax.sharding.reshard(units, jax.P(batch, None, kv_heads, None)), []

    def attend(q_BTNH, k_BTKH, v_BTKH):
        maps.append(jnp.swapaxes(masked(q_BTNH, k_BTKH, units, mask_BTS), 1, 2))
        return masked(q_BTNH, k_BTKH, v_BTKH, mask_BTS)

    model.through(tokens_BT, positions_BT, [attend] * c.num_layers)
    return jax.sharding.reshard(jnp.stack(maps), jax.P())


def surprise(model: LanguageModel, tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """The cost in bits of each token but the first, given the tokens before it (Shannon 1948): float32 [T - 1]."""
    # The stream is cut along the sequence; padding comes last, where no token of the text sees it.
    padding = [0] * (-len(tokens) % jax.sharding.get_mesh().shape["tensor"])
    return jax.device_get(_surprise(model, _rows([*tokens, *padding]), vocab_size=vocab_size)[0, : len(tokens) - 1])


@functools.partial(jax.jit, static_argnames="vocab_size")
def _surprise(model: LanguageModel, tokens_BT, *, vocab_size: int):
    """[B, T], whole on every device; the last position has no target."""
    positions_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1, out_sharding=spec("act_batch", "act_seq"))
    hidden = model.hidden(Inputs(tokens_BT, positions_BT, jnp.zeros_like(tokens_BT)), None)
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    nats_BT, _ = next_token_scores(hidden.x_BTD, model.output(), targets_BT, vocab_size=vocab_size)
    return -jax.sharding.reshard(nats_BT, jax.P()) / math.log(2)


def gradient_norms(model: LanguageModel, batch: Batch, *, vocab_size: int, loss: LossConfig) -> dict[str, np.ndarray]:
    """The Euclidean norm of the gradient of each weight: float32 [L] for a stacked weight, else [1].

    Args:
      batch: arrays of [rows, seq_len] on the mesh; the loss is their mean over tokens, without dropout.
    """
    gradient = _gradient(model, batch, vocab_size=vocab_size, loss=loss)
    leaves, _ = jax.tree_util.tree_flatten_with_path(gradient, is_leaf=is_param)
    norms = {}
    for path, param in leaves:
        array = np.asarray(jax.device_get(param[...]), np.float64)
        rows = array.reshape(len(array) if param.stacked else 1, -1)
        norms[_name(path)] = np.sqrt(np.square(rows).sum(-1)).astype(np.float32)
    return norms


@functools.partial(jax.jit, static_argnames=("vocab_size", "loss"))
def _gradient(model: LanguageModel, batch: Batch, *, vocab_size: int, loss: LossConfig):
    def mean(model):
        return batch_sums(model, batch, None, vocab_size=vocab_size, loss=loss).objective / batch.weights.sum()

    return jax.grad(mean)(model)


def _rows(tokens: Sequence[int]) -> jax.Array:
    """[B, T]: the tokens, repeated for each part of the mesh that has rows of its own."""
    mesh = jax.sharding.get_mesh()
    tokens_BT = np.tile(np.array(tokens, np.int32), (batches.row_shards(mesh), 1))
    return trees.put(tokens_BT, jax.NamedSharding(mesh, spec("act_batch", "act_seq")))


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
