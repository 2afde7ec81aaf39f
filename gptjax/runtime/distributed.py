"""The processes of a run: how they find one another, agree on what they run, and wait for each other.

A run on several hosts is the same command on each of them. Process 0 alone writes and prints; what it finds or
refuses, the others learn here. Nothing here computes on a device, so a wait may take hours.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
from etils import epath

# JAX has no public name for its detection of a cluster, nor for its key-value store; both are alike in 0.10 and 0.11.
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state

from gptjax import __version__
from gptjax.errors import Refused
from gptjax.runtime import distributed, heartbeat, supervisor
from gptjax.runtime.lock import locked

FLAGS = ("coordinator", "num_processes", "process_id")
BY_HAND = "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
MAX_FACTS = 1 << 20  # characters of one process's facts
_rounds = itertools.count()


class Place(NamedTuple):
    """Of this process in its run."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int
    local_devices: list[int] | None  # which of the machine's this process sees; None: all


def join(given: dict, facts: dict, timeout: int, silence: float = 0) -> None:
    """Joins the processes of this run, if there are others. To be called before JAX looks for devices.

    From here on only process 0 has a standard output.

    Args:
      given: those of FLAGS that the command line has; without any the place is found from TPU VM, GKE, Slurm, Open MPI.
      facts: what all processes must agree on besides the versions, by name; JSON values.
      timeout: seconds to wait for the others.
      silence: seconds after which a lifeline names a host that gives no sign of life; JAX, which ends the others too,
        but names nobody, is to notice later.

    Raises:
      Refused: for flags that make no sense, processes that do not come, or that disagree.
    """
    place = _given(given) if given else _found(timeout)
    if place is None or place.num_processes == 1:
        return
    facts = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")} | facts
    facts |= {"gptjax": __version__, "--num_processes": place.num_processes}
    refusal, connections = (_receive if place.process_id == 0 else _report)(place, facts, timeout)
    if refusal:
        raise Refused(refusal)
    supervisor.connect(place.process_id, connections)
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM, and nobody asks it
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


def _given(given: dict) -> Place:
    missing = [f"--{name}" for name in FLAGS if name not in given]
    if missing:
        raise Refused(
            f"{' and '.join(f'--{name}={value}' for name, value in given.items())} without {' and '.join(missing)}: "
            f"{BY_HAND}, or none of them where a cluster says so by itself."
        )
    coordinator, num_processes, process_id = (given[name] for name in FLAGS)
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise Refused(f"--coordinator={coordinator} is no HOST:PORT of process 0: write for example 10.0.0.2:8476.")
    if num_processes < 1:
        raise Refused(f"--num_processes={num_processes} must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise Refused(
            f"--process_id={process_id} is none of the {num_processes} of --num_processes: give 0 to "
            f"{num_processes - 1}."
        )
    return Place(coordinator, num_processes, process_id, None)


def _found(timeout: int) -> Place | None:
    """What JAX finds of a cluster; None on a machine by itself."""
    in_job = "JOB_COMPLETION_INDEX" in os.environ
    try:
        with warnings.catch_warnings(action="ignore"):  # of a Kubernetes pod without the package for it
            found = Place(*ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        if "KUBERNETES_SERVICE_HOST" in os.environ and not in_job:  # a pod of no job has no others
            return None
        reason = " ".join(str(error).split())[:200]
        raise Refused(
            f"JAX finds a cluster, but not this process's place in it ({type(error).__name__}: {reason}): {BY_HAND}."
        ) from error
    if found.coordinator is None and in_job:
        raise Refused(
            f"JOB_COMPLETION_INDEX={os.environ['JOB_COMPLETION_INDEX']} says that this is a pod of an indexed job, and "
            f"the package that finds the others is missing: pip install 'jax[k8s]', or {BY_HAND}."
        )
    return found if found.coordinator else None


# Before JAX's own service starts, process 0 hears on its port what each of the others is about to do, and answers with
# a refusal or none. JAX ends the whole process with an abort where its service can't be reached or somebody is missing.
# Where there is none, the connections stay: the run's lifeline.


def _receive(place: Place, facts: dict, timeout: int) -> tuple[str, dict[int, socket.socket]]:
    """Process 0: waits until all the others have come; tells them the refusal, or that there is none."""
    came, open_connections, deadline = {0: facts}, [], time.monotonic() + timeout
    connected = {}
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    port = int(place.coordinator.rpartition(":")[2])
    try:
        server = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=place.num_processes
        )
    except OSError as error:
        return (
            f"Process 0 can't listen on port {port} of this machine ({error.strerror}): give another in --coordinator.",
            {},
        )
    with server, contextlib.ExitStack() as connections:
        refusal = ""
        while len(came) < place.num_processes and not refusal and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection = connections.enter_context(server.accept()[0])
                connection.settimeout(10)
                process_id, its_facts = json.loads(connection.makefile().readline(MAX_FACTS))
                if not (isinstance(its_facts, dict) and process_id in range(1, place.num_processes)):
                    continue
            except (OSError, RecursionError, TypeError, ValueError):  # nobody came, or somebody else than one of ours
                continue
            open_connections.append(connection)
            if process_id in came:
                refusal = f"Two processes came to {place.coordinator} as --process_id={process_id}: give each its own."
            came[process_id], connected[process_id] = its_facts, connection
        refusal = refusal or _disagreement(came) or _missing(came, place, timeout)
        for connection in open_connections:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(refusal).encode() + b"\n")
        if not refusal:
            connections.pop_all()
    return refusal, connected


