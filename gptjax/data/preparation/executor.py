"""One step over many tasks: one after the other in this process, or in several by datatrove's executor.

    run(step, tasks, workers, folder, told)

A step is called as `step(task, told)`, task by task from 0. It leaves a result that is there only when it is whole, and
returns at once where it finds one: so whatever was killed goes on, and nothing depends on who did which task. It tells
how far it has come by `told(documents, bytes, tokens)`, which adds up.

`prepare` and cleaning are such steps over the same tasks. datatrove brings the processes, and
marks what is complete. No process that it makes has JAX in it, or is forked from one that has.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from gptjax.errors import Failed, Refused
from gptjax.runtime import optional
from gptjax.runtime.files import write_whole

SECONDS = 0.5  # from one look at the workers, and one of their notes, to the next
GRACE = 10.0  # seconds in which the pool ends that is done with its workers
PACKAGES = "multiprocess", "datatrove.executor", "loguru"


class Told(NamedTuple):
    """How far some tasks have come."""

    documents: int
    bytes: int
    tokens: int


def run(step: Callable, tasks: int, workers: int, folder: epath.Path, told: Callable[[int, int, int], None]) -> None:
    """Does all tasks of a step.

    Args:
      folder: of this step alone, for datatrove's marks and logs. told: called in this process.

    Raises: what the step does; Failed, where a worker is killed.
    """
    workers = min(workers, tasks)
    if workers == 1:
        for task in range(tasks):
            step(task, told)
        return
    for package in PACKAGES:
        optional.package(package, f"--workers={workers}")
    context = multiprocessing.get_context("spawn")
    # On this machine, since each worker writes one twice a second, and `folder` may be in a bucket.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as notes:
        ours, theirs = context.Pipe()
        arguments = step, tasks, workers, folder, pathlib.Path(notes), theirs
        conductor = context.Process(target=_conduct, args=arguments)
        conductor.start()
        theirs.close()
        before = Told(0, 0, 0)
        try:
            ended = False
            while not ended:
                ended = ours.poll(SECONDS)
                now = _sum(pathlib.Path(notes))
                told(*(new - old for new, old in zip(now, before)))
                before = now
            failure = ours.recv()
            conductor.join(SECONDS)  # it has queues to take down
        except EOFError:
            failure = Failed("The process that shares out the tasks was killed: the same command goes on.")
        finally:
            ours.close()  # by which it knows that it has to end, and its children with it
            conductor.join(GRACE)
            conductor.kill()
            conductor.join()
    if failure:
        raise failure


def _conduct(step: Callable, tasks: int, workers: int, folder: epath.Path, notes: pathlib.Path, pipe) -> None:
    """The process that datatrove's executor runs in; sends what it fails by, or None.

    One of its own, because the executor makes threads and queues, which end in order only if all workers do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a Ctrl-C, which the main process answers; workers inherit it
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of what a killed worker leaves
    failures = []
    multiprocess, executor, loguru = (optional.package(package, "--workers") for package in PACKAGES)
    loguru.logger.disable("datatrove")
    multiprocess.set_start_method("forkserver")
    multiprocess.set_forkserver_preload([type(step).__module__])  # once for all workers
    pipeline = [_Worker(step, notes)]
    local = executor.LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=str(folder))
    thread = threading.Thread(target=_kept, args=(local.run, failures), daemon=True)
    thread.start()
    seen, dead = set(), []
    while thread.is_alive() and not dead:
        thread.join(SECONDS / 5)
        seen.update(multiprocess.active_children())
        dead = [worker for worker in seen if worker.exitcode not in (None, 0)]
        if dead:
            # The pool would wait for its result for ever. But it ends its workers itself, by SIGTERM, when it is done
            # with them, and of one that ended in order the code is lost where two threads look at once.
            thread.join(GRACE)
        if pipe.poll():  # it is closed at the other end
            break
    if dead and thread.is_alive() and not failures:
        sentence = (
            f"Worker process {dead[0].pid} ended with exit code {dead[0].exitcode} (-9 is what the system does where "
            "memory is short): the same command goes on, with fewer --workers if so."
        )
        failures.append(Failed(sentence))
    if failures or thread.is_alive():
        for child in seen.union(multiprocess.active_children()):  # the pool has others for those that are killed
            child.kill()
    with contextlib.suppress(OSError):  # of a pipe that nobody reads any more
        pipe.send(failures[0] if failures else None)
    if thread.is_alive():
        os._exit(1)


def _kept(function: Callable, failures: list) -> None:
    try:
        function()
    except (Refused, Failed, OSError) as failure:
        failures.append(failure)
    except Exception as error:  # a fault of the program: as a text, since not all can be sent
        failures.append(RuntimeError("".join(traceback.format_exception(error))))


def _sum(notes: pathlib.Path) -> Told:
    counts = [json.loads(note.read_text()) for note in notes.glob("*.json")]
    return Told(*(sum(count) for count in zip(*counts))) if counts else Told(0, 0, 0)


class _Worker:
    """The whole of datatrove's pipeline: it calls this with nothing to read, and the number of the task."""

    def __init__(self, step: Callable, notes: pathlib.Path):
        self._step, self._notes = step, notes

    def __getstate__(self):
        return self._step, self._notes

    def __setstate__(self, state):
        """In the process of the worker, before datatrove logs: that would tear the bar, and show tracebacks."""
        self._step, self._notes = state
        optional.package("loguru", "--workers").logger.disable("datatrove")

    def __call__(self, data, task: int, tasks: int):
        _end_with_parent()
        self._step(task, lambda *more: _note(self._notes, more))
        _note(self._notes)


@functools.cache  # so that it is one thread a worker
def _end_with_parent() -> None:
    """Has a worker end when the process of `_conduct` does: nobody waits for it, and somebody else may go on with it."""
    # Its parent by the system is another, the fork server, which lives as long as a worker does.
    parent = optional.package("multiprocess", "--workers").parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_done, _noted = Told(0, 0, 0), 0.0  # by this worker, over all its tasks; when that was written


def _note(notes: pathlib.Path, more: tuple[int, ...] = ()) -> None:
    """Adds to what this worker has done, and writes it now and then, and where there is nothing to add."""
    global _done, _noted
    _done = Told(*map(sum, zip(_done, more))) if more else _done
    if not more or time.monotonic() - _noted > SECONDS:
        _noted = time.monotonic()
        write_whole(notes / f"{os.getpid()}.json", json.dumps(_done).encode())
