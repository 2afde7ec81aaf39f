import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import mesh_of

from gptjax.models.attention import (
    attention,
    blocked_attention,
    cached_attention,
    masked_attention,
    splash_attention,
)
from gptjax.parallel.sharding import spec

B, H = 2, 8


def inputs(length, heads, kv_heads, head_dim=H):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, length, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    return q, k, v, (rng.random((B, length)) < 0.2).cumsum(-1).astype(np.int32)


def mask_of(segments_BT, window=0):
    length = segments_BT.shape[1]
    seen = np.tri(length, dtype=bool)
    if window:
        seen &= ~np.tri(length, k=-window, dtype=bool)
    return seen & (segments_BT[:, :, None] == segments_BT[:, None, :])


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 13, 16])
def test_masked_attention_is_softmax_attention(length, heads, kv_heads):
    q, k, v, segments = (np.asarray(array, np.float64) for array in inputs(length, heads, kv_heads))
    k, v = (np.repeat(array, heads // kv_heads, axis=2) for array in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / H**0.5
    p = np.exp(np.where(mask_of(segments)[:, None], scores, -np.inf))
    expected = np.einsum("bnts,bsnh->btnh", p / p.sum(-1, keepdims=True), v)
    q, k, v, segments = inputs(length, heads, kv_heads)
    np.testing.assert_allclose(jax.jit(masked_attention)(q, k, v, mask_of(segments)), expected, atol=1e-5)


def same_as_masked(attend, length, heads, kv_heads, window, head_dim=H):
    """Asserts that values and gradients of `attend` are those of the reference."""
    q, k, v, segments = inputs(length, heads, kv_heads, head_dim)
    direction = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def reference(q, k, v):
        return masked_attention(q, k, v, mask_of(segments, window))

    def both(attend):
        gradients = jax.value_and_grad(lambda *qkv: (attend(*qkv) * direction).sum(), (0, 1, 2))
        return jax.jit(lambda q, k, v: (attend(q, k, v), gradients(q, k, v)[1]))(q, k, v)

    for found, expected in zip(jax.tree.leaves(both(attend(segments))), jax.tree.leaves(both(reference)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("length, window", [(13, 0), (16, 0), (150, 0), (150, 1), (150, 20), (150, 100), (16, 99)])
def test_blocks_are_the_whole(length, window, heads, kv_heads):
    def blocked(segments):
        return lambda q, k, v: blocked_attention(q, k, v, segments, window)

    same_as_masked(blocked, length, heads, kv_heads, window)


@pytest.mark.parametrize("length, window, kv_heads, head_dim", [
    (256, 0, 4, 64), (256, 0, 2, 128), (384, 0, 1, 64), (256, 100, 2, 64), (256, 1, 4, 64), (384, 200, 2, 128),
])  # fmt: skip
def test_the_tpu_kernel_is_the_whole(length, window, kv_heads, head_dim):
    """By the kernel's own program, interpreted; that it compiles for a TPU, test_pod_configs.py shows."""

    def splash(segments):
        return lambda q, k, v: splash_attention(q, k, v, segments, window, interpret=True)

    same_as_masked(splash, length, 4, kv_heads, window, head_dim)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_cached_attention_is_the_full_one(shape, window):
    """Of a row at position 5 and one at 2, whatever is in the slots from there on; the new keys and values stay."""
    mesh = mesh_of(*shape)
    q, k, v, _ = inputs(8, 4, 2)
    positions, rows = np.array([5, 2]), np.arange(2)
    with jax.set_mesh(mesh):

        def put(array, *names):
            return jax.device_put(array, jax.NamedSharding(mesh, spec(*names)))

        heads = "act_batch", "act_seq", "act_heads"
        full = jax.jit(attention, static_argnames="window")(
            *(put(array, *heads) for array in (q, k, v)), put(np.zeros((2, 8), np.int32), "act_batch"), window=window
        )
        full_cache = [np.swapaxes(array, 1, 2) for array in (k, v)]
        later = np.arange(8) >= positions[:, None]
        cache = [np.where(later[:, None, :, None], 99, array).astype(np.float32) for array in full_cache]
        new, cache = jax.jit(cached_attention, static_argnames="window")(
            *(put(array[rows, positions][:, None], *heads) for array in (q, k, v)),
            tuple(put(array, "act_batch", "act_heads") for array in cache),
            put(positions, "act_batch"),
            window=window,
        )
    np.testing.assert_allclose(new[:, 0], np.asarray(full)[rows, positions], atol=1e-6)
    later = np.arange(8) > positions[:, None]
    for array, filled in zip(cache, full_cache, strict=True):
        np.testing.assert_array_equal(array, np.where(later[:, None, :, None], 99, filled))


def test_bfloat16_comes_out_as_it_went_in():
    q, k, v, segments = inputs(8, 4, 2)
    attend = jax.jit(functools.partial(blocked_attention, window=0))
    half = attend(*(array.astype(jnp.bfloat16) for array in (q, k, v)), segments)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), attend(q, k, v, segments), atol=0.05)
