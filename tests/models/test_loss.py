import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.runs import mesh_of

from gptjax.errors import Refused
from gptjax.models.interface import Output
from gptjax.models.loss import LossConfig, next_token_scores, next_token_sums
from gptjax.parallel.sharding import spec

B, T, D, V, VOCAB = 8, 8, 16, 128, 100


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    w[VOCAB:] *= 100  # padding that would win everywhere
    targets = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    # Some targets are the most likely token, so that `correct` has something to count.
    best = (x @ w[:VOCAB].T).argmax(-1)
    targets = np.where(rng.random((B, T)) < 0.3, best, targets).astype(np.int32)
    weights = (rng.random((B, T)) < 0.8).astype(np.float32)
    return x, w, targets, weights


def reference(x, w, targets, weights, softcap, z_loss):
    """(objective, (nll, z, correct)) by the log of a softmax over the real vocabulary."""
    logits = x @ w[:VOCAB].T
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    z = jax.nn.logsumexp(logits, -1) ** 2
    nll, z, correct = ((weights * part).sum() for part in (nll, z, logits.argmax(-1) == targets))
    return nll + z_loss * z, (nll, z, correct)


def output_of(w, softcap):
    return Output(nnx.Param(w, axes=("vocab", "embed")), softcap)


def loss_sums(x, w, targets, weights, *, softcap, **settings):
    return next_token_sums(x, output_of(w, softcap), targets, weights, **settings)


def specs():
    """Of x, w, targets and weights on the mesh in use, as the model has them."""
    rows = spec("act_batch", "act_seq")
    return spec("act_batch", "act_stream", "act_embed"), spec("vocab", "embed"), rows, rows


def on_mesh(shape, inputs, softcap, config):
    """The sums and the gradients wrt hidden states and table."""
    mesh = mesh_of(*shape)

    @jax.jit
    def run(x, w, targets, weights):
        def objective(x, w):
            sums = loss_sums(x, w, targets, weights, vocab_size=VOCAB, softcap=softcap, config=config)
            return sums.objective, sums

        return jax.value_and_grad(objective, (0, 1), has_aux=True)(x, w)

    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, jax.NamedSharding(mesh, cut)) for array, cut in zip(inputs, specs(), strict=True)
        ]
        (_, sums), gradients = jax.device_get(run(*placed))
    return sums, gradients


@pytest.mark.parametrize("shape, softcap", [((1, 1, 1), 0.0), ((2, 2, 2), 5.0)], ids=str)
def test_scores_of_targets_are_those_of_log_softmax(inputs, shape, softcap):
    mesh = mesh_of(*shape)
    x, w, targets, _ = inputs
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, jax.NamedSharding(mesh, cut))
            for array, cut in zip(inputs[:3], specs()[:3], strict=True)
        ]

        def score(x, w, targets):
            return next_token_scores(x, output_of(w, softcap), targets, vocab_size=VOCAB)

        scores, best = jax.device_get(jax.jit(score)(*placed))
    logits = np.float64(x) @ np.float64(w[:VOCAB]).T
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    expected = np.take_along_axis(logits, targets[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert (best == (logits.argmax(-1) == targets)).all() and 10 < best.sum() < best.size - 10


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("softcap, z_loss, chunks", [(0.0, 0.0, 1), (0.0, 1e-2, 2), (5.0, 1e-2, 4)])
def test_sums_and_gradients_are_those_of_log_softmax(inputs, shape, softcap, z_loss, chunks):
    sums, (dx, dw) = on_mesh(shape, inputs, softcap, LossConfig(z_loss=z_loss, num_chunks=chunks))
    differentiated = jax.jit(jax.value_and_grad(reference, (0, 1), has_aux=True), static_argnums=(4, 5))
    (objective, (nll, z, correct)), (expected_dx, expected_dw) = differentiated(*inputs, softcap, z_loss)
    np.testing.assert_allclose(sums, (objective, nll, z, correct), rtol=1e-5)
    assert 10 < correct < inputs[3].sum() - 10
    np.testing.assert_allclose(dx, expected_dx, atol=2e-5 * np.abs(expected_dx).max())
    np.testing.assert_allclose(dw, expected_dw, atol=2e-5 * np.abs(expected_dw).max())
    assert (dw[VOCAB:] == 0).all()


def test_value_alone_is_the_same_as_with_the_gradient(inputs):
    mesh, config = mesh_of(1, 1, 1), LossConfig(z_loss=1e-2, num_chunks=2)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, jax.NamedSharding(mesh, cut)) for array, cut in zip(inputs, specs(), strict=True)
        ]
        alone = jax.jit(lambda *a: loss_sums(*a, vocab_size=VOCAB, softcap=5.0, config=config))(*placed)
    np.testing.assert_allclose(alone, on_mesh((1, 1, 1), inputs, 5.0, config)[0], rtol=1e-6)


@pytest.mark.parametrize("softcap", [0.5, 5.0])
def test_soft_cap_bounds_the_loss(inputs, softcap):
    """Logits within ±c leave no token less than e^(-2c) / V of the probability."""
    sums, _ = on_mesh((1, 1, 1), inputs, softcap, LossConfig())
    assert sums.nll / inputs[3].sum() < 2 * softcap + np.log(VOCAB)
    free, _ = on_mesh((1, 1, 1), inputs, 0.0, LossConfig())
    assert abs(free.nll - sums.nll) > 1


def test_logits_of_the_whole_batch_are_never_held():
    """The compiler's own count of temporary bytes, against the bytes of [B, T, V] in float32."""
    B, T, D, V = 4, 256, 32, 16384
    mesh = mesh_of(1, 1, 1)

    def temporaries(chunks):
        def objective(x, w, targets, weights):
            return loss_sums(
                x, w, targets, weights, vocab_size=V, softcap=0.0, config=LossConfig(num_chunks=chunks)
            ).objective

        with jax.set_mesh(mesh):
            shapes = [
                jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, cut))
                for sizes, dtype, cut in zip(
                    [(B, T, D), (V, D), (B, T), (B, T)],
                    [jnp.float32, jnp.float32, jnp.int32, jnp.float32],
                    specs(),
                    strict=False,
                )
            ]
            lowered = jax.jit(jax.grad(objective, (0, 1))).lower(*shapes)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    logits = 4 * B * T * V
    assert temporaries(1) > logits
    assert temporaries(8) < logits / 2


def test_chunks_that_do_not_divide_are_refused(inputs):
    with pytest.raises(Refused, match="seq_len=8 is not divisible by loss.num_chunks=3"):
        on_mesh((1, 1, 1), inputs, 0.0, LossConfig(num_chunks=3))
