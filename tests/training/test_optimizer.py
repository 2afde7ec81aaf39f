import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.runs import GPT2, LLAMA, mesh_of

from gptjax.errors import Refused
from gptjax.models.config import ModelConfig
from gptjax.models.transformer import Transformer
from gptjax.parallel.trees import named_leaves
from gptjax.training.optim.config import OptimizerConfig, check
from gptjax.training.optim.optimizers import decays, make_optimizer
from gptjax.training.optim.schedules import SCHEDULES, learning_rate

PEAK, WARMUP, STEPS = 0.01, 10, 110


def rates(schedule, **changes):
    """The rate of each update of a run."""
    config = OptimizerConfig(peak_learning_rate=PEAK, warmup_steps=WARMUP, schedule=schedule, final_fraction=0.1)
    rate = learning_rate(dataclasses.replace(config, **changes), STEPS)
    return np.asarray(jax.vmap(rate)(jnp.arange(STEPS)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_a_line_from_above_zero_to_the_peak(schedule):
    np.testing.assert_allclose(rates(schedule)[:WARMUP], PEAK * np.arange(1, WARMUP + 1) / WARMUP, rtol=1e-5)
    assert rates(schedule, warmup_steps=0)[0] > 0.7 * PEAK


AFTER = np.arange(1, STEPS - WARMUP + 1)  # updates since the warmup
EXPECTED = {
    "constant": np.full(100, PEAK),
    "cosine": PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi * AFTER / 100)) / 2),
    "linear": PEAK * (1 - 0.9 * AFTER / 100),
    "wsd": PEAK * np.minimum(1, 0.1 + 0.9 * (100 - AFTER) / 22),  # decay_fraction 0.2 of 110 steps
    "inverse_sqrt": PEAK * np.sqrt(WARMUP / (WARMUP + AFTER)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule):
    np.testing.assert_allclose(rates(schedule)[WARMUP:], EXPECTED[schedule], rtol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_update_has_the_final_rate(schedule):
    for fraction in (0.1, 0.0, 1.0):
        assert rates(schedule, final_fraction=fraction)[-1] == pytest.approx(fraction * PEAK, abs=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_peak_of_zero_freezes(schedule):
    assert (rates(schedule, peak_learning_rate=0.0) < 1e-20).all()


@pytest.fixture(scope="module", params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def model(request):
    with jax.set_mesh(mesh_of(1, 1, 1)):
        return jax.jit(lambda: Transformer(request.param.resolved(), 257, 32, nnx.Rngs(0)))()


def first_update(model, gradient, **changes):
    """{name: update of the first step}, at the full rate."""
    config = OptimizerConfig(**(dict(peak_learning_rate=PEAK, warmup_steps=0, schedule="constant") | changes))

    @jax.jit
    def update(model, gradient):
        optimizer = make_optimizer(config, STEPS)
        return optimizer.update(gradient, optimizer.init(model), model)[0]

    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])):
        updates = update(jax.device_get(model), jax.device_get(gradient))
    return by_name(updates)


def by_name(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): np.asarray(leaf)
        for path, leaf in leaves
    }


def random_like(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), model)


def is_matrix(name):
    return not ("norm" in name or "bias" in name)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_decay_pulls_on_weights_alone_and_by_the_rate(model, name):
    """With no gradient an update is the decay and nothing else."""
    updates = first_update(model, jax.tree.map(jnp.zeros_like, model), name=name, weight_decay=0.1)
    for key, weight in by_name(model).items():
        np.testing.assert_allclose(updates[key], -PEAK * 0.1 * weight if is_matrix(key) else 0, atol=1e-9, err_msg=key)


def test_mask_names_every_weight(model):
    mask = dict(zip(by_name(model), jax.tree.leaves(decays(model)), strict=True))
    assert mask == {name: is_matrix(name) for name in mask}


