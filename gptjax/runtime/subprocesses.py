"""`gptjax` in processes of its own, as `gptjax sweep` and `gptjax scale` start it: who stops them lets it save."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

from gptjax.errors import Preempted

SECONDS = 0.1  # from one look at a process to the next
GRACE_SECONDS = 300  # in which a process that was asked to stop has to save and end
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
TAIL_BYTES = 1 << 14  # of a process's output, in which its last words are looked for


class Process:
    """`gptjax WORDS…`."""

    def __init__(self, words: list[str], output: pathlib.Path | None = None, compiled: pathlib.Path | None = None):
        """
        Args:
          output: a file, at whose end its output goes; without one that is stderr.
          compiled: a folder of compiled programs, which several processes share; without one each has its own.
        """
        self._output = output
        with contextlib.ExitStack() as files:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gptjax", *words],
                stdin=subprocess.DEVNULL,
                stdout=files.enter_context(output.open("ab")) if output else sys.stderr,
                stderr=subprocess.STDOUT,
                env=({"JAX_COMPILATION_CACHE_DIR": str(compiled)} if compiled else {}) | os.environ,
                start_new_session=True,  # a Ctrl-C is for who started it, and stops its processes in order
            )

    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks it to save and end."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def last_words(self) -> str:
        """The last sentence that it printed as a refusal or a failure, or else its last line."""
        with self._output.open("rb") as file:
            file.seek(max(0, self._output.stat().st_size - TAIL_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("gptjax: ")]
        return (told or lines or ["it printed nothing"])[-1].removeprefix("gptjax: ").strip()


@contextlib.contextmanager
def asked_to_stop():
    """Yields a list that takes the name of each signal to stop."""
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
    """Waits for a process: its exit code. Raises: Preempted, where a signal came meanwhile; `what` it interrupted."""
    while process.code() is None and not asked:
        time.sleep(SECONDS)
    if asked:
        stop([process], asked)
        raise Preempted(f"{asked[0]} while {what}: the same command goes on")
    return process.code()


def stop(processes: list[Process], asked: list[str]) -> None:
    """Asks those that run to save and end, and waits for them; a second signal kills them."""
    left = [process for process in processes if process.code() is None]
    for process in left:
        process.stop()
    until = time.monotonic() + GRACE_SECONDS
    while any(process.code() is None for process in left):
        if len(asked) > 1 or time.monotonic() > until:
            for process in left:
                process.kill()
        time.sleep(SECONDS)
