"""Heartbeat: records the phase and step of this process, how long each lasts, and whether the process waits for others.

A process has one state, held by this module. The code reports progress (`phase`, `reached`, `tick`, `moved`,
`waiting`); `supervisor.py` sends beats to the other processes and judges theirs; a thread writes WORKDIR/hosts/N.json
for `gptjax status`. The module imports only the standard library, because signals must be answered before JAX loads.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from typing import Any

FOLDER = "hosts"  # in the workdir


@dataclasses.dataclass(frozen=True)
class Beat:
    """One sign of life of a process."""

    process: int
    host: str
    pid: int
    phase: str
    background: str  # activity of the saving thread; empty: none
    step: int  # completed updates
    ticks: int  # train steps and evaluation batches begun since the start
    waiting: bool  # for the devices or the other processes; the two mostly coincide
    idle_seconds: float  # since the last progress
    phase_seconds: float  # since the phase began
    longest_seconds: float  # longest time from one tick to the next in this phase; 0 before two ticks
    time: float  # time of the beat, seconds since 1970


def parsed(text: str | bytes) -> Beat:
    """Parses the beat of a line or file. Raises: ValueError, for anything else."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    for field in dataclasses.fields(Beat):
        value: Any = values.get(field.name)
        fits = type(value) is field.type or (field.type is float and type(value) is int)
        too_large = fits and field.type is float and not abs(value) < 1e15
        if not fits or too_large or (isinstance(value, str) and not value.isprintable()):
            raise ValueError(f"{field.name} is {value!r:.40}")
    return Beat(**{field.name: values[field.name] for field in dataclasses.fields(Beat)})


def alive(pid: int) -> bool:
    """Says whether a process of this machine has that number."""
    try:
        if pid > 0:
            os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        return True
    return pid > 0


class _Heart:
    """The state of this process, under a lock, because threads read while the main thread goes on."""

    def __init__(self):
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.process, self.phase, self.background, self.step, self.ticks = 0, "starting", "", 0, 0
        self.began = self.moved = time.monotonic()
        self.waiting, self.longest = False, {}
        self.ticked: float | None = None  # when the last tick began

    def tick_ended(self) -> None:
        if self.ticked is not None:
            seconds = time.monotonic() - self.ticked
            self.longest[self.phase] = max(seconds, self.longest.get(self.phase, 0.0))
        self.ticked = None

    def enter(self, phase: str) -> None:
        with self.lock:
            self.tick_ended()
            self.phase = phase
            self.began = self.moved = time.monotonic()
        _changed.set()


_changed = threading.Event()  # set when the phase changes, so that the file follows at once
_writing = threading.Lock()
_heart = _Heart()
_folder = None  # WORKDIR/hosts, once this run may write there
_stacks = None  # file for the stacks of an abort


def begin() -> None:
    """Resets the state for a run that has just started."""
    global _heart, _folder
    _heart, _folder = _Heart(), None


@contextlib.contextmanager
def phase(name: str):
    """Sets the main thread's phase in the block, and afterwards restores the previous phase.

    If the block raises and the previous phase is "starting", the phase that failed stays.
    """
    before, failed = _heart.phase, True
    _heart.enter(name)
    try:
        yield
        failed = False
    finally:
        if not failed or before != "starting":
            _heart.enter(before)


@contextlib.contextmanager
def background(name: str):
    """Names the saving thread's activity in the block."""
    _heart.background = name
    try:
        yield
    finally:
        _heart.background = ""


@contextlib.contextmanager
def waiting():
    """Context manager around a wait for the devices or other processes, in which this process is not at fault."""
    if threading.current_thread() is not threading.main_thread():  # waits of the saving thread hold up nobody
        yield
        return
    before = _heart.waiting
    _wait(True)
    try:
        yield
    finally:
        _wait(before)


def _wait(waits: bool) -> None:
    with _heart.lock:
        _heart.waiting, _heart.moved = waits, time.monotonic()


def moved() -> None:
    """Records that the main thread made progress in a long phase."""
    with _heart.lock:
        _heart.moved = time.monotonic()


def tick() -> None:
    """Records that a train step or an evaluation batch begins."""
    with _heart.lock:
        _heart.tick_ended()
        _heart.ticks += 1
        _heart.ticked = _heart.moved = time.monotonic()


def ticks() -> int:
    return _heart.ticks


def reached(step: int) -> None:
    """Records the number of completed updates."""
    _heart.step = step


def number(process: int) -> None:
    """Records the number of this process in the run."""
    _heart.process = process


