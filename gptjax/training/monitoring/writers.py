"""Where a run's rows go: metrics.jsonl, TensorBoard and a tracker. What fails there is one warning, and the run goes on."""

import contextlib
import json
import sys
import time
from collections.abc import Callable

from etils import epath

from gptjax.runtime import heartbeat
from gptjax.runtime.files import write_whole
from gptjax.training.monitoring.records import rows_until

# Where torch is installed tensorboardX imports it, which takes two seconds of each start, for nothing that is used here;
# None is how Python says that a module can't be had.
TORCH = sys.modules.setdefault("torch", None)
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.proto.summary_pb2 import Summary  # noqa: E402
from tensorboardX.record_writer import directory_check  # noqa: E402

if TORCH is None:
    del sys.modules["torch"]

FLUSH_SECONDS = 120  # between flushes of the event file, and of metrics.jsonl on gs://, where each sends it whole


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
        """A block whose failure, of whatever kind, is told once and ends nothing."""
        try:
            yield
        except Exception as error:
            if path not in self._failed:
                self._failed.add(path)
                reason = f"{type(error).__name__}: {error}"
                self._bar.print(f"warning: {path} can't be written ({reason}); the run goes on without")

    def write(self, row: dict) -> None:
        """Writes a row; that of metrics.jsonl also says when, in seconds since 1970."""
        if self._file:  # rows that a full disk did not take stay in its buffer, as many as fit, and go with a later one
            with self._or_warn(self._metrics):
                self._file.write(json.dumps(row | {"time": round(time.time(), 3)}).encode() + b"\n")
                if not self._on_a_bucket:
                    self._file.flush()
        if self._board and self._tensorboard not in self._failed:  # after half a record, readers find no other
            with self._or_warn(self._tensorboard):
                self._board.write(row)
        if self._track:
            with self._or_warn("the tracker"):
                self._track(row["step"], {name: value for name, value in row.items() if name != "step"})
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        with heartbeat.phase("logging"):  # a bucket that does not answer takes longer than a step may
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
    """A file on a bucket, where nothing can be appended: each flush writes the whole anew."""

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
    """TensorBoard's event file, written by whoever calls.

    The library's SummaryWriter has a thread for it; where that ends, as on a full disk, its callers wait for ever.
    """

    def __init__(self, folder: epath.Path, start: int):
        """TensorBoard forgets what other files have from after `start`."""
        directory_check(str(folder))
        self._events = EventsWriter(str(folder / "events"), f".{start}")
        again = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=again))
        self.flush()

    def write(self, row: dict) -> None:
        """The numbers of a row, at its step."""
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._events.write_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()
