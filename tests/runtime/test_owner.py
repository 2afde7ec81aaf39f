import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from gptjax.checkpoints import inspection
from gptjax.data.preparation import prepare
from gptjax.errors import Refused
from gptjax.runtime import distributed, lock
from gptjax.training import corpus
from gptjax.training.config.schema import Config

HOLD = """
import sys
from etils import epath
from gptjax.runtime import distributed
with distributed.owned(epath.Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that owns the workdir."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_with_the_first_ones_host_and_process(other, tmp_path):
    folder = epath.Path(tmp_path / "run")
    said = f"{folder} belongs to a run on host {socket.gethostname()}, process {other.pid}: wait"
    with pytest.raises(Refused, match=re.escape(said)), distributed.owned(folder):
        pass
    assert json.loads((folder / "owner.json").read_text())["pid"] == other.pid
    other.stdin.close()  # it ends by itself
    other.wait()
    with distributed.owned(folder):
        assert json.loads((folder / "owner.json").read_text())["pid"] == os.getpid()


def test_the_lock_of_a_killed_run_is_stale(other, tmp_path):
    other.kill()
    other.wait()
    folder = epath.Path(tmp_path / "run")
    assert (folder / "owner.json").exists()
    with distributed.owned(folder):
        assert json.loads((folder / "owner.json").read_text())["pid"] == os.getpid()
    assert not (folder / "owner.json").exists()


def test_a_folder_that_nothing_was_written_to_does_not_stay(tmp_path):
    folder = epath.Path(tmp_path / "new" / "run")
    with pytest.raises(Refused), distributed.owned(folder):
        assert folder.exists()
        raise Refused("what was found later")
    assert not (tmp_path / "new").exists() and tmp_path.exists()


def test_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(Refused, match="owner.json can't be written"),
        distributed.owned(epath.Path(tmp_path / "file" / "run")),
    ):
        pass


def test_without_locks_an_owner_is_alive_as_long_as_it_beats(tmp_path, monkeypatch):
    """As on a bucket."""
    monkeypatch.setattr(lock, "_flock", lambda path: None)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(lock.beating, "__defaults__", (0.5,))
    folder, stop = epath.Path(tmp_path), threading.Event()
    (folder / "hosts").mkdir()
    (folder / "owner.json").write_text('{"host": "far", "pid": 7}')

    def beat():
        while not stop.wait(0.05):
            (folder / "hosts" / "0.json").write_text(str(time.time()))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(Refused, match="on host far, process 7"), distributed.owned(folder):
        pass
    stop.set()
    thread.join()
    with distributed.owned(folder):
        assert json.loads((folder / "owner.json").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_of_two_that_start_together_without_locks_one_is_refused(tmp_path, monkeypatch, number):
    """Both find no owner.json; who wrote last stays."""
    path = tmp_path / "run" / "owner.json"

    def flock(*_):
        raise OSError(number, os.strerror(number))

    def wait(seconds):
        assert json.loads(path.read_text())["pid"] == os.getpid() and seconds == lock.SETTLE_SECONDS
        path.write_text('{"host": "far", "pid": 7}')

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    monkeypatch.setattr(lock.time, "sleep", wait)
    monkeypatch.setattr(lock, "beating", lambda folder: False)
    with (
        pytest.raises(Refused, match="belongs to a run on host far, process 7"),
        distributed.owned(epath.Path(path.parent)),
    ):
        pass
    assert json.loads(path.read_text())["pid"] == 7


def test_a_start_on_a_bucket_does_not_ask_for_all_buckets(monkeypatch):
    """`gs://` itself is among the parents of `gs://bucket/run`, and to list it takes rights that nobody has."""
    folder, asked = epath.Path("gs://bucket/run"), []

    def refuse(*_):
        raise Refused("the text")

    monkeypatch.setattr(type(folder), "exists", lambda path: asked.append(str(path)))
    monkeypatch.setattr(type(folder), "unlink", lambda path, missing_ok: None)
    monkeypatch.setattr(lock, "_lock", lambda *_: None)
    monkeypatch.setattr(prepare, "prepared", refuse)
    with pytest.raises(Refused, match="the text"), distributed.owned(folder):
        corpus.make_corpus(Config(), folder)
    assert all(path.startswith("gs://bucket/run/") for path in asked), asked


def test_nothing_is_pruned_under_a_run(other, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000001" / "state").mkdir(parents=True)
    with pytest.raises(Refused, match=f"belongs to a run on host .*, process {other.pid}"):
        inspection.prune(epath.Path(tmp_path / "run"), 1, dry_run=False, config={}, losses={})
