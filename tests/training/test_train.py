import dataclasses

import jax
import numpy as np
import pytest
from support.runs import GPT2, LLAMA, data_of, mesh_of, run, tiny

from gptjax.data.stream.packing import PackingConfig
from gptjax.errors import Refused
from gptjax.parallel.trees import placed
from gptjax.training import loop
from gptjax.training import step as update
from gptjax.training.optim.config import OptimizerConfig
from gptjax.training.optim.optimizers import OPTIMIZERS

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
QUICK = [("gpt2", (2, 2, 2)), ("llama", (1, 2, 4))]


@pytest.fixture(scope="module")
def single_device(store):
    return {model: run(tiny(model), store, mesh_of(1, 1, 1), 20)[1] for model in (GPT2, LLAMA)}


def test_golden_losses(single_device):
    """A change that is meant to leave the numbers alone leaves these alone."""
    np.testing.assert_allclose(single_device[GPT2][:3], GOLDEN["gpt2"], rtol=1e-5)
    np.testing.assert_allclose(single_device[LLAMA][:3], GOLDEN["llama"], rtol=1e-5)


@pytest.mark.parametrize("name, model", [("gpt2", GPT2), pytest.param("llama", LLAMA, marks=pytest.mark.slow)])
def test_golden_losses_of_the_first_order_of_rows(store, name, model):
    """Runs of before keep the order that they began with."""
    _, losses = run(tiny(model, packing=PackingConfig(version=1)), store, mesh_of(1, 1, 1), 3)
    np.testing.assert_allclose(losses, FIRST_GOLDEN[name], rtol=1e-5)


@pytest.mark.parametrize(
    "model, shape",
    [
        pytest.param(model, shape, marks=() if (name, shape) in QUICK else pytest.mark.slow, id=f"{name}-{shape}")
        for name, model in (("gpt2", GPT2), ("llama", LLAMA))
        for shape in MESHES
    ],
)
def test_same_losses_on_every_mesh(single_device, store, model, shape):
    _, losses = run(tiny(model), store, mesh_of(*shape), 20)
    np.testing.assert_allclose(losses, single_device[model], rtol=1e-5)


@pytest.mark.slow
def test_same_losses_with_heads_over_eight_devices(store):
    model = dataclasses.replace(LLAMA, num_kv_heads=8)
    _, one = run(tiny(model), store, mesh_of(1, 1, 1), 20)
    _, eight = run(tiny(model), store, mesh_of(1, 1, 8), 20)
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.mark.slow
def test_accumulation_gives_the_same_update(store):
    model = dataclasses.replace(GPT2, dropout=0.0)
    _, whole = run(tiny(model), store, mesh_of(1, 1, 1), 20)
    _, parts = run(tiny(model, grad_accum_steps=4), store, mesh_of(1, 1, 1), 20)
    _, sharded_parts = run(tiny(model, grad_accum_steps=4), store, mesh_of(1, 2, 1), 20)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_allclose(sharded_parts, whole, rtol=1e-5)


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_rematerialization_changes_no_loss(single_device, store, remat):
    _, losses = run(tiny(dataclasses.replace(GPT2, remat=remat)), store, mesh_of(1, 1, 1), 5)
    np.testing.assert_allclose(losses, single_device[GPT2][:5], rtol=1e-5)


@pytest.mark.slow
def test_full_rematerialization_holds_less(store):
    """The compiler's own count of temporary bytes; without remat a layer keeps its activations."""

    def temporaries(remat):
        model = dataclasses.replace(GPT2, num_layers=8, remat=remat)
        config, mesh = tiny(model), mesh_of(1, 1, 1)
        with jax.set_mesh(mesh):
            state = placed(jax.eval_shape(lambda: update.init_state(config, 257)), mesh)
            return update.compile_step(config, 257, state, mesh).memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.6 * temporaries("none")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_learns_on_a_mesh_as_on_one_device(store, name):
    rate = {"lion": 1e-3, "adafactor": 3e-3, "muon": 1e-2}.get(name, 3e-3)
    model = dataclasses.replace(LLAMA, embed_dim=128, num_kv_heads=8)  # Adafactor's factored sides are 128 or more
    config = tiny(model, optimizer=OptimizerConfig(name=name, peak_learning_rate=rate, warmup_steps=4))
    _, one = run(config, store, mesh_of(1, 1, 1), 12)
    _, eight = run(config, store, mesh_of(2, 2, 2), 12)
    assert one[-1] < one[0] - 1
    # Lion's update is a sign, and Muon's orthogonalization is iterated: both enlarge the last bit's differences.
    np.testing.assert_allclose(eight, one, rtol=1e-5 if name in ("adamw", "adafactor") else 2e-3)


