"""Saves in the background: files become a checkpoint on all processes, or on none."""

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Mapping

import jax
from etils import epath

from gptjax.checkpoints import manifest, retention
from gptjax.runtime import distributed, heartbeat
from gptjax.runtime.files import reason


class _Failure(Exception):
    """A save failed on some process; raised on every process."""


class Save(threading.Thread):
    """Thread that writes one checkpoint while the arrays are copied off the devices.

    Every process has a `Save`. The processes agree on each part, so none waits for a file that another could not write.
    Once the thread has ended, `failure` gives the reason of a failure, and `seconds` the duration of the save.
    `blocked_seconds` is the time that the run waited: for the previous save to end, and for this save to begin.
    """

    def __init__(self, folder: epath.Path, step: int, name: str, began: float):
        """
        Args:
          folder: the folder of all checkpoints.
          step: the checkpoint's step.
          name: prefix for the exchanges between processes; new for each save.
          began: time.perf_counter() when the run began to wait.
        """
        super().__init__(name=name)
        self.step, self.began = step, began
        self.failure, self.blocked_seconds, self.seconds = "", 0.0, 0.0
        self._checkpoints, self._folder = folder, retention.at(folder, step)

    def begin(
        self,
        write: Callable[[], list],
        merge: Callable[[], None],
        content: dict,
        config,
        losses: Mapping[int, float],
        rotate: bool,
    ) -> None:
        """Starts the thread.

        Args:
          write: starts writing the arrays' files, and returns futures; each is done when `result()` returns.
          merge: on process 0, joins the files of several processes into one store.
          content: the manifest without `files`.
          config: a CheckpointConfig.
          losses: held-out losses by step; the checkpoint with the lowest stays.
          rotate: whether older checkpoints are removed.
        """
        self._write, self._merge, self._content = write, merge, content
        self._config, self._losses, self._rotate = config, losses, rotate
        self.blocked_seconds = time.perf_counter() - self.began
        self.start()

    def run(self):
        try:
            self._commit()
        except _Failure as failure:
            self.failure = str(failure)
        except Exception as error:
            self.failure = reason(error)
        del self._write, self._content  # these hold a copy of the state, and the tokenizer
        # glibc keeps freed memory per thread, and orbax starts new threads at each save: 10 % more after 200 saves.
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
        self.seconds = time.perf_counter() - self.began
        if distributed.first():
            with heartbeat.background("rotating"):
                try:
                    self._tidy()
                except Exception as error:  # each file system raises errors of its own; the next save tries again
                    warning = f"gptjax: warning: {self._checkpoints} can't be tidied up ({reason(error)})"
                    print(warning, file=sys.stderr, flush=True)

    def _commit(self) -> None:
        process, processes = jax.process_index(), jax.process_count()
        with heartbeat.background("writing"):
            self._agreed("written", self._written)
            paths = self._agreed("merged", self._merged if process == 0 else lambda: None)[0]
        with heartbeat.background("hashing"):
            digests = self._agreed("hashed", lambda: manifest.digests(self._folder, paths[process::processes]))
            files = sorted((path, file) for share in digests for path, file in share.items())
            if process == 0:
                manifest.write(self._folder, self._content | {"files": dict(files)})

    def _agreed(self, part: str, work: Callable[[], object]) -> list:
        """Returns the results of `work` by process. Raises: _Failure, on all, if this or an earlier part failed."""
        failure, value = self.failure, None
        if not failure:
            try:
                value = work()
            except Exception as error:  # TensorStore raises several types for a full disk
                failure = reason(error)
        found = distributed.exchange([failure, value], f"{self.name}/{part}")
        for process, (failure, _) in enumerate(found):
            if failure:
                raise _Failure(failure + f" on process {process}" * (len(found) > 1))
        return [value for _, value in found]

    def _written(self) -> None:
        until = time.monotonic() + self._config.write_seconds
        for write in self._write():
            write.result(timeout=max(0.0, until - time.monotonic()))

    def _merged(self) -> list[str]:
        self._merge()
        return manifest.stored(self._folder)

    def _tidy(self) -> None:
        if self.failure:
            retention.clear(self._folder)
        else:
            (self._folder / retention.UNFINISHED).unlink()
            if self._rotate:
                retention.rotate(self._checkpoints, self._config.keep, self._config.keep_every, self._losses)
