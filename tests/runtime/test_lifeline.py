"""The thread that answers signals, one call at a time; whole runs are in test_preemption and test_heartbeat."""

import ast
import pathlib
import signal
import socket
import sys
import threading
import time

import pytest

import gptjax
from gptjax.errors import TRY_AGAIN, Preempted
from gptjax.runtime import heartbeat, preemption, supervisor

UNSAVED = "training", "compiling the evaluation", "evaluating", "evaluating tasks", "saving", "tracing", "logging"


@pytest.fixture
def exits(monkeypatch):
    """The codes that the process would have ended with."""
    codes = []
    monkeypatch.setattr(supervisor.os, "_exit", codes.append)
    heartbeat.begin()
    yield codes
    preemption.begin()  # which nobody has asked to stop


def test_every_phase_is_one_of_which_is_known_whether_anything_is_unsaved():
    named = {"starting"}
    for path in pathlib.Path(gptjax.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "heartbeat.phase":
                named |= {node.value for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)}
    assert named == {*supervisor.SAVED, *UNSAVED}


@pytest.mark.parametrize("phase", [*UNSAVED, "a new one"])
def test_where_something_may_be_unsaved_the_next_tick_stops(exits, phase):
    line = supervisor.Supervisor()
    with heartbeat.phase(phase):
        line._ask("SIGTERM")
        with pytest.raises(Preempted, match="SIGTERM on "):
            preemption.tick()
    assert not exits


@pytest.mark.parametrize("phase", supervisor.SAVED)
def test_where_nothing_is_unsaved_it_ends_at_once(exits, phase):
    line = supervisor.Supervisor()
    with heartbeat.phase(phase):
        line._ask("SIGTERM")
    assert exits[0] == TRY_AGAIN


def test_a_message_that_is_cut_short_ends_the_process_and_not_the_thread_alone(exits, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as there:
        line = supervisor.Supervisor()
        line.connect(0, {1: server.accept()[0]})
        there.sendall(b'{"beat": {"proc{"end": ["", 0]}\n')
        line.run()
    assert exits == [TRY_AGAIN] and "JSONDecodeError" in capsys.readouterr().err


def test_nobody_reads_what_it_says(exits, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    line = supervisor.Supervisor()
    with heartbeat.phase("training"):
        line._ask("SIGTERM")
        with pytest.raises(Preempted):
            preemption.tick()


def test_other_signals_are_not_asked_for(exits):
    line = supervisor.Supervisor()
    line.signalled.send(bytes([signal.SIGUSR1]))
    line._hear()
    with heartbeat.phase("training"):
        preemption.tick()
    assert not exits


def test_a_failure_does_not_wait_for_storage_that_is_lost(monkeypatch):
    monkeypatch.setattr(supervisor, "FAREWELL_SECONDS", 0.2)
    answers, ended = threading.Event(), threading.Event()

    def hang():
        with heartbeat._writing:
            ended.set()
            answers.wait(20)

    with pytest.raises(RuntimeError, match="why"), supervisor.alive():
        threading.Thread(target=hang).start()
        assert ended.wait(5)
        began = time.monotonic()
        raise RuntimeError("why")
    assert time.monotonic() - began < 5
    answers.set()