def test_overfits_one_batch(store):
    config, mesh = tiny(LLAMA, num_steps=100, batch_size=2), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: update.init_state(config, 257))()
        batch = next(loop.train_batches(config, data_of(config, store), mesh, 0))
        for _ in range(100):
            state, metrics = update.train_step(state, batch, config=config, vocab_size=257)
    assert metrics["loss"] < 0.1


def test_a_range_to_profile_of_numbers_that_python_does_not_read():
    with pytest.raises(Refused, match="must be A:B with A < B"):
        loop.profiled("0:" + "9" * 5000, 4)


def test_state_is_born_sharded_and_stays_so(store):
    mesh = mesh_of(2, 2, 2)
    config = tiny(GPT2)
    state, _ = run(config, store, mesh, 1)
    born = jax.tree.map(lambda leaf: leaf.sharding.spec, new_state(config, mesh))
    kept = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
    assert jax.tree.leaves(born) == jax.tree.leaves(kept)
    query = state.model.blocks.query[...]
    assert query.addressable_shards[0].data.size == query.size // 4  # fsdp 2 × tensor 2
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == query.shape]
    assert len(moments) >= 2 and all(leaf.sharding == query.sharding for leaf in moments)


def new_state(config, mesh):
    with jax.set_mesh(mesh):
        return jax.jit(lambda: update.init_state(config, 257))()


@pytest.mark.slow
def test_average_of_weights_follows(store):
    config = tiny(GPT2, optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=4, ema_decay=0.9))
    state, _ = run(config, store, mesh_of(1, 1, 1), 3)
    assert update.weights(state) is state.ema
    # Of decays 1/10, 2/11, 3/12 at the first updates, by hand.
    expected = None
    replay = None
    for step in range(3):
        replay, _ = run(config, store, mesh_of(1, 1, 1), 1, state=replay, start=step)
        weights = np.asarray(replay.model.blocks.query[...])
        if expected is None:
            expected = np.asarray(new_state(config, mesh_of(1, 1, 1)).model.blocks.query[...])
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * weights
    np.testing.assert_allclose(np.asarray(state.ema.blocks.query[...]), expected, rtol=1e-5, atol=1e-7)


GOLDEN = {"gpt2": [5.525353, 5.374754, 5.147986], "llama": [5.566935, 5.433769, 5.238694]}
FIRST_GOLDEN = {"gpt2": [5.569157, 5.374941, 5.184636], "llama": [5.574926, 5.420625, 5.256514]}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"state_dtype": "bfloat16"}, {"offload": True}, {"offload": True, "state_dtype": "bfloat16"},
], ids=str)  # fmt: skip
def test_stored_moments_train_and_stay_where_they_are(single_device, store, changes):
    settings = OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=4, **changes)
    state, losses = run(tiny(GPT2, optimizer=settings), store, mesh_of(1, 2, 1), 12)
    exact = "state_dtype" not in changes
    np.testing.assert_allclose(losses, single_device[GPT2][:12], rtol=1e-5 if exact else 5e-3)
    assert exact or losses[-1] != single_device[GPT2][11]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) >= 2 * len(jax.tree.leaves(state.model))
    assert {str(leaf.dtype) for leaf in moments} == {"float32" if exact else "bfloat16"}
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host" if settings.offload else "device"}


@pytest.mark.slow
def test_bfloat16_parameters_learn_with_float32_moments(store):
    model = dataclasses.replace(GPT2, param_dtype="bfloat16", dropout=0.0)
    state, losses = run(tiny(model, grad_accum_steps=2), store, mesh_of(1, 2, 1), 20)
    assert losses[-1] < losses[0] - 1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.model)} == {jax.numpy.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jax.numpy.dtype("float32")}
