"""Models of experts: routing, sums, training, decoding, counts and refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.runs import LLAMA, mesh_of, run, tiny

from gptjax.errors import Refused
from gptjax.models import blocks, experts, int8
from gptjax.models.config import ModelConfig
from gptjax.models.interface import Inputs
from gptjax.models.layers import Weights
from gptjax.models.sections import LoraConfig
from gptjax.training import step
from gptjax.training.optim.config import OptimizerConfig

MOE = dataclasses.replace(
    LLAMA,
    layers="1(attention/mlp) 1(attention/moe)",
    num_experts=4,
    expert_dim=32,
    shared_experts=1,
    balance_loss=0.01,
    router_z_loss=0.001,
    router_bias=0.01,
)
STEPS = 4


def built(model: ModelConfig, seed: int = 0):
    """A model on the mesh in use."""
    return jax.jit(lambda: model.resolved().build(257, 32, nnx.Rngs(seed)))()


@pytest.fixture(scope="module")
def trained(store):
    """(state, losses) after a few steps on a single device."""
    return run(tiny(MOE), store, mesh_of(1, 1, 1), STEPS)


@pytest.mark.parametrize("shape", [(1, 2, 4), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_same_losses_on_every_mesh(trained, store, shape):
    _, losses = run(tiny(MOE), store, mesh_of(*shape), STEPS)
    np.testing.assert_allclose(losses, trained[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 4)], ids=str)
def test_the_products_of_tpus_give_the_same_losses(trained, store, shape, monkeypatch):
    monkeypatch.setitem(experts.BLOCKS, "cpu", 1)
    jax.clear_caches()
    _, losses = run(tiny(MOE), store, mesh_of(*shape), STEPS)
    np.testing.assert_allclose(losses, trained[1], rtol=1e-5)
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_changes_no_loss(trained, store, remat):
    _, losses = run(tiny(dataclasses.replace(MOE, remat=remat)), store, mesh_of(1, 2, 1), STEPS)
    np.testing.assert_allclose(losses, trained[1], rtol=1e-5)


@pytest.mark.slow
def test_accumulation_gives_the_same_update(store):
    """The share of the assignments in the balance loss is that of a micro-batch, so this loss is off here."""
    model = dataclasses.replace(MOE, balance_loss=0.0)
    _, whole = run(tiny(model), store, mesh_of(1, 1, 1), STEPS)
    _, parts = run(tiny(model, grad_accum_steps=4), store, mesh_of(1, 2, 1), STEPS)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.slow
def test_muon_treats_each_expert_as_a_matrix(store):
    config = tiny(MOE, optimizer=OptimizerConfig(name="muon", peak_learning_rate=1e-2, warmup_steps=1))
    state, losses = run(config, store, mesh_of(1, 1, 1), 8)
    assert losses[-1] < losses[0] - 0.5
    up = np.asarray(state.model.blocks[1][0].expert_up[...])
    assert up.shape == (1, 4, 64, 32) and np.isfinite(up).all()


def test_biases_follow_the_load_and_nothing_else_does(trained):
    state, _ = trained
    bias = np.asarray(state.model.blocks[1][0].router_bias[...])[0]
    steps = bias / MOE.router_bias
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)  # the optimizer leaves them alone
    assert 0 < np.abs(steps).max() <= STEPS
    with jax.set_mesh(mesh_of(1, 1, 1)):
        moved = state.model.after_update({"expert_tokens": jnp.array([[9, 5, 5, 1]])})
    np.testing.assert_allclose(moved.blocks[1][0].router_bias[0] - bias, [-0.01, 0, 0, 0.01], atol=1e-6)
    np.testing.assert_array_equal(state.model.blocks[1][0].router_bias[0], bias)


def test_sums(trained):
    """The sums are those of the definition, from the scores of the one routed layer; nothing is dropped."""
    state, _ = trained
    ids = jnp.arange(64).reshape(2, 32) * 3 % 257
    positions, found = jnp.tile(jnp.arange(32), (2, 1)), []
    for shape in ((1, 1, 1), (1, 1, 2)):
        with jax.set_mesh(mesh := mesh_of(*shape)):
            model = jax.device_put(
                jax.device_get(state.model),
                jax.tree.map(
                    lambda leaf: jax.NamedSharding(mesh, leaf.sharding.spec), jax.eval_shape(lambda: built(MOE))
                ),
            )
            hidden = jax.jit(lambda model: model.hidden(Inputs(ids, positions, jnp.zeros_like(ids)), None))(model)
            sums = jax.device_get(hidden.sums)
        assert sums["dropped_tokens"] == 0 and sums["expert_tokens"].sum() == 2 * 64
        assert 64 <= sums["balance_loss"] < 4 * 64
        np.testing.assert_allclose(
            hidden.objective, 0.01 * sums["balance_loss"] + 0.001 * sums["router_z_loss"], rtol=1e-6
        )
        found.append(sums)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5), *found)


def route(logits, **changes):
    """(experts, weights, sums) of positions whose router has these logits."""
    logits = np.asarray(logits, np.float32)
    E = logits.shape[-1]
    c = dataclasses.replace(
        MOE, num_experts=E, embed_dim=E, num_heads=1, num_kv_heads=1, layers="2(attention/moe)", router_bias=0.0,
        **changes
    ).resolved()  # fmt: skip

    with jax.set_mesh(mesh_of(1, 1, 1)):

        def made():
            block = blocks.block_type("attention", "moe")(c, Weights(nnx.Rngs(0), "float32"), 1)
            block = blocks.one_by_one(block, 1)[0]
            block.router = block.router.replace(jnp.eye(E))
            routed = jax.shard_map(lambda block, x_BTD: block.route(x_BTD, ()), out_specs=jax.P())
            return routed(block, jnp.asarray(logits)[None])

        routing, sums = jax.jit(made)()
    return jax.device_get((routing.experts_BTk[0], routing.weights_BTk[0], sums))


def test_softmax_router():
    logits = np.log([[0.5, 0.3, 0.1, 0.1], [0.05, 0.15, 0.2, 0.6]])
    chosen, weights, sums = route(logits, router_normalized=False)
    np.testing.assert_array_equal(chosen, [[0, 1], [3, 2]])
    np.testing.assert_allclose(weights, [[0.5, 0.3], [0.6, 0.2]], rtol=1e-5)
    np.testing.assert_allclose(sums["balance_loss"], 4 * 0.25 * 2, rtol=1e-5)  # each expert has 1 of 4 assignments
    np.testing.assert_allclose(sums["router_z_loss"], 0, atol=1e-6)
    _, weights, _ = route(logits, router_scale=2.5)
    np.testing.assert_allclose(weights, 2.5 * np.array([[5 / 8, 3 / 8], [3 / 4, 1 / 4]]), rtol=1e-5)


def test_sigmoid_router_with_groups():
    """The best two experts stand in groups of which only the better one is open."""
    logits = np.array([[3.0, -9, 2.5, 2.4, -9, -9]])
    chosen, weights, _ = route(logits, router="sigmoid", router_groups=3, router_top_groups=1)
    scores = 1 / (1 + np.exp(-logits[0]))
    np.testing.assert_array_equal(chosen, [[2, 3]])
    np.testing.assert_allclose(weights[0], scores[2:4] / scores[2:4].sum(), rtol=1e-5)
    chosen, _, _ = route(logits, router="sigmoid", router_groups=3, router_top_groups=2)
    np.testing.assert_array_equal(chosen, [[0, 2]])


def test_decoding_is_a_full_pass():
    with jax.set_mesh(mesh_of(1, 1, 1)):
        model, ids = built(MOE), jnp.arange(12)[None] * 7

        @jax.jit
        def read(model):
            whole_BTD = model.hidden(Inputs(ids, jnp.arange(12)[None], jnp.zeros_like(ids)), None).x_BTD
            decoder = model.for_decoding()
            x_RD, state = decoder.prefill(ids[:, :10], jnp.array([9]))
            slots = decoder.empty_state(1, 16)
            padded = jax.tree.map(lambda old, new: old.at[:, :, : new.shape[2]].set(new), slots, state)
            return whole_BTD, x_RD, decoder.decode(ids[:, 9], jnp.array([9]), padded)[0]

        whole, prefilled, decoded = jax.device_get(read(model))
    np.testing.assert_allclose(prefilled[0], whole[0, 8], atol=1e-4)
    np.testing.assert_allclose(decoded[0], whole[0, 9], atol=1e-4)


def test_int8_experts_are_the_rounded_ones():
    """The router keeps its numbers, so that the choices stay."""
    with jax.set_mesh(mesh_of(1, 1, 1)):
        model, ids = built(MOE), jnp.arange(8)[None]

        @jax.jit
        def last(model):
            return model.for_decoding().prefill(ids, jnp.array([8]))[0]

        small = int8.quantized(model)
        assert small.blocks[1].expert_up.values.dtype == jnp.int8 and small.blocks[1].expert_up.scale.shape == (4, 32)
        np.testing.assert_array_equal(small.blocks[1].router[...], model.blocks[1][0].router[0])
        np.testing.assert_allclose(last(small), last(int8.rounded(model)), atol=2e-4)


def test_counts():
    for model in (MOE, dataclasses.replace(MOE, shared_experts=0, router_bias=0.0, activation="gelu")):
        model = model.resolved()
        with jax.set_mesh(mesh_of(1, 1, 1)):
            shapes = jax.eval_shape(lambda model=model: model.build(257, 32, nnx.Rngs(0)))
        total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        idle = 2 * 64 * 32 * model.matrices  # two of four experts
        assert model.num_parameters(257, 32) == (total, total - idle)
    dense = dataclasses.replace(
        MOE, layers="", num_experts=0, expert_dim=0, shared_experts=0, router_bias=0.0, mlp_dim=96, balance_loss=0.0
    ).resolved()  # fmt: skip
    same = dataclasses.replace(MOE, layers="2(attention/moe)").resolved()  # two experts of 32 and a shared one
    assert same.flops_per_token(257, 32) - dense.flops_per_token(257, 32) == 6 * 2 * 64 * 4  # the routers


def test_no_buffer_holds_all_experts_of_all_tokens(monkeypatch):
    """Temporaries are linear in assignments: no array of the program has tokens · experts · width numbers."""
    model = dataclasses.replace(MOE, num_experts=64, experts_per_token=2, layers="2(attention/moe)")
    monkeypatch.setitem(experts.BLOCKS, "cpu", 8)  # blocks that fit so few tokens
    config, mesh = tiny(model, batch_size=16), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        program = step.compile_step(config, 257, step.abstract_state(config, 257, mesh), mesh).as_text()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([0-9,]+)\]", program)]
    tokens = 16 * 32
    assert max(sizes) < tokens * 64 * 32 / 2
    assert max(sizes) >= (tokens * 2) * 32  # the slots are there


def test_adapters_leave_the_router_alone():
    from gptjax.models.lora import Adapters, merged

    with jax.set_mesh(mesh_of(1, 1, 1)):
        model = built(dataclasses.replace(MOE, layers="2(attention/moe)"))
        adapters = Adapters(model, LoraConfig(rank=2), 0)
        whole = merged(model, adapters)
    assert adapters.expert_up.a.shape == (2, 4, 64, 2) and not hasattr(adapters, "router")
    np.testing.assert_array_equal(whole.blocks.expert_up[...], model.blocks.expert_up[...])


@pytest.mark.parametrize("changes, words", [
    (dict(num_experts=0), 'model.num_experts=0 and model.layers="1(attention/mlp) 1(attention/moe)" with 1 blocks'),
    (dict(layers=""), 'model.num_experts=4 and model.layers="" with 0 blocks of moe'),
    (dict(experts_per_token=5), "model.experts_per_token=5 must lie between 1 and model.num_experts=4"),
    (dict(biases=True), "set model.biases=false"),
    (dict(router="topk"), 'model.router="topk" is unknown'),
    (dict(router_groups=3), "model.router_groups=3 must divide model.num_experts=4"),
    (dict(router_groups=4, router_top_groups=1), "hold model.experts_per_token=2 experts"),
    (dict(balance_loss=-1.0), "model.balance_loss=-1.0 must not be negative"),
    (dict(router_scale=0.0), "model.router_scale=0.0 must be more than 0"),
])  # fmt: skip
def test_refused(changes, words):
    with pytest.raises(Refused) as refusal:
        dataclasses.replace(MOE, **changes).resolved()
    assert words in str(refusal.value)
