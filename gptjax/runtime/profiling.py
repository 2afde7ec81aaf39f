"""Measures compile time and memory in use, and records traces of training steps."""

import collections
import contextlib
import pathlib
import tempfile
import time

import jax
from etils import epath

from gptjax.runtime import distributed


@contextlib.contextmanager
def compiling():
    """Context manager around a compilation. Yields a dict with compile_seconds and compilation_cache at the end.

    compilation_cache is the outcome of JAX's persistent cache: `hit`, `miss`, or `off`.
    """
    events, facts, began = collections.Counter(), {}, time.perf_counter()

    def count(event: str, **_) -> None:
        events.update([event.rpartition("/")[2]])

    jax.monitoring.register_event_listener(count)
    try:
        yield facts
    finally:
        jax.monitoring.unregister_event_listener(count)
    asked, hits = events["compile_requests_use_cache"], events["cache_hits"]
    facts["compile_seconds"] = time.perf_counter() - began
    used = asked and jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    facts["compilation_cache"] = "off" if not used else "hit" if hits == asked else "miss"


def measured_bytes() -> int | None:
    """Returns the peak bytes in use on any device of this process; None if the platform does not report them."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)


@contextlib.contextmanager
def trace(folder: epath.Path):
    """Records a trace of process 0 and its devices in the block into `folder`, for XProf or TensorBoard."""
    if not distributed.first():
        yield
        return
    with tempfile.TemporaryDirectory() as local:  # the profiler can't write to gs://
        with jax.profiler.trace(local):
            yield
        for file in filter(pathlib.Path.is_file, pathlib.Path(local).rglob("*")):
            target = folder / file.relative_to(local)
            target.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(file).copy(target)
