"""Starts and ends a process quickly."""

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator

from gptjax.runtime import streams


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Imports inside this block run without Python's cyclic garbage collection.

    Nothing that a module defines is garbage, but the collector would look through all of it time and again: a third of
    a start. Afterwards the collector passes these objects over for good.
    """
    first = "jax" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    if first:
        gc.freeze()


def process(main: Callable[[], None]) -> None:
    """Runs `main`, and ends the process without taking its modules apart, which lasts a quarter of a second.

    The process ends after all threads and all other exit handlers: handlers run in the reverse order of their
    registration, and this is the first.
    """
    streams.prepare()
    codes = []

    def leave() -> None:
        if codes:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(codes[0])

    atexit.register(leave)
    try:
        main()
        codes.append(0)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            codes.append(end.code or 0)
        raise
