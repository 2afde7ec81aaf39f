"""Runs of several real processes, of which one is killed, stopped, stuck, or asked to end; and what judges them."""

import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from support.command import environment, long_run, losses
from support.ports import free_port

from gptjax.errors import Refused
from gptjax.runtime import heartbeat, watchdog
from gptjax.runtime.heartbeat import Beat
from gptjax.runtime.watchdog import WatchdogConfig
from gptjax.training.monitoring import status

SILENT = 4
DEVICES = 4  # of all processes together
STEPS = 30
SMALL = (
    f"--config.num_steps={STEPS}",
    "--config.checkpoint_every=5",
    f"--config.eval_every={STEPS}",
    "--config.num_samples=0",
    "--config.model.num_layers=1",
    "--config.mesh.data=4",
    "--config.mesh.fsdp=1",
)


# The command, but each process keeps what it compiled, and not process 0 alone; one may hang in the midst of its data.
PROGRAM = """
import sys, time
from jax._src import compiler
from gptjax.cli import main
from gptjax.training import loop
real_write, real_batches = compiler._cache_write, loop.train_batches
def write(*args):
    state = compiler.distributed.global_state
    process, state.process_id = state.process_id, 0
    real_write(*args)
    state.process_id = process
def batches(*args):
    for number, batch in enumerate(real_batches(*args)):
        time.sleep(1000 if number == HANGS_AT else 0)
        yield batch
compiler._cache_write, loop.train_batches = write, batches
main.main()
"""


def start(number: int, corpus, folder, *more: str, hangs: int = -1) -> list[subprocess.Popen]:
    """A long run in so many processes, which divide the devices; one may hang before its eighth step."""
    port, started = free_port(), []
    for process in range(number):
        variables = environment(DEVICES // number) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        flags = long_run(corpus, folder, *SMALL, f"--config.watchdog.silent_seconds={SILENT}", *more)[3:]
        if number > 1:
            flags += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={number}", f"--process_id={process}"]
        program = PROGRAM.replace("HANGS_AT", "7" if process == hangs else "-1")
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen([sys.executable, "-c", program, *flags], env=variables, **pipes))
    return started


