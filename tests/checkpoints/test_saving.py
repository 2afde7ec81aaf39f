"""Saves that fail, for real: a full disk, one that is read-only, a limit on a file's size. And memory over many."""

import contextlib
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from support.command import environment, losses, rows, training, tree
from support.disks import filled

from gptjax.checkpoints import manifest, retention
from gptjax.checkpoints.async_save import Save
from gptjax.checkpoints.manager import CheckpointConfig, Checkpoints
from gptjax.checkpoints.record import RunRecord
from gptjax.errors import Refused
from gptjax.training import workdir

RUN = RunRecord({"seed": 3})
MEGABYTE = 1_000_000


def state(step, size=MEGABYTE):
    """About `size` bytes that can't be compressed."""
    return {"x": jnp.asarray(np.frombuffer(np.random.default_rng(step).bytes(size), np.uint8))}


def verified(folder):
    """The steps that verify; of others there are no files left but for the mark."""
    steps, left = retention.found(epath.Path(folder))
    assert {path.name for path in folder.iterdir()} == {f"step_{step:08}" for step in steps} | {
        path.name for path in left
    }
    for path in left:
        assert [file.name for file in pathlib.Path(path).rglob("*") if file.is_file()] == [retention.UNFINISHED]
    for step in steps:
        manifest.verify(epath.Path(folder) / f"step_{step:08}", step)
    return steps


@contextlib.contextmanager
def no_file_beyond(size):
    """Writing past `size` bytes of a file fails, as EFBIG; needs no privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_older_checkpoint(disk, capsys):
    folder = disk / "checkpoints"
    with Checkpoints(folder, CheckpointConfig(keep=1)) as checkpoints:
        checkpoints.save(1, state(1), RUN)
        checkpoints.wait()
        ballast = filled(disk, left=MEGABYTE // 2)
        for step in (2, 3):
            checkpoints.save(step, state(step), RUN)
            checkpoints.wait()
            error = capsys.readouterr().err
            assert f"warning: the checkpoint of step {step} was not saved in {folder}: " in error
            assert "No space left on device" in error and error.count("\n") == 1
            assert verified(folder) == [1]
        ballast.unlink()
        checkpoints.save(4, state(4), RUN)
        checkpoints.wait()
        assert [saved.step for saved in checkpoints.saved()] == [1, 4] and capsys.readouterr().err == ""
    assert verified(folder) == [4]


def test_a_disk_that_has_become_read_only(disk, capsys):
    folder = disk / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state(1), RUN)
        checkpoints.wait()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        checkpoints.save(2, state(2), RUN)
        checkpoints.wait()
        assert "step 2 was not saved" in (error := capsys.readouterr().err) and "Read-only file system" in error
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        checkpoints.insist(3, state(3), RUN)
    assert verified(folder) == [1, 3]


def test_a_failure_in_the_background_needs_no_privilege(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state(1), RUN)
        checkpoints.wait()
        with no_file_beyond(MEGABYTE // 2):
            checkpoints.save(2, state(2), RUN)
            checkpoints.wait()
        assert "step 2 was not saved" in (error := capsys.readouterr().err) and "File too large" in error
        assert verified(folder) == [1]
        checkpoints.save(2, state(2), RUN)
    assert verified(folder) == [1, 2]


class Outage(Exception):
    """As those of gcsfs and google-auth, which are no OSError."""


@pytest.fixture
def outage(monkeypatch):
    """A block in which a method of all paths fails as on a bucket that can't be reached."""

    @contextlib.contextmanager
    def outage(method):
        def fail(*_, **__):
            raise Outage("503")

        with monkeypatch.context() as patch:
            patch.setattr(type(epath.Path("/")), method, fail)
            yield

    return outage


@pytest.mark.parametrize("method", ["mkdir", "iterdir", "touch", "replace"])
def test_an_outage_of_a_bucket_is_a_warning_and_a_retry(outage, tmp_path, capsys, method):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state(1), RUN)
        checkpoints.wait()
        with outage(method):
            checkpoints.save(2, state(2), RUN)
            checkpoints.wait()
        error = capsys.readouterr().err
        assert "step 2 was not saved" in error and "503" in error and error.count("\n") == 1
        checkpoints.save(3, state(3), RUN)
    assert verified(folder) == [1, 3]


def test_an_outage_while_rotating_costs_nothing(outage, tmp_path, capsys, monkeypatch):
    raised, real = [], retention.rotate

    def rotate(*args):
        with outage("rmtree"):
            real(*args)

    monkeypatch.setattr(threading, "excepthook", raised.append)
    monkeypatch.setattr(retention, "rotate", rotate)
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=1)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), RUN)
            checkpoints.wait()
        assert checkpoints.newest() == 2 and not raised
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "can't be tidied up (Outage: 503)" in printed


@pytest.mark.parametrize("method, words", [
    ("open", r"of step 1 in \S+ may be whole, but manifest.json can't be read \(Outage: 503\): make it readable"),
    ("walk", r"of step 1 in \S+ may be whole, but state can't be read \(Outage: 503\): make it readable"),
    ("iterdir", r"checkpoints can't be read \(Outage: 503\)"),
])  # fmt: skip
def test_an_outage_before_a_run_begins_is_a_refusal(outage, tmp_path, method, words):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state(1), RUN)
        checkpoints.wait()
        with outage(method), pytest.raises(Refused, match=words):
            checkpoints.newest()
        with outage(method):
            if method == "open":
                with pytest.raises(Refused, match=r"of step 1 in .*, manifest.json can't be read \(Outage: 503\)"):
                    checkpoints.record(1)
            else:
                assert checkpoints.record(1).config == RUN.config
        with outage("unlink"), pytest.raises(Refused, match=r"step_00000001 can't be removed \(Outage: 503\)"):
            checkpoints.remove_after(0)


