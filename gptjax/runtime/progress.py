"""Shows progress: a bar on a terminal, plain lines in a log file."""

import contextlib
import shutil
import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

NARROW, WIDE = 64, 100  # columns from which the time that is left, and the bar, are shown


@contextlib.contextmanager
def progress(description: str, total: int | None, start: int = 0, plain_seconds: float = 5.0):
    """Context manager: a bar that counts from `start` to `total` (None: unknown), closed also by an exception.

    If stdout is not a terminal, each `update` prints a line, at most once every `plain_seconds` (0: every update). The
    last line is always printed.
    """
    if not sys.stdout.isatty():
        bar = PlainBar(description, total, start, plain_seconds)
        try:
            yield bar
        finally:
            bar.close()
        return
    # On a narrow terminal the bar goes first, then the time that is left, then the end of the text; the count stays.
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = [
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", table_column=rest),
    ]
    width = shutil.get_terminal_size().columns
    columns += [BarColumn(bar_width=20)] * (width >= WIDE) + [TimeRemainingColumn()] * (width >= NARROW)
    with Progress(*columns, expand=True) as rich:
        yield Bar(rich, rich.add_task(description, total=total, completed=start, text=""))


class Bar:
    """A bar on a terminal."""

    def __init__(self, rich: Progress, task):
        self._rich, self._task = rich, task

    def update(self, completed: int, text: str = ""):
        """Moves the bar to `completed` and shows `text` beside it."""
        self._rich.update(self._task, completed=completed, text=text)

    def print(self, line: str):
        """Prints a line verbatim above the bar: brackets are not markup."""
        self._rich.console.print(line, markup=False, highlight=False, soft_wrap=True)


class PlainBar:
    """The same two methods, printing lines for a log file."""

    def __init__(self, description: str, total: int | None, start: int, plain_seconds: float):
        self._description, self._total, self._start, self._plain_seconds = description, total, start, plain_seconds
        self._began = self._printed = time.monotonic()
        self._waiting = ""

    def update(self, completed: int, text: str = ""):
        now, total = time.monotonic(), self._total
        parts = [f"{self._description} {completed:,}" + (f"/{total:,}" if total else "")] + [text] * bool(text)
        if total and self._start < completed < total:
            seconds = (now - self._began) * (total - completed) / (completed - self._start)
            parts.append(f"{duration(seconds)} left")
        self._waiting = " · ".join(parts)
        if now - self._printed >= self._plain_seconds:
            self._printed = now
            self.close()

    def close(self):
        if self._waiting:
            print(self._waiting, flush=True)
        self._waiting = ""

    def print(self, line: str):
        print(line, flush=True)


def duration(seconds: float) -> str:
    """Formats `seconds` as 0:42, 12:05 or 3:00:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
