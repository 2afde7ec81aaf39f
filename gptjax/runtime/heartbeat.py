"""What this process does at the moment, and for how long: its phase, its step, and whether it waits for others.

A process has one heart, so this is the state of the module. The code says where it is (`phase`, `reached`, `tick`,
`moved`, `waiting`); `lifeline.py` tells the other processes and judges, and a thread writes WORKDIR/hosts/N.json, which
`gptjax status` reads. Only the standard library is imported: signals are answered before JAX is.
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

FOLDER = "hosts"  # in the workdir


@dataclasses.dataclass(frozen=True)
class Beat:
    """One sign of life."""

    process: int
    host: str
    pid: int
    phase: str
    background: str  # what the saving thread does; empty: nothing
    step: int  # completed updates
    ticks: int  # train steps and evaluation batches begun since the start
    waiting: bool  # for the devices or for the other processes, which mostly is one and the same
    idle_seconds: float  # since it last went on
    phase_seconds: float  # since the phase began
    longest_seconds: float  # from one tick to the next in this phase; 0 where there were no two yet
    time: float  # of the beat, seconds since 1970


def parsed(text: str | bytes) -> Beat:
    """The beat of a line or file. Raises: ValueError, for anything else."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    for field in dataclasses.fields(Beat):
        value = values.get(field.name)
        number = field.type is float and type(value) is int
        fits = type(value) is field.type or number
        if not fits or field.type is float and not abs(value) < 1e15 or field.type is str and not value.isprintable():
            raise ValueError(f"{field.name} is {value!r:.40}")
    return Beat(**{field.name: values[field.name] for field in dataclasses.fields(Beat)})


def alive(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        if pid > 0:
            os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return pid > 0


class _Heart:
    """The state; one lock, because threads ask while the main thread goes on."""

    def __init__(self):
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.process, self.phase, self.background, self.step, self.ticks = 0, "starting", "", 0, 0
        self.began = self.moved = time.monotonic()
        self.waiting, self.ticked, self.longest = False, None, {}

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


_changed = threading.Event()  # the phase, so that the file follows at once
_writing = threading.Lock()
_heart = _Heart()
_folder = None  # WORKDIR/hosts, once it may be written to
_stacks = None  # the file that an abort leaves stacks in


def begin() -> None:
    """A run that has just started."""
    global _heart, _folder
    _heart, _folder = _Heart(), None


@contextlib.contextmanager
def phase(name: str):
    """What the main thread does in the block; then again what it did before, unless the run fails in it."""
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
    """What the thread that saves does in the block."""
    _heart.background = name
    try:
        yield
    finally:
        _heart.background = ""


@contextlib.contextmanager
def waiting():
    """Around what may wait for the devices or for other processes: in it nobody is at fault for standing still."""
    if threading.current_thread() is not threading.main_thread():  # the saving thread's waits hold up nobody
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
    """The main thread went on with a long phase."""
    with _heart.lock:
        _heart.moved = time.monotonic()


def tick() -> None:
    """A train step or an evaluation batch begins."""
    with _heart.lock:
        _heart.tick_ended()
        _heart.ticks += 1
        _heart.ticked = _heart.moved = time.monotonic()


def ticks() -> int:
    return _heart.ticks


def reached(step: int) -> None:
    """So many updates are done."""
    _heart.step = step


def number(process: int) -> None:
    """Which of the run's processes this is."""
    _heart.process = process


def excuse(seconds: float) -> None:
    """The whole process stood still for so long (Ctrl-Z, a suspended machine): not a fault of its main thread."""
    with _heart.lock:
        _heart.moved += seconds


def beat() -> Beat:
    """What this process does now."""
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
    """From now on `write` writes into a workdir (an epath.Path), which is this run's to write to."""
    global _folder
    folder = workdir / FOLDER
    if _heart.process == 0 and folder.exists():
        for path in folder.glob("*.json"):  # of a run of more processes that was killed
            if path.stem.isdecimal() and int(path.stem) >= processes:
                path.unlink(missing_ok=True)
    _folder = folder
    _changed.set()


def write() -> None:
    """Writes this process's file once a second, and when the phase changes, until `end`; for a thread of its own.

    Every ten seconds on gs://, which takes no more than one write a second to a file.
    """
    heart, seconds, warned = _heart, 1.0, False
    while True:
        try:
            with _writing:
                if heart.ended.is_set():
                    return
                if _folder is not None and _begun(_folder.parent):
                    seconds = 10.0 if "://" in str(_folder) else 1.0
                    _write(_folder)
        except FileNotFoundError:  # of a run that is refused right now the workdir goes
            pass
        except Exception as error:  # of whatever file system; none of it may harm the run
            if not warned:
                print(f"gptjax: {_folder} can't be written to ({error}): gptjax status will not see this process.",
                      file=sys.stderr, flush=True)  # fmt: skip
            warned = True
        heart.ended.wait(seconds / 10)
        _changed.wait(seconds * 0.9)
        _changed.clear()


def _begun(workdir) -> bool:
    """Whether anything of the run is there: for one that is refused no workdir is to stay."""
    return workdir.exists() and any(path.name not in ("owner.json", FOLDER) for path in workdir.iterdir())


def _write(folder) -> None:
    global _stacks
    folder.mkdir(exist_ok=True)
    path = folder / f"{_heart.process}.json"
    from gptjax.runtime.files import write_whole  # here, since this module imports only the standard library

    write_whole(path, (json.dumps(dataclasses.asdict(beat())) + "\n").encode())
    if _stacks is None and "://" not in str(folder) and not faulthandler.is_enabled():
        _stacks = open(folder / f"{_heart.process}.stacks.txt", "a")
        faulthandler.enable(_stacks)  # where JAX itself ends the process, by an abort


def leave_stacks(why: str) -> str:
    """Adds what every Python thread is at to hosts/N.stacks.txt. Returns where that is."""
    if _folder is None:
        return "in no file, for want of a workdir"
    path = _folder / f"{_heart.process}.stacks.txt"
    with tempfile.TemporaryFile("w+") as dumped:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {why}", file=dumped, flush=True)
        faulthandler.dump_traceback(dumped, all_threads=True)
        dumped.seek(0)
        try:
            earlier = path.read_text() if path.exists() else ""
            path.write_text(earlier + dumped.read() + "\n")
        except Exception as error:  # of whatever file system
            return f"in no file ({error})"
    return str(path)


def end() -> None:
    """Ends `write`."""
    _heart.ended.set()
    _changed.set()
    with _writing:
        pass


def withdraw() -> None:
    """Ends `write` and takes this process's file away: it ends in order. What dies leaves its last beat."""
    global _folder, _stacks
    end()
    if _stacks is not None:
        faulthandler.disable()
        _stacks.close()
        with contextlib.suppress(FileNotFoundError):  # where the run is refused and its workdir went
            if not os.path.getsize(_stacks.name):
                os.unlink(_stacks.name)
    if _folder is not None:
        with contextlib.suppress(Exception):  # of whatever file system
            (_folder / f"{_heart.process}.json").unlink(missing_ok=True)
            _folder.rmdir()  # where it is empty: stacks of an earlier failure stay
    _folder = _stacks = None
