"""Checkpoints in folders whose names libraries take for patterns or URLs, and of owners whom no database knows."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from gptjax.checkpoints import chunked, inspection, manifest, verification
from gptjax.checkpoints.manager import Checkpoints
from gptjax.checkpoints.record import RunRecord
from gptjax.errors import Failed, Refused

RUN = RunRecord({"seed": 3}, "abc")
NAMES = ["exp [lr=3e-4]", "a*b?", "50%20x", "w#1?y", "~"]
STATE = {"x": jnp.arange(6.0).reshape(2, 3)}
WANTED = {"x": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=STATE["x"].sharding)}


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_comes_back(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, STATE, RUN)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest() == 1
        np.testing.assert_array_equal(checkpoints.restore(1, WANTED)["x"], STATE["x"])
    assert sorted(os.listdir(tmp_path)) == [name]
    array = chunked.read(epath.Path(folder) / "step_00000001/state", "x", (2, 3))
    np.testing.assert_array_equal(array.read().result(), STATE["x"])


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_written_in_the_named_folder(tmp_path, name):
    state = epath.Path(tmp_path / name / "checkpoints/step_00000000/state")
    array = chunked.create(state, "x", (2, 3), "float32", (0, 1))
    chunked.write(array, (slice(0, 2), slice(0, 3)), np.asarray(STATE["x"]))
    chunked.seal(state.parent.parent, 0, RUN, {"x": array})
    assert sorted(os.listdir(tmp_path)) == [name] and (state / "x" / ".zarray").exists()
    with Checkpoints(state.parent.parent) as checkpoints:
        assert checkpoints.choose(0) == 0
        np.testing.assert_array_equal(checkpoints.restore(0, WANTED)["x"], STATE["x"])


def test_verification_finds_what_a_restore_would_miss(tmp_path, capsys):
    """A store without its database, as a merge that found no files left it: each file has its hash."""
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, STATE, RUN)
    step = epath.Path(folder) / "step_00000001"
    assert verification.damage(step, 1) == ""
    content = manifest.read(step, 1)
    for change in ("database", "shape", "name"):
        changed = {name: value for name, value in content.items() if name != "sha256"}
        if change == "database":
            (step / "state/manifest.ocdbt").rename(tmp_path / "moved")
        arrays = {"shape": {"x": content["arrays"]["x"] | {"shape": [3, 2]}}, "name": {"y": content["arrays"]["x"]}}
        changed["arrays"] = arrays.get(change, content["arrays"])
        manifest.write(step, changed | {"files": manifest.digests(step, manifest.stored(step))})
        found = verification.damage(step, 1)
        assert ("has shape [2, 3]" if change == "shape" else "can't be opened") in found, change
        if change == "database":
            (tmp_path / "moved").rename(step / "state/manifest.ocdbt")
        else:
            with pytest.raises(Failed):
                inspection.verify(epath.Path(tmp_path), -1)
            assert f"step 1: {found}" in capsys.readouterr().out


def test_the_owner_does_not_matter(tmp_path):
    if os.geteuid():
        pytest.skip("only root can give a file to another owner")
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, STATE, RUN)
    for where, folders, files in os.walk(tmp_path):
        for name in (*folders, *files):
            os.chown(os.path.join(where, name), 54321, 54321)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest() == 1
        np.testing.assert_array_equal(checkpoints.restore(1, WANTED)["x"], STATE["x"])
        checkpoints.save(2, STATE, RUN)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_a_pattern_on_a_bucket_is_refused():
    with pytest.raises(Refused, match=r"--workdir=gs://bucket/a\[b\] must be a path on a bucket without"):
        Checkpoints(epath.Path("gs://bucket/a[b]/checkpoints"))
