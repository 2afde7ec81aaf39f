import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import runs as training

from gptjax.data.batch import Batch
from gptjax.evaluation import interpretability
from gptjax.models import objective
from gptjax.models.attention import masked_attention
from gptjax.models.blocks import Attention
from gptjax.models.config import ModelConfig
from gptjax.models.loss import LossConfig
from gptjax.models.transformer import Transformer
from gptjax.parallel import batches
from gptjax.training import step

TOKENS = [256, *b"def f(x):\n    return x"]
CONFIG = ModelConfig(
    num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, norm="rmsnorm", positions="rope", biases=False
).resolved()


def model_on(mesh, config=CONFIG):
    with jax.set_mesh(mesh):
        return jax.jit(lambda: Transformer(config, 257, 64, nnx.Rngs(0)))()


def maps_on(*shape):
    mesh = training.mesh_of(*shape)
    with jax.set_mesh(mesh):
        return interpretability.attention_maps(model_on(mesh), TOKENS)


@pytest.mark.slow
def test_maps_are_the_weights_of_the_models_own_attention():
    mesh = training.mesh_of(1, 1, 1)
    model = model_on(mesh)
    with jax.set_mesh(mesh):
        maps = interpretability.attention_maps(model, TOKENS)
        positions = jnp.arange(len(TOKENS))[None]
        block = jax.tree.map(lambda weight: weight[0], model.blocks)
        x = model.embed(jnp.array([TOKENS]), positions, "act_seq")
        rotation = model.rotation(positions)
        q, k, v = Attention.heads(block, x, rotation, "act_seq")
        causal = np.tril(np.ones((1, len(TOKENS), len(TOKENS)), bool))
        attended = masked_attention(q, k, v, causal)
    of_heads = np.repeat(v, CONFIG.num_heads // CONFIG.num_kv_heads, axis=2)[0]
    np.testing.assert_allclose(np.einsum("nts,snh->tnh", maps[0], of_heads), attended[0], atol=1e-5)
    assert maps.shape == (2, 4, len(TOKENS), len(TOKENS))
    assert not np.triu(maps, 1).any()
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


@pytest.mark.slow
def test_maps_are_the_same_on_any_mesh():
    np.testing.assert_allclose(maps_on(2, 2, 2), maps_on(1, 1, 1), atol=1e-5)


def test_maps_see_no_further_than_the_window():
    mesh = training.mesh_of(1, 1, 1)
    model = model_on(mesh)
    model.config = ModelConfig(**vars(CONFIG) | {"sliding_window": 3})
    with jax.set_mesh(mesh):
        maps = interpretability.attention_maps(model, TOKENS)
    assert not np.tril(maps, -3).any() and np.tril(maps, -2).any()


def test_surprise_is_the_loss_by_token():
    mesh = training.mesh_of(2, 2, 2)
    model, count = model_on(mesh), len(TOKENS) - 1
    with jax.set_mesh(mesh):
        found = interpretability.surprise(model, TOKENS, 257)
        rows = np.tile(np.array(TOKENS, np.int32), (4, 1))
        inputs, ones = rows[:, :-1], np.ones((4, count), np.int32)
        batch = Batch(inputs, rows[:, 1:], ones * np.arange(count, dtype=np.int32), ones, ones.astype(np.float32))
        batch = jax.tree.map(lambda array: array[0], batches.place(batch, np.arange(4), batches.BatchLayout(mesh, 4)))
        sums = jax.jit(
            lambda: objective.batch_sums(model, batch, None, vocab_size=257, loss=LossConfig(num_chunks=1))
        )()
    assert found.shape == (count,)
    assert 4 * found.sum() * np.log(2) == pytest.approx(float(sums.nll), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_the_parts_of_a_weight_are_where_its_sharding_says(shape):
    mesh = training.mesh_of(*shape)
    found = interpretability.weights(model_on(mesh))
    assert sum(weight.size for weight in found) == CONFIG.num_parameters(257, 64).total
    for weight in found:
        held = np.zeros(weight.shape, int)
        for part in weight.parts.values():
            held[part] += 1
        cuts = np.prod([mesh.shape[axis] for axes in weight.cut for axis in axes])
        assert (held == mesh.size / cuts).all()
    cut = {weight.name: weight.cut for weight in found}
    assert {"embedding", "norm.gain", "blocks.query", "blocks.value", "blocks.norm_mlp.gain"} < cut.keys()
    sharded = ((), ("fsdp",), ("tensor",), ())
    assert cut["blocks.query"] == (sharded if mesh.size > 1 else ((), (), (), ()))


@pytest.mark.slow
def test_gradient_norms_add_up_to_that_of_the_step(store):
    mesh, config = training.mesh_of(2, 2, 1), training.tiny(dataclasses.replace(training.GPT2, dropout=0.0))
    layout = batches.BatchLayout(mesh, config.batch_size)
    rows = batches.local_rows(layout)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: step.init_state(config, store.tokenizer.vocab_size))()
        batch = batches.place(training.data_of(config, store).batch(0, rows), rows, layout)
        own = jax.tree.map(lambda array: array[0], batch)
        norms = interpretability.gradient_norms(
            state.model, own, vocab_size=store.tokenizer.vocab_size, loss=config.loss
        )
        _, metrics = step.train_step(state, batch, config=config, vocab_size=257)
    assert norms["blocks.query"].shape == (2,) and norms["embedding"].shape == (1,)
    total = np.sqrt(sum(np.square(each).sum() for each in norms.values()))
    assert total == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)
