"""Time of compilation, memory in use, and traces of training steps."""

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
    """Around a compilation. Yields a dict that has compile_seconds and compilation_cache at the end of the block.

    The cache is JAX's persistent one: `hit`, `miss`, or `off`.
    """
    events, facts, began = collections.Counter(), {}, time.perf_counter()
    count = lambda event, **_: events.update([event.rpartition("/")[2]])
    jax.monitoring.register_event_listener(count)
    try:
        yield facts
    finally:
        jax.monitoring.unregister_event_listener(count)
    asked, hits = events["compile_requests_use_cache"], events["cache_hits"]
    facts["compile_seconds"] = time.perf_counter() - began
    used = asked and jax.config.jax_compilation_cache_dir
    facts["compilation_cache"] = "off" if not used else "hit" if hits == asked else "miss"


def measured_bytes() -> int | None:
    """The most that has been in use on one of this process's devices; None where the platform does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)


@contextlib.contextmanager
def trace(folder: epath.Path):
    """Records what process 0 and its devices do in the block, for XProf or TensorBoard, into `folder`."""
    if not distributed.first():
        yield
        return
    with tempfile.TemporaryDirectory() as local:  # the profiler knows no gs://
        with jax.profiler.trace(local):
            yield
        for file in filter(pathlib.Path.is_file, pathlib.Path(local).rglob("*")):
            target = folder / file.relative_to(local)
            target.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(file).copy(target)
