"""A run that goes on over other devices, meshes and accumulation: the same global batches, the same losses."""

import shutil

import jax
import pytest
from etils import epath
from support.command import losses as losses_of
from support.runs import recorded, small

from gptjax.checkpoints.manager import CheckpointConfig
from gptjax.parallel.mesh import MeshConfig
from gptjax.training import loop

STEPS = 6


@pytest.fixture
def leg(corpus, tmp_path, monkeypatch):
    """Trains to the end, on so many devices: {step: {row: hash}} of the batches that lay on them, and the losses."""
    devices, train_batches, folder = jax.devices(), loop.train_batches, tmp_path / "run"

    def run(number, mesh, **changes):
        batches = {}
        monkeypatch.setattr(jax, "devices", lambda: devices[:number])
        monkeypatch.setattr(loop, "train_batches", recorded(train_batches, batches.__setitem__))
        keep = CheckpointConfig(keep=STEPS)
        same = dict(num_steps=STEPS, log_every=1, checkpoint_every=1, eval_every=STEPS, checkpoint=keep, num_samples=0)
        loop.train(small(corpus, mesh=mesh, **(same | changes)), epath.Path(folder))
        return batches, losses_of(folder)

    return run


def as_if_killed_after(step, folder):
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / f"step_{later:08}")


@pytest.mark.slow
def test_eight_devices_then_two_then_four(leg, tmp_path):
    batches, losses = leg(8, MeshConfig(2, 2, 2))
    assert {step: len(rows) for step, rows in batches.items()} == dict.fromkeys(range(STEPS), 8)
    assert len({row_hash for rows in batches.values() for row_hash in rows.values()}) > 8 and len(losses) == STEPS
    for step, *there in (
        (2, 2, MeshConfig(1, 1, 2)),
        (4, 4, MeshConfig(4, 1, 1)),
    ):
        as_if_killed_after(step, tmp_path / "run")
        moved = leg(*there, grad_accum_steps=2)
        assert moved[0] == {later: batches[later] for later in range(step, STEPS)}
        assert moved[1] == pytest.approx(losses, rel=1e-5)
