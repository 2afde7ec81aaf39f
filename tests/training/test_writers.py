"""Rows in metrics.jsonl and TensorBoard, where there is place for them and where there is none."""

import contextlib
import json
import resource
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from etils import epath
from support.command import rows
from tensorboardX.proto.event_pb2 import Event

from gptjax.training.monitoring.writers import Writers


def events(folder):
    """Of each file its events, read as TensorBoard reads them."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            if len(content) < 16 + length:
                break  # a last record that is cut is passed over
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


@contextlib.contextmanager
def files_of_at_most(size):
    """What a full disk is to a writer: the kernel takes a part of what it is given, and then no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_and_events(tmp_path):
    threads = threading.active_count()
    writers = Writers(epath.Path(tmp_path), 4, None)
    writers.write({"step": 5, "loss": 0.5, "mfu": None, "note": "text"})
    assert threading.active_count() == threads, "one may die, and then nobody takes what is put for it"
    writers.close()
    (row,) = rows(tmp_path)
    assert abs(row.pop("time") - time.time()) < 60 and row == {"step": 5, "loss": 0.5, "mfu": None, "note": "text"}
    version, start, event = events(tmp_path)
    assert version.file_version == "brain.Event:2" and (start.step, start.session_log.status) == (5, 1)
    assert event.step == 5 and [(value.tag, value.simple_value) for value in event.summary.value] == [("loss", 0.5)]


def test_a_full_disk_is_one_warning_and_cuts_no_row(tmp_path):
    printed = []
    writers = Writers(epath.Path(tmp_path), 0, SimpleNamespace(print=printed.append))
    with files_of_at_most(1000):
        for step in range(1, 2000):
            writers.write({"step": step, "loss": 1 / step})
        writers.flush()
    for step in range(2000, 2010):
        writers.write({"step": step, "loss": 1 / step})
    writers.close()
    assert len(printed) == 2 and all("; the run goes on without it" in line for line in printed)
    assert "metrics.jsonl can't be written (OSError: [Errno 27]" in printed[0] and "tensorboard can't" in printed[1]
    assert max(event.step for event in events(tmp_path)) < 2000, "after half a record"
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-10:] == list(range(2000, 2010)) and len(steps) > 50


def test_a_file_instead_of_the_folder(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    printed = []
    writers = Writers(epath.Path(tmp_path), 0, SimpleNamespace(print=printed.append))
    for step in (1, 2):
        writers.write({"step": step, "loss": 1.0})
        writers.flush()
    writers.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    (line,) = printed
    assert line.startswith(f"warning: {tmp_path}/tensorboard can't be written (NotADirectoryError: ")


def test_a_failure_while_starting_keeps_the_old_rows(tmp_path):
    old = "".join(json.dumps({"step": step, "text": "x" * 100}) + "\n" for step in range(20))
    (tmp_path / "metrics.jsonl").write_text(old)
    printed = []
    with files_of_at_most(1000):
        writers = Writers(epath.Path(tmp_path), 9, SimpleNamespace(print=printed.append))
        assert [row["step"] for row in writers.rows] == list(range(10))
        writers.write({"step": 10, "loss": 1.0})
        writers.close()
    assert len(printed) == 1 and (tmp_path / "metrics.jsonl").read_text() == old


@pytest.mark.parity
def test_no_start_pays_for_torch():
    script = "import sys, gptjax.training.loop; assert 'torch' not in sys.modules; import torch"
    subprocess.run([sys.executable, "-c", script], check=True)
