"""Every kind of damage to a checkpoint, and what happens then.

`pytest tests/checkpoints/test_damage.py -n0 -s | grep '|'` prints the table.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from support.command import training, tree

from gptjax.checkpoints import manifest
from gptjax.checkpoints.manager import Checkpoints
from gptjax.checkpoints.record import RunRecord
from gptjax.errors import Refused

RUN = RunRecord({"seed": 3}, "abc")
NEWEST = "step_00000004"
# One path of each kind of file that a checkpoint has, by what orbax names it.
KINDS = (
    "manifest.json",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "state/manifest.ocdbt",
    "state/d/*",
    "state/ocdbt.process_0/manifest.ocdbt",
    "state/ocdbt.process_0/d/*",
)


def state(step):
    return {"x": jnp.arange(3000.0) * step, "y": jnp.full((8, 8), step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of the checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("damage") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state(step), RUN)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def made_a_folder(path):
    path.unlink()
    path.mkdir()


def linked(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def rewritten(step, **changes):
    """Its manifest, changed by somebody who knows how to hash it."""
    content = json.loads((step / "manifest.json").read_text())
    del content["sha256"]
    manifest.write(epath.Path(step), content | changes)


def naming(step, path):
    files = json.loads((step / "manifest.json").read_text())["files"]
    rewritten(step, files=files | {path: files.popitem()[1]})


def emptied(step):
    shutil.rmtree(step)
    step.mkdir()


def half_finished(step):
    (step / "manifest.json").unlink()
    (step / "unfinished").touch()


FILES = {
    "cut short": (cut, "bytes of|damaged"),
    "missing": (os.unlink, "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "bytes of|damaged"),
    "a folder": (made_a_folder, "is not a file|is missing"),
}
FOLDERS = {
    "an empty folder": (emptied, None),  # nothing is passed over, as by a kill
    "a half-finished save": (half_finished, None),
    "a folder without state": (lambda step: shutil.rmtree(step / "state"), "is missing"),
    "a file too many": (lambda step: (step / "state/checkpoint").write_text("x"), "'state/checkpoint' is not in"),
    "a file that would clear the screen": (lambda step: (step / "state/\x1b[2J").touch(), r"'state/\x1b[2J' is not in"),
    "a link in place of a file": (lambda step: linked(step / "state/_METADATA"), "state/_METADATA is a link"),
    "a link in place of a folder": (lambda step: linked(step / "state/d"), "is a link"),
    "manifest of another step": (lambda step: shutil.copy(step.parent / "step_00000002/manifest.json", step),
                                 "of step 2"),
    "manifest of another save": (lambda step: rewritten(step, files={}), "is not in manifest.json"),
    "manifest of another format": (lambda step: rewritten(step, format=2), "is of format 2, and this gptjax reads 1"),
    "manifest of no form": (lambda step: rewritten(step, arrays=[1]), "does not have the form"),
    "manifest without a hash": (lambda step: (step / "manifest.json").write_text('{"step": 4}'),
                                "does not match its hash"),
    "manifest that is no JSON": (lambda step: (step / "manifest.json").write_text("[" * 100_000),
                                 "does not match its hash"),
    "a path that leaves the folder": (lambda step: naming(step, "state/../../x"), "which is not in its state"),
    "an absolute path": (lambda step: naming(step, "/etc/passwd"), "names /etc/passwd, which is not in its state"),
}  # fmt: skip


def report(kind, what):
    print(f"\n{kind} | {what}")


def restored(checkpoints, step):
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(step)
    )
    return checkpoints.restore(step, wanted)


def goes_on_from_2(folder, capsys, words):
    """The damaged checkpoint of step 4 is named, nothing is lost, and step 4 can be saved again."""
    before = tree(folder)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest() == 2
        assert (restored(checkpoints, 2)["x"] == state(2)["x"]).all()
        assert tree(folder) == before
        error = capsys.readouterr().err
        if words is None:
            assert error == ""
        else:
            assert f"passed over the checkpoint of step 4 in {folder}: " in error and "\n" == error[-1]
        checkpoints.save(4, state(4), RUN)
    assert Checkpoints(folder).newest() == 4
    assert capsys.readouterr().err.count("aside") == (words is not None)
    aside = folder / f"{NEWEST}.damaged"
    assert aside.exists() == (words is not None)
    if aside.exists():
        assert sorted(tree(aside).values(), key=str) == sorted(
            [digest for path, digest in before.items() if folder / NEWEST in path.parents], key=str
        )
    return error.strip().rpartition("checkpoints: ")[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file(folder, capsys, kind, damage):
    spoil, words = FILES[damage]
    for path in sorted((folder / NEWEST).glob(kind)):
        spoil(path)
    reason = goes_on_from_2(folder, capsys, words)
    assert any(word in reason for word in words.split("|"))
    report(f"{kind}: {damage}", f"passed over: {reason}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_anywhere(folder, kind):
    paths = sorted((folder / NEWEST).glob(kind))
    assert paths
    tried = 0
    for path in paths:
        size = path.stat().st_size
        for position in sorted({0, size - 1, *range(0, size, -(-size // 12))}):
            flip(path, position)
            with pytest.raises(manifest.Damaged) as damage:
                manifest.verify(epath.Path(folder / NEWEST), 4)
            flip(path, position)
            tried += 1
    manifest.verify(epath.Path(folder / NEWEST), 4)
    report(f"{kind}: a flipped bit at {tried} places", f"passed over: {damage.value}")


def test_there_is_no_other_kind_of_file(folder):
    named = {path for kind in KINDS for path in (folder / NEWEST).glob(kind)}
    assert named == {path for path in (folder / NEWEST).rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", FOLDERS)
def test_a_damaged_folder(folder, capsys, damage):
    spoil, words = FOLDERS[damage]
    spoil(folder / NEWEST)
    reason = goes_on_from_2(folder, capsys, words)
    assert (words or "") in reason
    report(damage, f"passed over: {reason}" if words else "cleared away by the next save")


@contextlib.contextmanager
def nobody():
    """A block in which root is nobody: root reads everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["manifest.json", "state/_METADATA", "state"])
