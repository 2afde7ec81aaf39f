"""Causal self-attention within documents: the only file that looks at the platform.

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N / K, H head dimension.
"""

import jax
import jax.numpy as jnp

from gptjax.sharding import spec

# Smaller blocks skip more of the upper triangle and stay in the cache; below 64 rows, and with more than 8 programs to
# compile, that no longer pays (benchmarks/NOTES.md, Attention).
MIN_BLOCK, MAX_BLOCKS = 64, 8


def attention(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """Softmax attention in which position t sees positions s ≤ t of its own segment (Vaswani et al. 2017, 3.2.1).

    Args:
      q_BTNH: queries, unscaled; k_BTKH, v_BTKH: keys and values, with K dividing N (grouped-query attention, Ainslie
        et al. 2023). segments_BT: int32 document numbers.

    Returns:
      [B, T, N, H] in the dtype of the queries. Softmax is in float32.
    """
    q_spec = spec("act_batch", "act_seq", "act_heads", "act_head_dim")
    kv_spec = spec("act_batch", "act_seq", "act_kv_heads", "act_head_dim")
    platform = jax.sharding.get_abstract_mesh().abstract_device.platform
    local = cudnn_attention if platform in ("gpu", "cuda") and q_BTNH.dtype != jnp.float32 else blocked_attention
    return jax.shard_map(local, in_specs=(q_spec, kv_spec, kv_spec, spec("act_batch", "act_seq")), out_specs=q_spec)(
        q_BTNH, k_BTKH, v_BTKH, segments_BT
    )


def cached_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """Attention of T new positions over S cached ones, under an explicit mask."""
    q_spec = spec("act_batch", "act_seq", "act_heads", "act_head_dim")
    kv_spec = spec("act_batch", "act_seq", "act_kv_heads", "act_head_dim")
    return jax.shard_map(
        masked_attention,
        in_specs=(q_spec, kv_spec, kv_spec, spec("act_batch", "act_seq", "act_seq")),
        out_specs=q_spec,
    )(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def cudnn_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """cuDNN's fused flash attention; needs a half-precision dtype and an NVIDIA card of compute capability 8.0."""
    same_document = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=same_document, is_causal=True, implementation="cudnn"
    )


def blocked_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """Plain XLA, in blocks of queries that each meet only the keys up to their own last position."""
    length = q_BTNH.shape[1]
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        position_TS = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        mask_BTS = position_TS & (segments_BT[:, start:end, None] == segments_BT[:, None, :end])
        outputs.append(masked_attention(q_BTNH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end], mask_BTS))
    return jnp.concatenate(outputs, axis=1)


def masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """Softmax attention under an explicit mask (True where a query may look); the reference of all the others."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)
