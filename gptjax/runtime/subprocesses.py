"""Runs `gptjax` in child processes, for `gptjax sweep` and `gptjax scale`; stopping the parent lets each child save."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

from gptjax.errors import Preempted

SECONDS = 0.1  # between checks of a process
GRACE_SECONDS = 300  # a process that was asked to stop must save and end within this time
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
TAIL_BYTES = 1 << 14  # size of the end of a process's output that `last_words` reads


class Process:
    """A running `gptjax WORDS…`."""

    def __init__(self, words: list[str], output: pathlib.Path | None = None, compiled: pathlib.Path | None = None):
        """
        Args:
          words: arguments of the command line.
          output: the file that the process's output is appended to; None: stderr.
          compiled: a cache folder of compiled programs for several processes to share; None: no shared cache.
        """
        self._output = output
        with contextlib.ExitStack() as files:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gptjax", *words],
                stdin=subprocess.DEVNULL,
                stdout=files.enter_context(output.open("ab")) if output else sys.stderr,
                stderr=subprocess.STDOUT,
                env=({"JAX_COMPILATION_CACHE_DIR": str(compiled)} if compiled else {}) | os.environ,
                start_new_session=True,  # a Ctrl-C goes to the parent alone, which stops the children in order
            )

    def code(self) -> int | None:
        """Returns the exit code; None while the process runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks the process to save and end."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def last_words(self) -> str:
        """Returns the last refusal or failure that the process printed to `output`, or else the last line."""
        assert self._output is not None
        with self._output.open("rb") as file:
            file.seek(max(0, self._output.stat().st_size - TAIL_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        sentences = [line for line in lines if line.startswith("gptjax: ")]
        return (sentences or lines or ["it printed nothing"])[-1].removeprefix("gptjax: ").strip()


@contextlib.contextmanager
def asked_to_stop():
    """Context manager. Yields a list to which each received stop signal adds its name."""
    asked = []
    handlers = {
        number: signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name)) for number in SIGNALS
    }
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def finish(process: Process, asked: list[str], what: str) -> int:
    """Waits for a process and returns the exit code.

    Args:
      process: the process.
      asked: the list that `asked_to_stop` yields.
      what: names the interrupted work in the message.

    Raises: Preempted, if a signal came meanwhile; the process was stopped first.
    """
    code = process.code()
    while code is None and not asked:
        time.sleep(SECONDS)
        code = process.code()
    if code is None or asked:
        stop([process], asked)
        raise Preempted(f"{asked[0]} while {what}: the same command goes on")
    return code


def stop(processes: list[Process], asked: list[str]) -> None:
    """Asks running processes to save and end, and waits for them; a second signal kills the processes."""
    left = [process for process in processes if process.code() is None]
    for process in left:
        process.stop()
    until = time.monotonic() + GRACE_SECONDS
    while any(process.code() is None for process in left):
        if len(asked) > 1 or time.monotonic() > until:
            for process in left:
                process.kill()
        time.sleep(SECONDS)
