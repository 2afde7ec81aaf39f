"""A step that is computed twice, by devices that compute rightly and by one that does not."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from support.command import losses
from support.runs import GPT2, data_of, mesh_of, small, tiny

from gptjax.checkpoints.manager import Checkpoints
from gptjax.errors import Failed
from gptjax.training import loop
from gptjax.training import step as update
from gptjax.training.monitoring import sdc
from gptjax.training.monitoring.rollback import RecoveryConfig
from gptjax.training.optim.config import OptimizerConfig


def flipped(array: jax.Array, device: int) -> jax.Array:
    """The same array, but for one bit of the part that a device holds."""

    def part(shard):
        content = np.array(shard.data)
        if shard.device.id == device:
            content.reshape(-1).view(np.uint8)[0] ^= 1  # the last bit of a float32's fraction
        return jax.device_put(content, shard.data.sharding)

    return jax.make_array_from_single_device_arrays(
        array.shape, array.sharding, [part(shard) for shard in array.addressable_shards]
    )


class Faulty:
    """A compiled step of which a device writes one wrong bit at the call of this number, from 1."""

    def __init__(self, step, call, device):
        self._step, self._left, self._device = step, call, device

    def __call__(self, state, batch):
        state, metrics = self._step(state, batch)
        self._left -= 1
        if not self._left:
            state.model.blocks.query[...] = flipped(state.model.blocks.query[...], self._device)
        return state, metrics

    def __getattr__(self, name):
        return getattr(self._step, name)


@pytest.fixture(scope="module", params=[{}, pytest.param({"offload": True}, marks=pytest.mark.slow)], ids=str)
def compiled(request, store):
    """(config, mesh, step, state, batch)"""
    config, mesh = tiny(GPT2, optimizer=OptimizerConfig(warmup_steps=4, **request.param)), mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: update.init_state(config, 257))()
        step = update.compile_step(config, 257, state, mesh)
        return config, mesh, step, next(loop.train_batches(config, data_of(config, store), mesh, 0))


def new_state(config, mesh):
    with jax.set_mesh(mesh):
        return jax.jit(lambda: update.init_state(config, 257))()


def test_twice_is_once(compiled):
    config, mesh, step, batch = compiled
    expected, metrics = step(new_state(config, mesh), batch)
    found, again = sdc.twice(step, new_state(config, mesh), batch)
    assert not sdc.differences((expected, metrics), (found, again))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.sharding == other.sharding


@pytest.mark.parametrize("call", [1, 2])
def test_a_wrong_bit_names_the_device_its_host_and_the_array(compiled, call, monkeypatch):
    monkeypatch.setattr(sdc.socket, "gethostname", lambda: "tpu-7")
    config, mesh, step, batch = compiled
    words = r"Step 1, .* on device 5 \(process 0, host tpu-7\), in model.blocks.query: take it out"
    with pytest.raises(Failed, match=words):
        sdc.twice(Faulty(step, call, 5), new_state(config, mesh), batch)


def test_of_what_reached_all_devices_it_says_so(compiled):
    config, mesh, step, batch = compiled
    other = batch._replace(inputs=batch.targets)
    calls = iter((batch, other))
    with pytest.raises(Failed, match="a sum over devices spread the error to all"):
        sdc.twice(lambda state, _: step(state, next(calls)), new_state(config, mesh), batch)


@pytest.mark.slow
def test_a_run_stops_before_it_saves(corpus, tmp_path, monkeypatch):
    """Of 6 steps each third is checked and each second saved: the fault of step 6, its second time, is call 8."""
    honest = update.compile_step
    monkeypatch.setattr(loop, "compile_step", lambda *arguments: Faulty(honest(*arguments), 8, 3))
    config = small(corpus, log_every=1, recovery=RecoveryConfig(sdc_check_every=3))
    with pytest.raises(Failed, match="Step 6, .* device 3 "):
        loop.train(config, epath.Path(tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [2, 4]
    monkeypatch.undo()
    loop.train(config, epath.Path(tmp_path / "run"))
    loop.train(dataclasses.replace(config, recovery=RecoveryConfig()), epath.Path(tmp_path / "plain"))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