def past(folder: pathlib.Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Waits until a run has logged a step."""
    deadline, path = time.monotonic() + 240, folder / "metrics.jsonl"
    while not (path.exists() and f'{{"step": {step}, "loss"' in path.read_text()):
        ended = [process.communicate() for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, ended
        time.sleep(0.002)


def ended(processes: list[subprocess.Popen], timeout: float) -> list[tuple[int, str]]:
    """Exit code and stderr of each, all within so many seconds."""
    deadline = time.monotonic() + timeout
    try:
        texts = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):
    """The losses of a run in two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("two") / "run"
    assert [code for code, _ in ended(start(2, corpus, folder), 240)] == [0, 0]
    assert not (folder / "hosts").exists()
    return losses(folder)


def lost(number: int, victim: int, how: signal.Signals, step: int, corpus, folder) -> list[str]:
    """Starts a run and does that to one process; what the others, which must end with 75 soon, say."""
    processes = start(number, corpus, folder)
    past(folder, step, processes)
    processes[victim].send_signal(how)
    others = [process for process in processes if process is not processes[victim]]
    try:
        found = ended(others, SILENT + 20)
    finally:
        processes[victim].kill()
        processes[victim].communicate()
    assert [code for code, _ in found] == [75] * len(others), found
    for process in set(range(number)) - {victim}:
        stacks = (folder / "hosts" / f"{process}.stacks.txt").read_text()
        assert "most recent call first" in stacks and "gptjax/cli/main.py" in stacks
    where = rf"gptjax: process {victim} \(\S+, pid {processes[victim].pid}\) while [a-z ]+, after "
    assert all(re.search(where + r"step \d+, ", text) for _, text in found), found
    return [text for _, text in found]


@pytest.mark.slow
def test_two_processes_of_which_each_fails_in_another_way_end_as_if_nothing_had_happened(two, corpus, tmp_path):
    folder = tmp_path / "run"

    processes = start(2, corpus, folder, "--config.watchdog.step_seconds=3", hangs=1)
    (code_0, err_0), (code_1, err_1) = ended(processes, 240)
    assert (code_0, code_1) == (75, 75)
    message = (
        rf"gptjax: process 1 \(\S+, pid {processes[1].pid}\) while training, after step 7, has not gone on for \d+ s; "
    )
    assert re.search(message + "process 0 ", err_0) and re.search(message + "process 1 ", err_1), (err_0, err_1)
    assert "in batches" in (folder / "hosts" / "1.stacks.txt").read_text()
    found = status.status(epath.Path(folder))
    assert [(fact["process"], fact["running"]) for fact in found["processes"]] == [(0, False), (1, False)]
    assert found["last_step"] in (6, 7) and "nobody runs here" in status.text(found)

    (message,) = lost(2, 0, signal.SIGKILL, 14, corpus, folder)
    assert "is gone: its connection closed" in message and "; process 1 (" in message

    processes = start(2, corpus, folder)
    past(folder, 21, processes)
    for _ in range(5):  # each writes its own beat, up to a second after the other
        found = status.status(epath.Path(folder))
        if found["slowest"]["steps_behind"] in (0, 1):
            break
        time.sleep(0.05)
    assert [fact["running"] for fact in found["processes"]] == [True, True]
    assert found["slowest"]["steps_behind"] in (0, 1) and "the slowest is process" in status.text(found)
    processes[1].send_signal(signal.SIGTERM)
    (code_0, err_0), (code_1, err_1) = ended(processes, 60)
    assert (code_0, code_1) == (75, 75)
    at = r"gptjax: SIGTERM on \S+ \(process 1\): step (\d+) is saved, and the same command goes on from there\."
    assert re.search(at, err_0)[1] == re.search(at, err_1)[1]

    assert [code for code, _ in ended(start(2, corpus, folder), 240)] == [0, 0]
    assert losses(folder) == two


@pytest.mark.slow
def test_four_processes_then_two_then_one(two, corpus, tmp_path):
    folder = tmp_path / "run"
    assert all("is gone: its connection closed" in message for message in lost(4, 3, signal.SIGKILL, 7, corpus, folder))
    (message,) = lost(2, 0, signal.SIGSTOP, 14, corpus, folder)
    assert "has given no sign of life for " in message
    assert [code for code, _ in ended(start(1, corpus, folder), 240)] == [0]
    assert losses(folder) == pytest.approx(two, rel=1e-5)


# Who is at fault

CONFIG = WatchdogConfig(silent_seconds=30, step_seconds=60, phase_seconds=3600)


def beats(*changes: dict) -> list[Beat]:
    """Processes that train and have stood still for two minutes, but for the changes."""
    usual = dict(phase="training", step=7, ticks=8, waiting=True, idle_seconds=120.0, longest_seconds=1.0)
    return [dataclasses.replace(heartbeat.beat(), **usual | change, process=i) for i, change in enumerate(changes)]


@pytest.mark.parametrize("changes, culprits", [
    ([{}, {"waiting": False}, {}], [1]),  # who does not wait holds up the others
    ([{}, {"waiting": False, "idle_seconds": 50.0}, {}], []),  # and is not late yet
    ([{}, {"waiting": False, "longest_seconds": 20.0}, {}], []),  # its steps take long
    ([{}, {"waiting": False, "longest_seconds": 0.0}, {}], []),  # of which it has made no two
    ([{}, {"waiting": False, "phase": "restoring"}], []),
    ([{}, {"waiting": False, "phase": "restoring", "idle_seconds": 4000.0}], [1]),
    ([{}, {"ticks": 7, "step": 6}, {}], [1]),  # all wait: who is behind
    ([{}, {}], [0, 1]),
    ([{}, {"idle_seconds": 59.0}], []),
    ([{}], [0]),  # alone, it waits for its device
])  # fmt: skip
def test_who_is_at_fault(changes, culprits):
    assert [beat.process for beat in watchdog.at_fault(beats(*changes), CONFIG)] == culprits


# Status


def test_a_beat_survives_the_file_and_nothing_else_does():
    beat = heartbeat.beat()
    fields = dataclasses.asdict(beat)
    assert heartbeat.parsed(json.dumps(fields)) == beat
    for damage in ("", "[]", "{}", "[" * 100_000, json.dumps(fields)[:-9], json.dumps(fields | {"pid": "1"}),
                   json.dumps(fields | {"time": float("nan")}), json.dumps(fields | {"time": 10**400}),
                   json.dumps(fields | {"host": "\x1b[2J"})):  # fmt: skip
        with pytest.raises((ValueError, RecursionError)):
            heartbeat.parsed(damage)


def test_status_tells_who_is_slowest_and_who_is_gone(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.mkdir()
    there = dict(host="elsewhere", waiting=True, idle_seconds=4.0, time=time.time())
    for beat in beats(
        there,
        there | {"waiting": False, "step": 5, "ticks": 6},
        there | {"time": time.time() - 100},
        {"pid": 2**22 + 1},
    ):
        (hosts / f"{beat.process}.json").write_text(json.dumps(dataclasses.asdict(beat)))
    (hosts / "4.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    found = status.status(epath.Path(tmp_path))
    assert [fact["running"] for fact in found["processes"]] == [True, True, False, False]
    assert found["slowest"] == {"process": 1, "steps_behind": 2, "seconds_waited_for": 4.0}
    assert found["last_step"] == 5 and len(found["unreadable"]) == 1
    text = status.text(found)
    assert "the slowest is process 1: 2 steps behind the first" in text and text.count("gone") == 2
    assert "unreadable: 4.json" in text and text.endswith("last logged step: 5")


def test_status_where_what_was_logged_can_not_be_read(tmp_path, monkeypatch):
    """It tells what it can; and a file of any length is read a row at a time."""

    def fail(*_):
        raise OSError(5, "Input/output error")

    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    for method in ("read_bytes", "open"):
        assert status.status(epath.Path(tmp_path))["last_step"] == 5
        monkeypatch.setattr(type(epath.Path(tmp_path)), method, fail)
    assert status.status(epath.Path(tmp_path))["last_step"] is None


def test_status_of_no_run_is_refused(tmp_path):
    with pytest.raises(Refused, match="give the folder of a run"):
        status.status(epath.Path(tmp_path))
