import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import GPT2, LLAMA, mesh_of, run, tiny

from gptjax.checkpoints.manager import CheckpointConfig, Checkpoints
from gptjax.checkpoints.record import RunRecord
from gptjax.errors import Refused
from gptjax.parallel.trees import named_leaves, placed
from gptjax.training import step as update
from gptjax.training.optim.config import OptimizerConfig

RUN = RunRecord({"seed": 3}, "abc")


def abstract(config, mesh):
    with jax.set_mesh(mesh):
        return placed(jax.eval_shape(lambda: update.init_state(config, 257)), mesh)


def equal(one, other):
    one, other = named_leaves(jax.device_get(one)), named_leaves(jax.device_get(other))
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert leaf.dtype == other[name].dtype and leaf.tobytes() == other[name].tobytes(), name


@pytest.fixture(scope="module", params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def saved(request, tmp_path_factory):
    """(folder, config, state) of a state on eight devices, in which no two numbers are alike."""
    config, rng = tiny(request.param), np.random.default_rng(0)
    with jax.set_mesh(mesh_of(2, 2, 2)):
        state = jax.jit(lambda: update.init_state(config, 257))()

    def other(leaf):
        return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    state = dataclasses.replace(jax.tree.map(other, state), step=state.step + 2)
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(2, state, RUN)
    return folder, config, state


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 2, 1), (1, 1, 1)], ids=str)
def test_what_was_saved_comes_back_on_any_mesh(saved, shape):
    folder, config, state = saved
    wanted = abstract(config, mesh_of(*shape))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [2]
        restored = checkpoints.restore(2, wanted)
        described, record = checkpoints.manifest(2), checkpoints.record(2)
    equal(restored, state)
    for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == place.sharding
        assert len(leaf.sharding.device_set) == np.prod(shape)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert record == RUN and described["step"] == 2
    assert set(described["versions"]) == {"gptjax", "jax", "orbax-checkpoint"}


def test_a_part_comes_back_alone(saved):
    folder, config, state = saved
    with Checkpoints(folder) as checkpoints:
        part = checkpoints.restore(2, {"model": abstract(config, mesh_of(1, 1, 1)).model})
    equal(part, {"model": state.model})


def test_no_two_leaves_have_one_name(saved):
    _, _, state = saved
    names = named_leaves(state)
    assert len(names) == len(jax.tree.leaves(state))
    assert {"step", "model.embedding", "model.blocks.value"} <= names.keys()


@pytest.mark.parametrize("config, kept", [
    (CheckpointConfig(keep=2), [5, 6]),
    (CheckpointConfig(keep=1, keep_every=3), [3, 6]),
    (CheckpointConfig(keep=2, keep_every=2), [2, 4, 5, 6]),
])  # fmt: skip
def test_which_stay(tmp_path, config, kept):
    with Checkpoints(tmp_path / "checkpoints", config) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, {"x": jnp.full(3, step)}, RUN)
        checkpoints.wait()
        assert checkpoints.steps() == kept
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:  # a reader of other settings removes nothing
        assert checkpoints.steps() == kept
        here = jax.ShapeDtypeStruct((3,), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        assert checkpoints.restore(kept[0], {"x": here})["x"].tolist() == [kept[0]] * 3
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(kept)


def test_leaving_waits_for_the_save(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(1_000_000)}, RUN)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1]


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    """The save has its own copy before it returns."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jnp.ones(1_000_000)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"x": x}, RUN)
        jax.jit(lambda x: x * 0 + 7, donate_argnums=0)(x).block_until_ready()
        checkpoints.wait()
        restored = checkpoints.restore(1, {"x": jax.ShapeDtypeStruct((1_000_000,), jnp.float32, sharding=here)})
    assert (restored["x"] == 1).all()


@pytest.mark.slow
def test_so_may_moments_that_wait_in_host_memory(store, tmp_path):
    """They are where the copy goes, and still are not the copy themselves."""
    config = tiny(GPT2, optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=4, offload=True))
    mesh = mesh_of(1, 2, 1)
    state, _ = run(config, store, mesh, 1)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, RUN)
        run(config, store, mesh, 1, state=state, start=1)
        checkpoints.wait()
        assert [save.step for save in checkpoints.saved()] == [1]
        with jax.set_mesh(mesh):
            wanted = update.abstract_state(config, 257, mesh)
        equal(checkpoints.restore(1, wanted), expected)


def test_choose(saved, tmp_path):
    folder, _, _ = saved
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.choose(-1) == checkpoints.choose(2) == 2
        with pytest.raises(Refused, match="has no checkpoint of step 7: it has 2."):
            checkpoints.choose(7)
    with Checkpoints(tmp_path / "nothing") as checkpoints:
        assert checkpoints.steps() == []
        with pytest.raises(Refused, match="nothing holds no checkpoint"):
            checkpoints.choose(-1)
    assert not (tmp_path / "nothing").exists()


def test_another_shape_or_a_missing_weight_is_refused(saved):
    folder, config, _ = saved
    mesh = mesh_of(1, 1, 1)
    wider = tiny(dataclasses.replace(config.model, embed_dim=128, head_dim=0, mlp_dim=0))
    averaged = tiny(config.model, optimizer=dataclasses.replace(config.optimizer, ema_decay=0.9))
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(Refused, match=r"step 2 in .*shape \(.*64.*\) for .*, and this config has \(.*128.*\): use"):
            checkpoints.restore(2, abstract(wider, mesh))
        with pytest.raises(Refused, match=r"has no such array for ema\."):
            checkpoints.restore(2, abstract(averaged, mesh))
