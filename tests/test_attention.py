import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import mesh_of

from gptjax.models.attention import attention, blocked_attention, cached_attention, masked_attention

B, H = 2, 8


def inputs(length, heads, kv_heads):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, length, n, H)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    return q, k, v, (rng.random((B, length)) < 0.2).cumsum(-1).astype(np.int32)


def mask_of(segments_BT):
    causal = np.tri(segments_BT.shape[1], dtype=bool)
    return causal & (segments_BT[:, :, None] == segments_BT[:, None, :])


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


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("length", [13, 16])
def test_blocks_are_the_whole(length, heads, kv_heads):
    q, k, v, segments = inputs(length, heads, kv_heads)
    direction = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    @jax.jit
    def both(q, k, v):
        blocked = jax.value_and_grad(lambda *qkv: (blocked_attention(*qkv, segments) * direction).sum(), (0, 1, 2))
        masked = jax.value_and_grad(
            lambda *qkv: (masked_attention(*qkv, mask_of(segments)) * direction).sum(), (0, 1, 2)
        )
        return blocked(q, k, v), masked(q, k, v)

    (value, gradients), (expected, expected_gradients) = both(q, k, v)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for gradient, reference in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, reference, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_cached_attention_is_the_full_one(shape):
    """Queries 5 to 7 over the keys of all: those after them are masked, as slots not yet filled are."""
    mesh = mesh_of(*shape)
    q, k, v, segments = inputs(8, 4, 2)
    rows = jax.P(("data", "fsdp"))
    with jax.set_mesh(mesh):
        put = lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec))
        heads = jax.P(("data", "fsdp"), None, "tensor")
        full = jax.jit(attention)(*(put(array, heads) for array in (q, k, v)), put(segments, rows))
        late = jax.jit(cached_attention)(
            put(q[:, 5:], heads), put(k, heads), put(v, heads), put(mask_of(segments)[:, 5:], rows)
        )
    np.testing.assert_allclose(late, full[:, 5:], atol=1e-6)


def test_bfloat16_comes_out_as_it_went_in():
    q, k, v, segments = inputs(8, 4, 2)
    attend = jax.jit(blocked_attention)
    half = attend(*(array.astype(jnp.bfloat16) for array in (q, k, v)), segments)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), attend(q, k, v, segments), atol=0.05)
