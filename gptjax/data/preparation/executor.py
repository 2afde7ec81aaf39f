"""Runs one step over many tasks: in turn in this process, or in several processes by datatrove's executor.

    run(step, tasks, workers, folder, report)

A step is called as `step(task, report)`, task by task from 0. The step leaves a result that exists only when complete,
and returns at once where it finds one. A killed run therefore resumes, and nothing depends on which process did which
task. The step reports progress by `report(documents, bytes, tokens)`, each time the increase.

The steps of `prepare` and of cleaning run over the same tasks. datatrove makes the processes and marks what is
complete. None of these processes imports JAX or is forked from one that does.
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
from gptjax.runtime.files import listed, write_whole

SECONDS = 0.5  # between two looks at the workers, and between two notes of a worker
GRACE = 10.0  # seconds for the pool to end by itself once its workers are done
PACKAGES = "multiprocess", "datatrove.executor", "loguru"

Report = Callable[[int, int, int], None]  # takes more documents, bytes and tokens
Step = Callable[[int, Report], None]


class Counts(NamedTuple):
    """Progress of some tasks."""

    documents: int
    bytes: int
    tokens: int


def run(step: Step, tasks: int, workers: int, folder: epath.Path, report: Report) -> None:
    """Does all tasks of a step.

    Args:
      step: called with a task and a `Report`; must be picklable.
      tasks: number of tasks.
      workers: number of processes; 1 is this process.
      folder: for datatrove's marks and logs of this step alone.
      report: called in this process.

    Raises: what the step raises; Failed, if a worker is killed.
    """
    workers = min(workers, tasks)
    if workers == 1:
        for task in range(tasks):
            step(task, report)
        return
    for package in PACKAGES:
        optional.package(package, f"--workers={workers}")
    context = multiprocessing.get_context("spawn")
    # A local folder, since each worker writes a note twice a second, and `folder` may be in a bucket.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as notes:
        ours, theirs = context.Pipe()
        arguments = step, tasks, workers, folder, pathlib.Path(notes), theirs
        conductor = context.Process(target=_conduct, args=arguments)
        conductor.start()
        theirs.close()
        before = Counts(0, 0, 0)
        try:
            ended = False
            while not ended:
                ended = ours.poll(SECONDS)
                now = _sum(pathlib.Path(notes))
                report(*(new - old for new, old in zip(now, before, strict=True)))
                before = now
            failure = ours.recv()
            conductor.join(SECONDS)  # time to take down its queues
        except EOFError:
            failure = Failed("The process that shares out the tasks was killed: run the same command to resume.")
        finally:
            ours.close()  # tells the conductor to end, together with its children
            conductor.join(GRACE)
            conductor.kill()
            conductor.join()
    if failure:
        raise failure


def _conduct(step: Step, tasks: int, workers: int, folder: epath.Path, notes: pathlib.Path, pipe) -> None:
    """Runs datatrove's executor, and sends the exception that ended it, or None.

    A process of its own, because the executor makes threads and queues that end in order only if all workers do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers a Ctrl-C; workers inherit this
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # warns of what a killed worker leaves
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
            # The pool would wait for that worker's result for ever. But the pool also ends finished workers by SIGTERM,
            # and the exit code of a worker that ended in order is lost if two threads look at the same time.
            thread.join(GRACE)
        if pipe.poll():  # the other end is closed
            break
    if dead and thread.is_alive() and not failures:
        sentence = (
            f"Worker process {dead[0].pid} ended with exit code {dead[0].exitcode} (-9 often means that memory is "
            "short): run the same command to resume, with fewer --workers if memory was short."
        )
        failures.append(Failed(sentence))
    if failures or thread.is_alive():
        for child in seen.union(multiprocess.active_children()):  # the pool replaces those that were killed
            child.kill()
    with contextlib.suppress(OSError):  # nobody reads the pipe any more
        pipe.send(failures[0] if failures else None)
    if thread.is_alive():
        os._exit(1)


def _kept(function: Callable, failures: list) -> None:
    try:
        function()
    except (Refused, Failed, OSError) as failure:
        failures.append(failure)
    except Exception as error:  # a fault of the program: sent as text, since not every exception can be pickled
        failures.append(RuntimeError("".join(traceback.format_exception(error))))


def _sum(notes: pathlib.Path) -> Counts:
    counts = [json.loads(note.read_text()) for note in listed(epath.Path(notes), ".json")]
    return Counts(*(sum(count) for count in zip(*counts, strict=True))) if counts else Counts(0, 0, 0)


class _Worker:
    """The whole pipeline of datatrove, which calls this object with no documents and the number of the task."""

    def __init__(self, step: Step, notes: pathlib.Path):
        self._step, self._notes = step, notes

    def __getstate__(self):
        return self._step, self._notes

    def __setstate__(self, state):
        """Silences datatrove in the worker before its first log, which would tear the bar and show tracebacks."""
        self._step, self._notes = state
        optional.package("loguru", "--workers").logger.disable("datatrove")

    def __call__(self, data, task: int, tasks: int):
        _end_with_parent()
        self._step(task, self._report)
        _note(self._notes)

    def _report(self, documents: int, num_bytes: int, tokens: int) -> None:
        _note(self._notes, (documents, num_bytes, tokens))


@functools.cache  # one thread in each worker
def _end_with_parent() -> None:
    """Ends a worker when the process of `_conduct` ends: nobody waits for it, and another run may resume its work."""
    # The system's parent of a worker is the fork server, which lives as long as a worker does.
    parent = optional.package("multiprocess", "--workers").parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_done, _noted = Counts(0, 0, 0), 0.0  # what this worker has done in all its tasks; when the last note was written


def _note(notes: pathlib.Path, more: tuple[int, ...] = ()) -> None:
    """Adds `more` to what this worker has done; writes the note if SECONDS have passed, or if `more` is empty."""
    global _done, _noted
    _done = Counts(*map(sum, zip(_done, more, strict=True))) if more else _done
    if not more or time.monotonic() - _noted > SECONDS:
        _noted = time.monotonic()
        write_whole(notes / f"{os.getpid()}.json", json.dumps(_done).encode())
