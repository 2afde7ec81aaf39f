"""Looks inside a model: its weights and where they live, where its heads look, what surprises it, its gradients."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data.batch import Batch
from gptjax.models.attention import masked_attention
from gptjax.models.loss import LossConfig
from gptjax.models.objective import batch_sums
from gptjax.models.transformer import Transformer
from gptjax.parallel import batches, trees
from gptjax.parallel.sharding import spec
from gptjax.parallel.trees import is_param


class Weight(NamedTuple):
    """One weight of a model. Those of the blocks carry the layers as their leading axis."""

    name: str  # as in a checkpoint: blocks.query
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # what each dimension is, by its name in `sharding.LOGICAL_AXES`
    cut: tuple[tuple[str, ...], ...]  # along which mesh axes each dimension is cut
    parts: dict[int, tuple[slice, ...]]  # what each device holds, by its id

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def weights(model: Transformer) -> list[Weight]:
    """All weights of a model, in the order of their names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_param)
    found = []
    for path, param in leaves:
        array = param[...]
        held = array.sharding.devices_indices_map(array.shape)
        parts = {
            device.id: tuple(slice(*of.indices(size)) for of, size in zip(index, array.shape))
            for device, index in held.items()
        }
        axes_of = (*array.sharding.spec, *[None] * array.ndim)[: array.ndim]
        cut = tuple((axes,) if isinstance(axes, str) else axes or () for axes in axes_of)
        found.append(Weight(_name(path), array.shape, param.axes, cut, parts))
    return found


def attention_maps(model: Transformer, tokens: Sequence[int]) -> np.ndarray:
    """Where each head looks when it reads these tokens as one document: float32 [layer, head, T, S].

    Row t has the weights that position t gives to the positions s ≤ t; they add up to 1.
    """
    return jax.device_get(_attention_maps(model.unstacked(), _rows(tokens))[:, 0])


@jax.jit
def _attention_maps(model: Transformer, tokens_BT):
    """[L, B, N, T, S], whole on every device."""
    c = model.config
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    back_TS = jnp.arange(T)[:, None] - jnp.arange(T)
    looks_TS = (back_TS >= 0) & (back_TS < (c.sliding_window or T))
    batch = spec("act_batch")[0]
    put = lambda array, *rest: jax.sharding.reshard(array, jax.P(batch, *rest))
    positions_BT, mask_BTS = put(positions_BT, None), put(jnp.broadcast_to(looks_TS, (B, T, T)), None, None)
    q_spec, kv_spec = (spec("act_batch", "act_seq", heads, "act_head_dim") for heads in ("act_heads", "act_kv_heads"))
    masked = jax.shard_map(
        masked_attention,
        in_specs=(q_spec, kv_spec, kv_spec, spec("act_batch", "act_seq", "act_seq")),
        out_specs=q_spec,
    )
    # The attention of unit vectors, one for each position, is its weights.
    units = jnp.broadcast_to(jnp.eye(T, dtype=jnp.float32)[:, None], (B, T, c.num_kv_heads, T))
    units, maps = put(units, None, spec("act_kv_heads")[0], None), []

    def attend(q_BTNH, k_BTKH, v_BTKH):
        maps.append(jnp.swapaxes(masked(q_BTNH, k_BTKH, units, mask_BTS), 1, 2))
        return masked(q_BTNH, k_BTKH, v_BTKH, mask_BTS)

    model.through(tokens_BT, positions_BT, [attend] * c.num_layers)
    return jax.sharding.reshard(jnp.stack(maps), jax.P())


def surprise(model: Transformer, tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """What each token but the first costs, given those before it, in bits (Shannon 1948): float32 [T - 1]."""
    return jax.device_get(_surprise(model.unstacked(), _rows(tokens), vocab_size=vocab_size)[:, 0])


@functools.partial(jax.jit, static_argnames="vocab_size")
def _surprise(model: Transformer, tokens_BT, *, vocab_size: int):
    """[T - 1, B], whole on every device."""
    x_BTD, _ = model.prefill(tokens_BT)
    logits_TBV = jax.lax.map(model.logits, jnp.swapaxes(x_BTD, 0, 1))
    nats_TBV = jax.nn.log_softmax(jax.sharding.reshard(logits_TBV, jax.P())[:-1, :, :vocab_size])
    targets_TB = jax.sharding.reshard(tokens_BT, jax.P()).T[1:]
    return -jnp.take_along_axis(nats_TBV, targets_TB[..., None], -1)[..., 0] / math.log(2)


def gradient_norms(model: Transformer, batch: Batch, *, vocab_size: int, loss: LossConfig) -> dict[str, np.ndarray]:
    """The Euclidean norm of the loss's gradient by each weight: float32 [L] for one of the blocks, else [1].

    Args:
      batch: arrays of [rows, seq_len] on the mesh; the loss is their mean over tokens, without dropout.
    """
    gradient = _gradient(model, batch, vocab_size=vocab_size, loss=loss)
    leaves, _ = jax.tree_util.tree_flatten_with_path(gradient, is_leaf=is_param)
    norms = {}
    for path, param in leaves:
        array = np.asarray(jax.device_get(param[...]), np.float64)
        rows = array.reshape(len(array) if param.axes[0] == "layers" else 1, -1)
        norms[_name(path)] = np.sqrt(np.square(rows).sum(-1)).astype(np.float32)
    return norms


@functools.partial(jax.jit, static_argnames=("vocab_size", "loss"))
def _gradient(model: Transformer, batch: Batch, *, vocab_size: int, loss: LossConfig):
    def mean(model):
        return batch_sums(model, batch, None, vocab_size=vocab_size, loss=loss).objective / batch.weights.sum()

    return jax.grad(mean)(model)


def _rows(tokens: Sequence[int]) -> jax.Array:
    """[B, T]: the tokens once for each part of the mesh that has rows of its own."""
    mesh = jax.sharding.get_mesh()
    tokens_BT = np.tile(np.array(tokens, np.int32), (batches.row_shards(mesh), 1))
    return trees.put(tokens_BT, jax.NamedSharding(mesh, spec("act_batch", "act_seq")))


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