def test_an_outage_of_what_was_logged_is_a_refusal(outage, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "eval_loss": 1.5}\n')
    assert workdir.losses(epath.Path(tmp_path)) == {2: 1.5}
    for read in (workdir.losses, workdir.read_rows):
        with outage("open"), pytest.raises(Refused, match=r"metrics.jsonl can't be read \(Outage: 503\)"):
            read(epath.Path(tmp_path))


def test_a_failed_save_is_tried_again_after_1_2_4_8_steps(tmp_path):
    tried = []
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        (tmp_path / "checkpoints").write_text("a file where the folder is made")
        for step in range(10, 50):
            if step == 10 or checkpoints.failed(step):
                tried.append(step)
                checkpoints.save(step, {"x": jnp.zeros(3)}, RUN)
            if step == 40:
                (tmp_path / "checkpoints").unlink(missing_ok=True)
            for save in filter(lambda thread: isinstance(thread, Save), threading.enumerate()):
                save.join()  # it has ended by the next step
        assert tried == [10, 11, 13, 17, 25, 41]
        checkpoints.insist(49, {"x": jnp.zeros(3)}, RUN)
    assert verified(tmp_path / "checkpoints") == [41]


def test_a_save_in_the_way_of_none_is_replaced_by_none(tmp_path, capsys):
    """The same step again: what is there is kept beside, and is not removed with a save that fails."""
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state(1), RUN)
        checkpoints.save(1, state(2), RUN)
    assert f"moved the checkpoint of step 1 aside, to {folder}/step_00000001.replaced" in capsys.readouterr().err
    assert (folder / "step_00000001.replaced/manifest.json").exists() and Checkpoints(folder).newest() == 1


def with_its_checkpoints_on(disk, folder):
    (folder / "checkpoints").rename(folder / "elsewhere")
    shutil.copytree(folder / "elsewhere", disk / "checkpoints")
    (folder / "checkpoints").symlink_to(disk / "checkpoints")


@pytest.mark.slow
def test_an_unsaved_end_is_a_failure_and_the_command_again_mends_it(disk, gptjax_main, corpus, finished, tmp_path):
    folder = tmp_path / "run"
    assert gptjax_main(*training(corpus, folder, "--config.num_steps=2"))[0] == 0
    with_its_checkpoints_on(disk, folder)
    before = tree(disk)
    ballast = filled(disk)
    code, out, error = gptjax_main(*training(corpus, folder))
    assert code == 1 and "held-out loss" in out
    assert (
        f"gptjax: The state of step 4 could not be saved in {folder}/checkpoints, as the warnings say: make room "
        "there, and run the same command again to go on from the last checkpoint.\n"
    ) in error
    assert error.count("the checkpoint of step 4 was not saved") == error.count("No space left on device;") == 4
    ballast.unlink()
    assert {path: digest for path, digest in tree(disk).items() if path in before} == before
    assert verified(disk / "checkpoints") == [2] and error.count("aside") == 0
    assert gptjax_main(*training(corpus, folder))[0] == 0
    assert losses(folder) == losses(finished)


@pytest.mark.slow
def test_a_run_outlives_a_disk_that_is_full_for_a_while(disk, gptjax_main, corpus, tmp_path):
    """It has room again when the first warning comes; the next try is a step later, or a few."""
    folder = tmp_path / "run"
    assert gptjax_main(*training(corpus, folder, "--config.num_steps=2"))[0] == 0
    with_its_checkpoints_on(disk, folder)
    ballast = filled(disk)
    argv = training(corpus, folder, "--config.checkpoint_every=400", "--config.eval_every=5000")
    argv = [sys.executable, "-m", "gptjax", *argv, "--config.num_steps=800"]
    process = subprocess.Popen(argv, env=environment(1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert "step 400 was not saved" in process.stderr.readline()
        ballast.unlink()
        error = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 0, error
    saves = [row["step"] for row in rows(folder) if "save_seconds" in row]
    assert saves[0] == 2 and 400 < saves[1] < 700 and saves[2] == 800, saves


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="it is read from /proc")
def test_memory_stays_over_two_hundred_saves(tmp_path):
    """After the last at most 5 % more than after the tenth; in a process that does nothing else, where a leak shows."""
    code = """
import pathlib, sys
import jax.numpy as jnp
from gptjax.checkpoints.manager import Checkpoints
from gptjax.checkpoints.record import RunRecord
with Checkpoints(sys.argv[1]) as checkpoints:
    for step in range(1, 201):
        checkpoints.save(step, {name: jnp.full(250_000, step) for name in "abcd"}, RunRecord({}))
        checkpoints.wait()
        if 5 < step <= 15 or step > 190:
            print(int(pathlib.Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]))
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "checkpoints")]
    done = subprocess.run(argv, env=environment(1), capture_output=True, text=True, check=True)
    found = [int(word) for word in done.stdout.split()]
    tenth, last = statistics.median(found[:10]), statistics.median(found[10:])  # of the ten about each
    print(f"\nafter save 10 {tenth / 1e3:,.0f} MB, after save 200 {last / 1e3:,.0f} MB")
    assert last < 1.05 * tenth