def test_muon_makes_the_singular_values_of_each_block_matrix_equal(model):
    gradient = random_like(model)
    updates = first_update(model, gradient, name="muon", weight_decay=0.0, clip_norm=0.0)
    embed = model.config.embed_dim
    matrices = ("query", "key", "value", "output", "up", "down") + (("gate",) if model.blocks.gate is not None else ())
    for name in matrices:
        for layer, update in enumerate(updates[f"blocks.{name}"]):
            two_sides = update.reshape(embed, -1) if update.shape[0] == embed else update.reshape(-1, embed)
            values = np.linalg.svd(two_sides, compute_uv=False)
            # Newton–Schulz stops within about 0.7 and 1.2; a random square matrix has a tenth of them 10 times smaller.
            assert values.max() < 2.2 * np.quantile(values, 0.1), (name, layer)
    # Adam serves the others: its first update is the gradient's sign times one number.
    adams = [key for key in updates if key.removeprefix("blocks.") not in matrices]
    assert "embedding" in adams and "norm.gain" in adams
    for key in adams:
        np.testing.assert_allclose(np.abs(updates[key]), np.abs(updates["norm.gain"]).max(), rtol=1e-3, err_msg=key)


def test_muon_and_adamw_move_weights_about_as_far(model):
    gradient = random_like(model)
    updates = first_update(model, gradient, name="muon", weight_decay=0.0)
    for name in ("query", "up", "down"):
        assert np.sqrt((updates[f"blocks.{name}"] ** 2).mean()) == pytest.approx(0.2 * PEAK, rel=0.3)


FACTORED = ModelConfig(num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=128, mlp_dim=256)


def test_adafactor_takes_each_layer_by_itself():
    """As optax does of one array a layer, whose heads are one axis; it never factors gains and biases."""
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda leaf: draw(rng, leaf.shape), shapes_of(FACTORED)) for _ in range(3)]
    config = OptimizerConfig(
        name="adafactor", peak_learning_rate=PEAK, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=0.0
    )
    found = updates_of(make_optimizer(config, STEPS), gradients)
    reference = optax.adafactor(None, multiply_by_parameter_scale=False, momentum=config.beta1)
    expected = updates_of(reference, [{key: flat(key, leaf) for key, leaf in layers(tree)} for tree in gradients])
    for key, update in layers(found):
        np.testing.assert_allclose(flat(key, update), PEAK * expected[key], rtol=2e-5, atol=1e-9, err_msg=str(key))


def shapes_of(config):
    with jax.set_mesh(mesh_of(1, 1, 1)):
        model = jax.eval_shape(lambda: Transformer(config.resolved(), 257, 128, nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)


def draw(rng, shape):
    """A gradient whose layers, rows and columns differ in size."""
    sizes = [np.exp(rng.normal(size=[n if axis == other else 1 for other in range(len(shape))]))
             for axis, n in enumerate(shape)]  # fmt: skip
    return (rng.normal(size=shape) * functools.reduce(np.multiply, sizes)).astype(np.float32)


def updates_of(optimizer, gradients):
    """The last of some updates in a row."""
    step, state = jax.jit(optimizer.update), optimizer.init(gradients[0])
    for gradient in gradients:
        updates, state = step(gradient, state, gradient)
    return updates


def layers(tree):
    """((name, layer), array) of each layer of a tree's leaves."""
    for name, leaf in by_name(tree).items():
        yield from [((name, i), part) for i, part in enumerate(leaf)] if "blocks" in name else [((name, 0), leaf)]


def flat(key, layer):
    """A layer's weight as a matrix, whose heads are one axis; gains and biases as vectors."""
    if not is_matrix(key[0]):
        return layer.reshape(-1)
    return layer.reshape(-1, layer.shape[-1]) if "output" in key[0] else layer.reshape(layer.shape[0], -1)


def second_moments(model, **changes):
    """{name: shape} of Adafactor's second moments that are not factored."""
    optimizer = make_optimizer(OptimizerConfig(name="adafactor", **changes), STEPS)
    state = jax.eval_shape(optimizer.init, shapes_of(model))
    return {name: leaf.shape for name, leaf in named_leaves(state[1][0][0].v).items() if leaf.shape != (1,)}


@pytest.mark.parametrize("num_layers", [3, 128])  # with 128, optax takes the layers for one side of a matrix
def test_adafactor_factors_matrices_and_nothing_else(num_layers):
    model = dataclasses.replace(FACTORED, num_layers=num_layers)
    whole = second_moments(model)
    assert {name for name in whole if is_matrix(name)} == {"blocks.key", "blocks.value"}  # with a side of 64
    assert {name for name in named_leaves(shapes_of(model)) if not is_matrix(name)} <= whole.keys()


def test_adafactors_state_of_bfloat16_weights_stays_in_float32():
    optimizer, gradients = make_optimizer(OptimizerConfig(name="adafactor"), STEPS), shapes_of(FACTORED)
    weights = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), gradients)
    before = jax.eval_shape(optimizer.init, gradients)
    _, after = jax.eval_shape(optimizer.update, gradients, before, weights)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(before)]


