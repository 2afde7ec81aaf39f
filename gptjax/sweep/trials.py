"""A trial: an ordinary run in a workdir of its own, by a process of its own, so that none takes others with it."""

import os
import pathlib
import subprocess
import sys

from etils import epath

from gptjax import owner, writers
from gptjax.errors import Refused

TAIL_BYTES = 1 << 14  # of a process's output, in which its last words are looked for


class Process:
    """`gptjax WORDS…`, with its output at the end of a file."""

    def __init__(self, words: list[str], output: pathlib.Path, compiled: pathlib.Path):
        """`compiled`: a folder of compiled programs, which several processes share."""
        self._output = output
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gptjax", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={"JAX_COMPILATION_CACHE_DIR": str(compiled)} | os.environ,
                start_new_session=True,  # a Ctrl-C is the sweep's, which stops its processes in order
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


def evaluations(folder: pathlib.Path) -> list[tuple[int, float | None]]:
    """(step, held-out loss) of the evaluations that a run in a folder has done; None for one that failed."""
    rows = writers.each_row(epath.Path(folder) / "metrics.jsonl")
    found = [(row["step"], row.get("eval_loss")) for row in rows if "eval_loss" in row or "eval_error" in row]
    return [(step, loss if type(loss) is float else None) for step, loss in found]


def busy(folder: pathlib.Path) -> bool:
    """Whether a run works in a folder: that of a sweep which was killed goes on by itself."""
    try:
        with owner.locked(epath.Path(folder), "", ""):
            return False
    except Refused:
        return True
