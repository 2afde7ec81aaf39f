"""Joins the processes of a run, exchanges values between them, and lets them wait for each other.

A run on several hosts is the same command on each host. Process 0 alone writes and prints; the other processes learn
the findings and refusals of process 0 here. Nothing here computes on a device, so a wait may take hours.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Callable

import jax
from etils import epath

# JAX has no public name for the key-value store, which is the same in 0.10 and 0.11.
from jax._src.distributed import global_state

from gptjax import __version__
from gptjax.errors import Refused
from gptjax.runtime import distributed, heartbeat, rendezvous, streams, supervisor
from gptjax.runtime.lock import locked

_rounds = itertools.count()


def join(given: dict, facts: dict, timeout: int, silence: float = 0) -> None:
    """Joins the processes of this run, if there are others. Must be called before JAX looks for devices.

    From here on only process 0 has a standard output.

    Args:
      given: the flags of rendezvous.FLAGS on the command line; without any,
        the cluster decides (TPU VM, GKE, Slurm, Open MPI).
      facts: values that all processes must agree on besides the versions, by name; JSON values.
      timeout: seconds to wait for the others.
      silence: seconds after which the supervisor names a silent host. JAX's own timeout is set longer, because JAX
        would end the others without naming the host.

    Raises:
      Refused: for invalid flags, and for processes that are missing or disagree.
    """
    place = rendezvous.given(given) if given else rendezvous.found(timeout)
    if place is None or place.num_processes == 1:
        return
    facts = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")} | facts
    facts |= {"gptjax": __version__, "--num_processes": place.num_processes}
    refusal, connections = (rendezvous.receive if place.process_id == 0 else rendezvous.report)(place, facts, timeout)
    if refusal:
        raise Refused(refusal)
    supervisor.connect(place.process_id, connections)
    jax.config.update("jax_enable_preemption_service", False)  # JAX's service would swallow SIGTERM; gptjax has its own
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=100 + int(silence),
    )
    _leave_the_output_to_process_0(place)
    sys.excepthook = _fail


def _leave_the_output_to_process_0(place: rendezvous.Place) -> None:
    """Silences stdout on all processes but 0, including libraries: Gloo would print into the JSON of `gptjax eval`."""
    silence = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    sys.stdout = streams.over(os.dup(1) if place.process_id == 0 else silence, sys.stdout)
    os.dup2(silence, 1)


def _fail(*error) -> None:
    """Ends this process at an exception. Otherwise JAX would wait for the others, which wait for this process."""
    sys.__excepthook__(*error)
    fail()


def fail() -> None:
    """Ends this process of several at once with exit code 1, even while a save's thread hangs on a lost disk."""
    sys.stdout.flush()
    if first():
        time.sleep(2)  # the others report failures through process 0, and may be about to report their own
    os._exit(1)


def first() -> bool:
    """Says whether this is process 0, which writes and prints."""
    return jax.process_index() == 0


def exchange(value, name: str = "") -> list:
    """Collects a JSON value from each process. Returns the values by process, on all; every process must call.

    Args:
      value: the value of this process.
      name: identifies an exchange outside the main thread, where calls have no fixed order; must be new each time.
    """
    if not jax.distributed.is_initialized():
        return [value]
    store, number = _store(), None if name else next(_rounds)
    key = f"gptjax/{name or number}"
    store.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    if first():
        values = [_wait_for(f"{key}/{process}") for process in range(jax.process_count())]
        store.key_value_set(f"{key}/all", json.dumps([json.loads(text) for text in values]))
        if number:  # all processes have reached this round, so all have read the round before
            store.key_value_delete(f"gptjax/{number - 1}/")
    return json.loads(_wait_for(f"{key}/all"))


def forget(name: str) -> None:
    """Drops the values exchanged under names that begin with `name/`; all processes must have read the values."""
    if jax.distributed.is_initialized() and first():
        _store().key_value_delete(f"gptjax/{name}/")


def _store():
    """Returns JAX's key-value store, which exists in a run of several processes."""
    assert global_state.client is not None
    return global_state.client


def _wait_for(key: str) -> str:
    """Waits without limit; if a process dies meanwhile, the supervisor or JAX's heartbeat ends the others."""
    with heartbeat.waiting():
        while True:
            try:
                return _store().blocking_key_value_get(key, 60_000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


@contextlib.contextmanager
def together():
    """Context manager. If any process raises Refused inside the block, all processes raise Refused."""
    refusal = ""
    try:
        yield
    except Refused as error:
        refusal = str(error)
    for reason in filter(None, exchange(refusal)):
        raise Refused(reason)


def shared(function: Callable[[], object]):
    """Calls `function` on process 0 and returns the JSON value on all processes."""
    return exchange(function() if first() else None)[0]


@contextlib.contextmanager
def owned(folder: epath.Path):
    """Context manager in which this run alone works in `folder`, created if missing. All processes must enter.

    Raises: Refused, naming the host and process that hold the lock.
    """
    with contextlib.ExitStack() as lock:
        with distributed.together():
            if distributed.first():
                remedy = "wait until it ends, stop it, or give another --workdir"
                lock.enter_context(locked(folder, "belongs to a run on", remedy))
        yield
