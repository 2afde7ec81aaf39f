"""Writes a run's rows to metrics.jsonl, TensorBoard and a tracker. A failure there is a single warning."""

import contextlib
import json
import sys
import time
import types
import typing
from collections.abc import Callable

from etils import epath

from gptjax.runtime import heartbeat
from gptjax.runtime.files import write_whole
from gptjax.training.monitoring.records import rows_until

# tensorboardX imports torch (two seconds) and Google's client (0.2 s) where they are installed. A local folder needs
# neither. None is how Python says that a module can't be had.
MODULES = typing.cast(dict[str, types.ModuleType | None], sys.modules)
NEEDLESS = {name: MODULES.setdefault(name, None) for name in ("torch", "google.cloud.storage")}
from tensorboardX import record_writer  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.proto.summary_pb2 import Summary  # noqa: E402

for name, module in NEEDLESS.items():
    if module is None:
        del sys.modules[name]

FLUSH_SECONDS = 120  # between flushes of the event file, and of metrics.jsonl on gs://, where a flush sends all rows


class Writers:
    """Writes the rows of a workdir from a step on."""

    def __init__(
        self,
        folder: epath.Path,
        start: int,
        bar,
        tracker: Callable | None = None,
        rows: list[dict] | None = None,
    ):
        """Opens the files; the rows of metrics.jsonl up to `start` stay, as `rows`.

        Args:
          folder: the workdir.
          start: completed updates.
          bar: prints the warnings.
          tracker: returns a function of a step and a row (trackers.py).
          rows: all rows of metrics.jsonl, if they are read already.
        """
        self._metrics, self._tensorboard = folder / "metrics.jsonl", folder / "tensorboard"
        self._on_a_bucket = "://" in str(folder)
        self._bar, self._failed, self._flushed = bar, set(), time.monotonic()
        self.rows, self._file, self._board, self._track = [], None, None, None
        with self._or_warn(self._metrics):
            rows = rows_until(self._metrics, start) if rows is None else rows
            self.rows = [row for row in rows if row["step"] <= start]
            lines = "".join(json.dumps(row) + "\n" for row in self.rows).encode()
            write_whole(self._metrics, lines)
            self._file = _Rewritten(self._metrics, lines) if self._on_a_bucket else self._metrics.open("ab")
        with self._or_warn(self._tensorboard):
            self._board = Board(self._tensorboard, start)
        if tracker:
            with self._or_warn("the tracker"):
                self._track = tracker()

    @contextlib.contextmanager
    def _or_warn(self, path: epath.Path | str):
        """Context manager that turns any exception into a warning, printed once per path."""
        try:
            yield
        except Exception as error:
            if path not in self._failed:
                self._failed.add(path)
                reason = f"{type(error).__name__}: {error}"
                self._bar.print(f"warning: {path} can't be written ({reason}); the run goes on without it")

    def write(self, row: dict) -> None:
        """Writes a row; in metrics.jsonl the row also has the time, in seconds since 1970."""
        if self._file:  # rows that a full disk refused stay in the buffer, as far as they fit, and go with a later row
            with self._or_warn(self._metrics):
                self._file.write(json.dumps(row | {"time": round(time.time(), 3)}).encode() + b"\n")
                if not self._on_a_bucket:
                    self._file.flush()
        if self._board and self._tensorboard not in self._failed:  # readers find nothing after half a record
            with self._or_warn(self._tensorboard):
                self._board.write(row)
        if self._track:
            with self._or_warn("the tracker"):
                self._track(row["step"], {name: value for name, value in row.items() if name != "step"})
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        with heartbeat.phase("logging"):  # a bucket that does not answer may take longer than a step is allowed to
            if self._file:
                with self._or_warn(self._metrics):
                    self._file.flush()
            if self._board and self._tensorboard not in self._failed:
                with self._or_warn(self._tensorboard):
                    self._board.flush()

    def close(self) -> None:
        self.flush()
        for path, file in ((self._metrics, self._file), (self._tensorboard, self._board)):
            if file:
                with self._or_warn(path):
                    file.close()


class _Rewritten:
    """A file on a bucket, where nothing can be appended: each flush writes the whole file again."""

    def __init__(self, path: epath.Path, content: bytes):
        self._path, self._content, self._sent = path, bytearray(content), len(content)

    def write(self, line: bytes) -> None:
        self._content += line

    def flush(self) -> None:
        if self._sent < (size := len(self._content)):
            self._path.write_bytes(bytes(self._content))
            self._sent = size

    close = flush


class Board:
    """Writes TensorBoard's event file in the thread of the caller.

    The library's SummaryWriter writes in a thread; if a full disk ends that thread, all callers hang.
    """

    def __init__(self, folder: epath.Path, start: int):
        """Makes TensorBoard forget the events of other files after `start`."""
        if "://" in str(folder):
            from google.cloud import storage

            record_writer.storage, record_writer.GCS_ENABLED = storage, True
        record_writer.directory_check(str(folder))
        self._events = EventsWriter(str(folder / "events"), f".{start}")
        again = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=again))
        self.flush()

    def write(self, row: dict) -> None:
        """Writes the numbers of a row at the row's step."""
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._events.write_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()