def _report(place: Place, facts: dict, timeout: int) -> tuple[str, dict[int, socket.socket]]:
    """Any other process: tells process 0 what it is about to do. Returns its answer."""
    host, _, port = place.coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        connection = None
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
            connection.sendall(json.dumps([place.process_id, facts]).encode() + b"\n")
            connection.settimeout(timeout + 10)  # process 0 may have begun to wait just now
            answer = connection.makefile("rb", buffering=0).readline(MAX_FACTS)  # a buffer might swallow what follows
            return json.loads(answer), {0: connection}
        except (OSError, RecursionError, ValueError) as error:
            # After a preemption, an old process 0 may still be about to end.
            if time.monotonic() > deadline and connection is None:
                return (
                    f"Process {place.process_id} of {place.num_processes} can't reach the coordinator "
                    f"{place.coordinator} in {timeout} s ({error.strerror or error}): see that process 0 runs there "
                    "and that its port is open.",
                    {},
                )
            if time.monotonic() > deadline:
                return (
                    f"{place.coordinator} does not answer process {place.process_id} as process 0 of this run would "
                    f"({type(error).__name__}): see what it says, and that no other run has that port.",
                    {},
                )
            if connection is not None:
                connection.close()
        time.sleep(0.2)


def _disagreement(came: dict[int, dict]) -> str:
    """Names what differs and where; an empty string where nothing does."""
    first = json.loads(json.dumps(came[0]))  # as it would have come over the network
    differing = []
    for key in sorted(set().union(*came.values())):
        others = {process: facts.get(key, "nothing") for process, facts in came.items()}
        values = {json.dumps(value): value for value in others.values() if value != first.get(key, "nothing")}
        for value in values.values():
            where = [process for process, its in others.items() if its == value]
            differing.append(f"{key} ({first.get(key, 'nothing')} on process 0, {value} on {_processes(where)})")
    if not differing:
        return ""
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return f"The processes disagree on {', '.join(differing[:5])}{more}: start all with the same command and versions."


def _missing(came: dict[int, dict], place: Place, timeout: int) -> str:
    missing = [process for process in range(place.num_processes) if process not in came]
    if not missing:
        return ""
    return (
        f"Of {place.num_processes} processes only {len(came)} came to {place.coordinator} in {timeout} s, without "
        f"{_processes(missing)}: see that they are started and what they say."
    )


def _processes(numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in sorted(numbers)[:8])
    return f"process{'es' * (len(numbers) > 1)} {shown}{', …' * (len(numbers) > 8)}"


def _leave_the_output_to_process_0(place: Place) -> None:
    """Also that of libraries: Gloo prints there, in the midst of what `gptjax eval` is read for."""
    silence = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    sys.stdout = open(os.dup(1) if place.process_id == 0 else silence, "w")
    os.dup2(silence, 1)


def _fail(*error) -> None:
    """Ends this process at an exception. Left to itself, JAX would wait for the others, which wait for this one."""
    sys.__excepthook__(*error)
    fail()


def fail() -> None:
    """Ends this process of several with exit code 1, at once: also where a save's thread hangs on a lost disk."""
    sys.stdout.flush()
    if first():
        time.sleep(2)  # with process 0 goes what tells the others of failures, and they may be about to tell their own
    os._exit(1)


def first() -> bool:
    """Whether this is process 0, which writes and prints."""
    return jax.process_index() == 0


def exchange(value, name: str = "") -> list:
    """What each process gave, by process, on all of them: JSON values. Every process has to call it.

    Args:
      name: of an exchange in another thread than the main one, where no order says which is meant; a new one each time.
    """
    if not jax.distributed.is_initialized():
        return [value]
    store, number = global_state.client, None if name else next(_rounds)
    key = f"gptjax/{name or number}"
    store.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    if first():
        values = [_wait_for(f"{key}/{process}") for process in range(jax.process_count())]
        store.key_value_set(f"{key}/all", json.dumps([json.loads(text) for text in values]))
        if number:  # all have come to this round, so all have read the one before
            store.key_value_delete(f"gptjax/{number - 1}/")
    return json.loads(_wait_for(f"{key}/all"))


def forget(name: str) -> None:
    """Drops what was exchanged under names that begin with `name/`, which all processes have read by now."""
    if jax.distributed.is_initialized() and first():
        global_state.client.key_value_delete(f"gptjax/{name}/")


def _wait_for(key: str) -> str:
    """However long it takes; where a process dies meanwhile, the lifeline or JAX's heartbeat ends the others."""
    with heartbeat.waiting():
        while True:
            try:
                return global_state.client.blocking_key_value_get(key, 60_000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


@contextlib.contextmanager
def together():
    """A block that all processes leave together. Raises: Refused, in each of them, where one of them did."""
    refusal = ""
    try:
        yield
    except Refused as error:
        refusal = str(error)
    for refusal in filter(None, exchange(refusal)):
        raise Refused(refusal)


def shared(function: Callable[[], object]):
    """The JSON value that `function` has on process 0, on all of them."""
    return exchange(function() if first() else None)[0]


@contextlib.contextmanager
def owned(folder: epath.Path):
    """A block in which this run alone works in `folder`, which is made if need be. All processes of the run enter it.

    Raises: Refused, naming the other's host and process.
    """
    with contextlib.ExitStack() as lock:
        with distributed.together():
            if distributed.first():
                remedy = "wait until it ends, stop it, or give another --workdir"
                lock.enter_context(locked(folder, "belongs to a run on", remedy))
        yield
