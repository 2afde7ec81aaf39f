"""Steps over tasks, in this process and in others. Imports no JAX, for the workers import this file."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from support.tasks import Step

from gptjax.data.preparation import executor
from gptjax.errors import Failed, Refused


def run(tmp_path, tasks, workers, **more):
    """Returns the sums of the reported counts, and the ids of the processes that did the tasks."""
    reported = []
    (tmp_path / "out").mkdir(exist_ok=True)
    executor.run(
        Step(tmp_path / "out", **more), tasks, workers, epath.Path(tmp_path / "engine"), lambda *n: reported.append(n)
    )
    done = [json.loads((tmp_path / "out" / f"{task}.json").read_text()) for task in range(tasks)]
    assert workers == 1 or not any(imported for _, imported in done)
    return tuple(map(sum, zip(*reported, strict=True))), {pid for pid, _ in done}


@pytest.mark.parametrize("workers", [1, 3])
def test_all_tasks_are_done_and_told(tmp_path, workers, capfd):
    sums, processes = run(tmp_path, 5, workers)
    assert sums == (5, 55, 500)
    assert (os.getpid() in processes) == (workers == 1) and len(processes) <= workers
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_refusal_comes_through(tmp_path, workers, capfd):
    with pytest.raises(Refused, match="task 1 is damaged"):
        run(tmp_path, 3, workers, refuse=1)
    assert capfd.readouterr() == ("", "")
    assert run(tmp_path, 3, workers)


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_is_noticed(tmp_path, by):
    began = time.monotonic()
    with pytest.raises(Failed, match=f"Worker process .* exit code -{by:d} .*: run the same command to resume"):
        run(tmp_path, 4, 2, kill=1, by=by)
    assert time.monotonic() - began < 30
    assert run(tmp_path, 4, 2)[1]


def processes_of(folder):
    """Those that were begun by the program in a folder, workers or not."""
    environments = pathlib.Path("/proc").glob("[0-9]*/environ")
    found = []
    for path in environments:
        with contextlib.suppress(OSError):
            if f"FOLDER={folder}\0".encode() in path.read_bytes():
                found.append(path)
    return found


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_who_waits_for_them(tmp_path, end):
    program = f"""
import pathlib, sys, time
sys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})
from etils import epath
from gptjax.data.preparation import executor
from support import tasks
if __name__ == "__main__":
    executor.run(tasks.Endless(pathlib.Path({str(tmp_path)!r})), 2, 2, epath.Path({str(tmp_path)!r}) / "e", print)
"""
    (tmp_path / "main.py").write_text(program)
    with (tmp_path / "error").open("w") as error:
        main = subprocess.Popen(
            [sys.executable, tmp_path / "main.py"],
            stdout=subprocess.DEVNULL,
            stderr=error,
            env=os.environ | {"FOLDER": str(tmp_path)},
        )
    while len(workers := list(tmp_path.glob("*.pid"))) < 2:
        assert main.poll() is None
        time.sleep(0.05)
    main.send_signal(end)
    main.wait()
    until = time.monotonic() + 30
    while any(pathlib.Path(f"/proc/{worker.stem}").exists() for worker in workers) or processes_of(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.05)
    if end == signal.SIGKILL:  # the other leaves a traceback of this program's own
        assert (tmp_path / "error").read_text() == ""
