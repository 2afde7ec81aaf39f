"""Rendezvous: finds the place of this process in a run, and checks that all processes agree before JAX joins them."""

import contextlib
import json
import os
import re
import socket
import time
import warnings
from typing import NamedTuple, cast

# JAX has no public name for cluster detection, which is the same in 0.10 and 0.11.
from jax._src.clusters import ClusterEnv

from gptjax.errors import Refused

FLAGS = ("coordinator", "num_processes", "process_id")
BY_HAND = "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
MAX_FACTS = 1 << 20  # most characters of one process's facts


class Place(NamedTuple):
    """The place of this process in the run."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int
    local_devices: list[int] | None  # the machine's devices that this process sees; None: all


def given(flags: dict) -> Place:
    """Checks the flags of a command line. Raises: Refused."""
    missing = [f"--{name}" for name in FLAGS if name not in flags]
    if missing:
        raise Refused(
            f"{' and '.join(f'--{name}={value}' for name, value in flags.items())} without {' and '.join(missing)}: "
            f"{BY_HAND}, or none of these flags on a cluster that sets them itself."
        )
    coordinator, num_processes, process_id = (flags[name] for name in FLAGS)
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise Refused(f"--coordinator={coordinator} must be HOST:PORT of process 0, for example 10.0.0.2:8476.")
    if num_processes < 1:
        raise Refused(f"--num_processes={num_processes} must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise Refused(
            f"--process_id={process_id} must be from 0 to {num_processes - 1}, below --num_processes={num_processes}."
        )
    return Place(coordinator, num_processes, process_id, None)


def found(timeout: int) -> Place | None:
    """Returns the place that JAX detects in a cluster; None on a single machine."""
    in_job = "JOB_COMPLETION_INDEX" in os.environ
    # JAX reads SLURM_NTASKS, which counts the tasks of an interactive allocation; the shell there is a step of one.
    if "SLURM_NTASKS" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ["SLURM_NTASKS"] = os.environ["SLURM_STEP_NUM_TASKS"]
    try:
        with warnings.catch_warnings(action="ignore"):  # JAX warns in a Kubernetes pod without the kubernetes package
            detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        if "KUBERNETES_SERVICE_HOST" in os.environ and not in_job:  # a pod outside a job runs alone
            return None
        reason = " ".join(str(error).split())[:200]
        raise Refused(
            f"JAX finds a cluster, but not this process's place there ({type(error).__name__}: {reason}): {BY_HAND}."
        ) from error
    if detected[0] is None and in_job:
        raise Refused(
            f"JOB_COMPLETION_INDEX={os.environ['JOB_COMPLETION_INDEX']} says that this is a pod of an indexed job, but "
            f"the package that finds the other pods is missing: pip install 'jax[k8s]', or {BY_HAND}."
        )
    # JAX sets coordinator, number of processes and process id together, or none of them.
    return Place(*cast(tuple[str, int, int, list[int] | None], detected)) if detected[0] else None


# Before JAX's own service starts, every other process reports facts on the port of process 0. Process 0 answers with a
# refusal, or with an empty text. JAX alone would abort the process if the service can't be reached or a process is
# missing. Without a refusal the connections stay open, for the supervisor.
def receive(place: Place, facts: dict, timeout: int) -> tuple[str, dict[int, socket.socket]]:
    """Process 0: waits for all others, and sends each the refusal, empty if there are none. Returns both."""
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
            f"Process 0 can't listen on port {port} of this machine ({error.strerror}): give another --coordinator.",
            {},
        )
    with server, contextlib.ExitStack() as connections:
        refusal = ""
        while len(came) < place.num_processes and not refusal and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection = connections.enter_context(server.accept()[0])
                connection.settimeout(10)
                process_id, reported = json.loads(connection.makefile().readline(MAX_FACTS))
                if not (isinstance(reported, dict) and process_id in range(1, place.num_processes)):
                    continue
            except (OSError, RecursionError, TypeError, ValueError):  # nobody came, or a stranger
                continue
            open_connections.append(connection)
            if process_id in came:
                refusal = f"Two processes came to {place.coordinator} as --process_id={process_id}: give each its own."
            came[process_id], connected[process_id] = reported, connection
        refusal = refusal or _disagreement(came) or _missing(came, place, timeout)
        for connection in open_connections:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(refusal).encode() + b"\n")
        if not refusal:
            connections.pop_all()
    return refusal, connected


def report(place: Place, facts: dict, timeout: int) -> tuple[str, dict[int, socket.socket]]:
    """Any other process: reports the facts to process 0. Returns the answer and the connection to process 0."""
    host, _, port = place.coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        connection = None
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
            connection.sendall(json.dumps([place.process_id, facts]).encode() + b"\n")
            connection.settimeout(timeout + 10)  # process 0 may only just have begun to wait
            answer = connection.makefile("rb", buffering=0).readline(MAX_FACTS)  # a buffer might swallow later messages
            return json.loads(answer), {0: connection}
        except (OSError, RecursionError, ValueError) as error:
            # After a preemption, an old process 0 may still be shutting down.
            if time.monotonic() > deadline and connection is None:
                return (
                    f"Process {place.process_id} of {place.num_processes} can't reach the coordinator "
                    f"{place.coordinator} in {timeout} s ({getattr(error, 'strerror', None) or error}): check that "
                    "process 0 runs there and that the port is open.",
                    {},
                )
            if time.monotonic() > deadline:
                return (
                    f"{place.coordinator} does not answer process {place.process_id} as process 0 of this run would "
                    f"({type(error).__name__}): read the output of process 0, and check that no other run uses "
                    "that port.",
                    {},
                )
            if connection is not None:
                connection.close()
        time.sleep(0.2)


def _disagreement(came: dict[int, dict]) -> str:
    """Names the facts that differ and the processes; an empty string if all facts agree."""
    first = json.loads(json.dumps(came[0]))  # the same form as facts that came over the network
    differing = []
    for key in sorted(set().union(*came.values())):
        others = {process: facts.get(key, "nothing") for process, facts in came.items()}
        values = {json.dumps(value): value for value in others.values() if value != first.get(key, "nothing")}
        for value in values.values():
            where = [process for process, other in others.items() if other == value]
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
        f"{_processes(missing)}: check that all are started, and read their output."
    )


def _processes(numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in sorted(numbers)[:8])
    return f"process{'es' * (len(numbers) > 1)} {shown}{', …' * (len(numbers) > 8)}"
