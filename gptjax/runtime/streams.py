"""The output of a process: a log that is lost, or that lacks a letter, never costs a run or its exit code."""

import contextlib
import io
import os
import select
import sys
from typing import TextIO


class _Output(io.RawIOBase):
    """Writes to a file descriptor, and drops what its reader, disk or terminal no longer takes."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        content = bytes(data)
        while content:
            try:
                content = content[os.write(self._descriptor, content) :]
            except BlockingIOError:  # a pipe that another process has set not to block
                select.select([], [self._descriptor], [])
            except OSError:  # no reader, a full disk, a terminal that is gone
                break
        return len(data)


def over(descriptor: int, like: TextIO | None) -> io.TextIOWrapper:
    """A text stream over a file descriptor, whose writes never fail.

    like: the stream in whose place it is, for the encoding and the buffering of lines.
    """
    encoding = getattr(like, "encoding", None) or "utf-8"
    lines = os.isatty(descriptor) or bool(getattr(like, "line_buffering", False))
    through = bool(getattr(like, "write_through", False))
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor)), encoding, "replace", line_buffering=lines, write_through=through
    )


def prepare() -> None:
    """Makes stdout and stderr of this process such streams. Call before any file is opened.

    A closed descriptor is opened to nothing. Otherwise the next file, a checkpoint perhaps, would get the number of
    stdout, and what a library prints.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != descriptor:  # a lower number was free
                os.dup2(nothing, descriptor)
                os.close(nothing)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
        made = over(descriptor, stream)
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)
