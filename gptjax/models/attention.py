"""Causal self-attention within documents. Only this file looks at the platform.

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N / K, H head dimension.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.parallel.sharding import spec

# Smaller blocks skip more of the upper triangle and stay in the cache. Below 64 rows, or with more than 8 programs to
# compile, they no longer pay (benchmarks/NOTES.md, Attention).
MIN_BLOCK, MAX_BLOCKS = 64, 8
# Rows and columns of a tile in the TPU's kernel: multiples of the 128 lanes, as large as the fast memory takes well.
TILES = (512, 256, 128)


def attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, window: int):
    """Softmax attention in which position t sees positions s ≤ t of its own segment (Vaswani et al. 2017, 3.2.1).

    Args:
      q_BTNH: queries, unscaled.
      k_BTKH: keys, with K dividing N (grouped-query attention, Ainslie et al. 2023).
      v_BTKH: values.
      segments_BT: int32 document numbers.
      window: positions that a query sees, the last one being the query's own (Beltagy et al. 2020); 0 for all.

    Returns:
      [B, T, N, H] in the dtype of the queries. Softmax is in float32.
    """
    q_spec = spec("act_batch", "act_seq", "act_heads", "act_head_dim")
    kv_spec = spec("act_batch", "act_seq", "act_kv_heads", "act_head_dim")
    platform = jax.sharding.get_abstract_mesh().abstract_device.platform
    local = blocked_attention
    if platform == "tpu" and q_BTNH.shape[1] % TILES[-1] == 0:
        local = splash_attention
    elif platform in ("gpu", "cuda") and fits_cudnn(q_BTNH):
        local = cudnn_attention
    # Kernels don't declare over which axes their results vary. Every float that enters is cut over all of these axes,
    # so no gradient is left to be summed.
    a_BTNH = jax.shard_map(
        functools.partial(local, window=window),
        in_specs=(q_spec, kv_spec, kv_spec, spec("act_batch", "act_seq")),
        out_specs=q_spec,
        check_vma=local is blocked_attention,
    )(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    # Splash names its results itself; naming this transposed copy too would save both.
    return a_BTNH if local is splash_attention else checkpoint_name(a_BTNH, "context")


def cached_attention(q_BTNH, k_BTKH, v_BTKH, cache, positions_B, window: int):
    """Attention of one new position a row, T = 1, over the row's cached positions and the new position.

    Args:
      q_BTNH: queries, unscaled; k_BTKH and v_BTKH: keys and values of the new position.
      cache: keys and values, each [B, K, S, H], so that those of a head lie together.
      positions_B: the slot of the new position; all slots before are filled.
      window: as in `attention`.

    Returns:
      ([B, 1, N, H], the cache with the new position in it).
    """
    q_spec = spec("act_batch", "act_seq", "act_heads", "act_head_dim")
    kv_spec = spec("act_batch", "act_seq", "act_kv_heads", "act_head_dim")
    cache_spec = (spec("act_batch", "act_kv_heads", "act_seq", "act_head_dim"),) * 2
    return jax.shard_map(
        functools.partial(cached, window=window),
        in_specs=(q_spec, kv_spec, kv_spec, cache_spec, spec("act_batch")),
        out_specs=(q_spec, cache_spec),
    )(q_BTNH, k_BTKH, v_BTKH, cache, positions_B)


def cached(q_BTNH, k_BTKH, v_BTKH, cache, positions_B, window: int):
    """`cached_attention` for this device's rows and heads."""
    B, _, N, H = q_BTNH.shape
    K, S = cache[0].shape[1:3]
    rows = jnp.arange(B)
    keys_BKSH, values_BKSH = (
        array.at[rows, :, positions_B].set(new_BTKH[:, 0])
        for array, new_BTKH in zip(cache, (k_BTKH, v_BTKH), strict=True)
    )
    back_BS = positions_B[:, None] - jnp.arange(S)
    mask_BS = (back_BS >= 0) & (back_BS < window) if window else back_BS >= 0
    q_BKGH = q_BTNH.reshape(B, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, keys_BKSH, preferred_element_type=jnp.float32)
    scores_BKGS = jnp.where(mask_BS[:, None, None], scores_BKGS, jnp.finfo(jnp.float32).min)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(values_BKSH.dtype)
    a_BKGH = jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS, values_BKSH)
    return a_BKGH.reshape(B, 1, N, H), (keys_BKSH, values_BKSH)


def splash_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, window: int, interpret: bool = False):
    """The Pallas flash attention of TPUs (Dao 2023), which skips tiles that the mask empties.

    interpret: runs the kernel's program on any platform, slowly.
    """
    _, T, N, H = q_BTNH.shape
    # Here, because Pallas takes a tenth of a second to import, and only this function needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    mask = splash_attention_mask.CausalMask((T, T))
    if window:
        mask = splash_attention_mask.LocalMask((T, T), window_size=(window - 1, 0), offset=0)
    tile = next(size for size in TILES if T % size == 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
        ),
        residual_checkpoint_name="context",  # so that remat decides about the backward kernel's inputs
        interpret=interpret,
    )
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.swapaxes(x, 1, 2) for x in (q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype), k_BTKH, v_BTKH)
    )
    segments = splash_attention_kernel.SegmentIds(segments_BT, segments_BT)
    return jnp.swapaxes(jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments), 1, 2)


def fits_cudnn(q_BTNH) -> bool:
    """Whether cuDNN's kernel takes these shapes on every card since Ampere, with a mask and a gradient."""
    return (
        q_BTNH.dtype != jnp.float32 and q_BTNH.shape[3] % 8 == 0 and q_BTNH.shape[3] <= 128 and q_BTNH.shape[1] % 2 == 0
    )


def cudnn_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, window: int):
    """cuDNN's fused flash attention; needs a half-precision dtype and an NVIDIA card of compute capability 8.0."""
    same_document = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=same_document,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


def blocked_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, window: int):
    """Plain XLA in blocks of queries. A block meets only the keys from the start of its window to its last query."""
    length = q_BTNH.shape[1]
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        first = max(0, start - window + 1) if window else 0
        back_TS = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None, :]
        mask_TS = (back_TS >= 0) & (back_TS < window) if window else back_TS >= 0
        mask_BTS = mask_TS & (segments_BT[:, start:end, None] == segments_BT[:, None, first:end])
        outputs.append(masked_attention(q_BTNH[:, start:end], k_BTKH[:, first:end], v_BTKH[:, first:end], mask_BTS))
    return jnp.concatenate(outputs, axis=1)


def masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """Softmax attention under an explicit mask (True where a query may look): the reference for all the others.

    Values may have another width than queries and keys.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, -1)