def test_adafactor_of_gpt2_keeps_less_than_a_hundredth_whole():
    gpt2 = ModelConfig(num_layers=12, num_heads=12, embed_dim=768)
    total = gpt2.resolved().num_parameters(257, 128).total
    assert sum(map(math.prod, second_moments(gpt2).values())) < 0.01 * total
    assert sum(map(math.prod, second_moments(gpt2, version=1).values())) > 0.2 * total  # as runs of before began


def test_clipping_is_by_the_norm_of_all_gradients(model):
    """Seen in Lion's first momentum, which is (1 - beta2) times the gradient that comes out of the clip."""
    norm = sum(leaf.size for leaf in jax.tree.leaves(model)) ** 0.5

    @functools.partial(jax.jit, static_argnames="clip_norm")
    def clipped(gradient, clip_norm):
        optimizer = make_optimizer(OptimizerConfig(name="lion", clip_norm=clip_norm, beta2=0.5), STEPS)
        _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
        return optax.tree.norm([leaf for leaf in jax.tree.leaves(state) if leaf.ndim]) / 0.5

    seen = [clipped(jax.tree.map(jnp.ones_like, model), clip_norm) for clip_norm in (2.5, 0.0, 10 * norm)]
    np.testing.assert_allclose(seen, [2.5, norm, norm], rtol=1e-4)


@pytest.mark.parametrize("changes, words", [
    (dict(name="adam"), 'optimizer.name="adam" is unknown: choose one of adamw, lion, adafactor, muon'),
    (dict(schedule="cos"), 'optimizer.schedule="cos" is unknown: choose one of constant, cosine'),
    (dict(decay_fraction=1.5), "optimizer.decay_fraction=1.5 must lie between 0 and 1"),
    (dict(final_fraction=-0.1), "optimizer.final_fraction=-0.1 must lie between 0 and 1"),
    (dict(beta1=1.0), "optimizer.beta1=1.0 must be at least 0 and below 1"),
    (dict(beta2=-0.1), "optimizer.beta2=-0.1"),
    (dict(ema_decay=1.0), "optimizer.ema_decay=1.0"),
    (dict(peak_learning_rate=-1.0), "optimizer.peak_learning_rate=-1.0 must not be negative"),
    (dict(weight_decay=-1.0), "optimizer.weight_decay=-1.0 must not be negative"),
    (dict(clip_norm=-1.0), "optimizer.clip_norm=-1.0 must not be negative"),
    (dict(warmup_steps=-1), "optimizer.warmup_steps=-1 must not be negative"),
])  # fmt: skip
def test_refused(changes, words):
    with pytest.raises(Refused, match=words):
        check(OptimizerConfig(**changes), STEPS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warmup_longer_than_the_run_is_cut(name):
    """A short first look at a recipe takes no other change."""
    config = OptimizerConfig(schedule=name, warmup_steps=30, peak_learning_rate=1e-2)
    assert check(config, 10) is None
    rates = [float(learning_rate(config, 10)(step)) for step in range(10)]
    np.testing.assert_allclose(rates[:9], 1e-2 * np.arange(1, 10) / 10, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rate_is_below_zero(name):
    config = OptimizerConfig(
        schedule=name, warmup_steps=3, final_fraction=0.0, peak_learning_rate=1e-2, decay_fraction=0.4
    )
    rates = [float(learning_rate(config, 1200)(step)) for step in range(1190, 1203)]
    assert min(rates) >= 0


def test_defaults_pass():
    defaults = OptimizerConfig()
    assert check(defaults, STEPS) is None and 0 < defaults.warmup_steps <= STEPS