def test_what_may_not_be_read(saved, name):
    """An error while looking is no damage: the run waits for a mended permission, and nothing is renamed."""
    with tempfile.TemporaryDirectory() as where:  # nobody comes through pytest's own
        os.chmod(where, 0o755)
        folder = shutil.copytree(saved, f"{where}/checkpoints")
        unreadable = pathlib.Path(folder) / NEWEST / name
        unreadable.chmod(0)
        before = sorted(os.listdir(folder))
        with nobody(), pytest.raises(Refused) as refusal:
            Checkpoints(folder).newest()
        unreadable.chmod(0o700)
        assert sorted(os.listdir(folder)) == before and Checkpoints(folder).newest() == 4
    report(f"{name}: no permission", refusal.value)
    assert "of step 4 in " in str(refusal.value) and "can't be read (Permission denied): make it" in str(refusal.value)


def test_when_none_can_be_used_the_run_is_refused(folder):
    cut(folder / NEWEST / "state/_METADATA")
    (folder / "step_00000002/manifest.json").unlink()
    before = tree(folder)
    with pytest.raises(Refused) as refusal, Checkpoints(folder) as checkpoints:
        checkpoints.newest()
    report("all damaged", refusal.value)
    assert "None of the 2 checkpoints" in str(refusal.value) and tree(folder) == before
    assert "of step 4, state/_METADATA has " in str(refusal.value)
    assert "of step 2, manifest.json is missing" in str(refusal.value)


def test_a_second_damaged_one_of_a_step_gets_a_name_of_its_own(folder):
    (folder / f"{NEWEST}.damaged").mkdir()
    cut(folder / NEWEST / "state/_METADATA")
    with Checkpoints(folder) as checkpoints:
        checkpoints.newest()
        checkpoints.save(5, state(5), RUN)
    assert (folder / f"{NEWEST}.damaged2/manifest.json").exists()
    assert Checkpoints(folder).steps() == [2, 5]


# In a run


def test_a_run_whose_checkpoints_are_all_damaged(refused, corpus, copied):
    for path in (copied / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    assert "None of the 2 checkpoints" in refused(copied, *training(corpus, copied, "--config.num_steps=6"))


@pytest.mark.parametrize("leave", [[], ["step_00000004"]])
def test_a_run_that_lost_its_checkpoints(refused, corpus, copied, leave):
    """Never silently from the beginning, whether their folders are gone or empty."""
    shutil.rmtree(copied / "checkpoints")
    for name in leave:
        (copied / "checkpoints" / name).mkdir(parents=True)
    message = refused(copied, *training(corpus, copied, "--config.num_steps=6"))
    report("no checkpoint where there was one", message)
    assert "holds no checkpoint, but metrics.jsonl says that this run saved step 4" in message


def test_a_checkpoint_of_another_run(refused, corpus, copied):
    step = copied / "checkpoints" / NEWEST
    config = json.loads((step / "manifest.json").read_text())["config"]
    rewritten(step, config=config | {"seed": 7})
    message = refused(copied, *training(corpus, copied, "--config.num_steps=6"))
    report("manifest of another run", message)
    assert "belongs to a run of another config: seed (7 there, 0 here)" in message


def test_fresh_needs_an_empty_workdir(refused, gptjax_main, corpus, copied, tmp_path):
    message = refused(copied, *training(corpus, copied, "--fresh"))
    assert f"--fresh begins a run in an empty --workdir, and {copied} holds checkpoints, config.json, " in message
    (tmp_path / "new").mkdir()
    assert gptjax_main(*training(corpus, tmp_path / "new", "--fresh"))[0] == 0