def excuse(seconds: float) -> None:
    """Discounts seconds in which the whole process stood still (Ctrl-Z, a suspended machine)."""
    with _heart.lock:
        _heart.moved += seconds


def beat() -> Beat:
    """Returns the current beat of this process."""
    with _heart.lock:
        now = time.monotonic()
        return Beat(
            process=_heart.process,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=_heart.phase,
            background=_heart.background,
            step=_heart.step,
            ticks=_heart.ticks,
            waiting=_heart.waiting,
            idle_seconds=round(now - _heart.moved, 3),
            phase_seconds=round(now - _heart.began, 3),
            longest_seconds=round(_heart.longest.get(_heart.phase, 0.0), 3),
            time=round(time.time(), 3),
        )


def publish(workdir, processes: int) -> None:
    """Lets `write` write into a workdir (an epath.Path) that this run has locked."""
    from gptjax.runtime.files import listed  # here, since this module imports only the standard library

    global _folder
    folder = workdir / FOLDER
    if _heart.process == 0:
        for path in listed(folder, ".json"):  # left by a killed run of more processes
            if path.stem.isdecimal() and int(path.stem) >= processes:
                path.unlink(missing_ok=True)
    _folder = folder
    _changed.set()


def write() -> None:
    """Writes this process's file once a second, and when the phase changes, until `end`; runs in a separate thread.

    On gs://, which accepts at most one write a second per file, the interval is ten seconds.
    """
    heart, seconds, warned = _heart, 1.0, False
    while True:
        try:
            with _writing:
                if heart.ended.is_set():
                    return
                if _folder is not None and _has_content(_folder.parent):
                    seconds = 10.0 if "://" in str(_folder) else 1.0
                    _write(_folder)
        except FileNotFoundError:  # a run that is refused right now removes the workdir
            pass
        except Exception as error:  # each file system raises errors of its own; none may harm the run
            if not warned:
                print(f"gptjax: {_folder} can't be written to ({error}): gptjax status will not see this process.",
                      file=sys.stderr, flush=True)  # fmt: skip
            warned = True
        heart.ended.wait(seconds / 10)
        _changed.wait(seconds * 0.9)
        _changed.clear()


def _has_content(workdir) -> bool:
    """Says whether the run has written anything, because a refused run must leave no workdir."""
    return workdir.exists() and any(path.name not in ("owner.json", FOLDER) for path in workdir.iterdir())


def _write(folder) -> None:
    global _stacks
    folder.mkdir(exist_ok=True)
    path = folder / f"{_heart.process}.json"
    from gptjax.runtime.files import write_whole  # here, since this module imports only the standard library

    write_whole(path, (json.dumps(dataclasses.asdict(beat())) + "\n").encode())
    if _stacks is None and "://" not in str(folder) and not faulthandler.is_enabled():
        _stacks = open(folder / f"{_heart.process}.stacks.txt", "a", encoding="utf-8")
        faulthandler.enable(_stacks)  # for aborts by JAX itself


def leave_stacks(why: str) -> str:
    """Appends the stacks of all Python threads to hosts/N.stacks.txt. Returns the path, or why there is no file."""
    if _folder is None:
        return "in no file, for want of a workdir"
    path = _folder / f"{_heart.process}.stacks.txt"
    with tempfile.TemporaryFile("w+", encoding="utf-8") as dumped:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}", file=dumped, flush=True)
        faulthandler.dump_traceback(dumped, all_threads=True)
        dumped.seek(0)
        try:
            earlier = path.read_text() if path.exists() else ""
            path.write_text(earlier + dumped.read() + "\n")
        except Exception as error:  # each file system raises errors of its own
            return f"in no file ({error})"
    return str(path)


def end() -> None:
    """Ends `write`."""
    _heart.ended.set()
    _changed.set()
    with _writing:
        pass


def withdraw() -> None:
    """Ends `write` and removes this process's file, at an orderly end. A process that dies leaves the last beat."""
    global _folder, _stacks
    end()
    if _stacks is not None:
        faulthandler.disable()
        _stacks.close()
        with contextlib.suppress(FileNotFoundError):  # a refused run has removed the workdir
            if not os.path.getsize(_stacks.name):
                os.unlink(_stacks.name)
    if _folder is not None:
        with contextlib.suppress(Exception):  # each file system raises errors of its own
            (_folder / f"{_heart.process}.json").unlink(missing_ok=True)
            _folder.rmdir()  # fails if stacks of an earlier failure are there, which stay
    _folder = _stacks = None
