"""How processes find one another and agree: what comes before JAX's own service, so threads do for processes."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from support.ports import SLURM, free_port

from gptjax.errors import Refused
from gptjax.runtime import distributed


def refusals(*arrivals, num_processes=None, timeout=20) -> list[str]:
    """What each of several arrivals, as (process_id, facts), is refused with."""
    coordinator = f"127.0.0.1:{free_port()}"

    def arrive(arrival):
        given = {"coordinator": coordinator, "num_processes": num_processes or len(arrivals), "process_id": arrival[0]}
        with pytest.raises(Refused) as refusal:
            distributed.join(given, arrival[1], timeout)
        return str(refusal.value).replace(coordinator, "HOST:PORT")

    with ThreadPoolExecutor() as threads:
        found = list(threads.map(arrive, arrivals))
    assert not jax.distributed.is_initialized()
    return found


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coordinator": "a:1", "process_id": 0}, "--coordinator=a:1 and --process_id=0 without --num_processes: give"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator=a must be HOST:PORT"),
        ({"coordinator": "a:²", "num_processes": 2, "process_id": 0}, "--coordinator=a:² must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "--num_processes=0 must be at least 1"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2 must be from 0 to 1, below .*=2"),
    ],
)
def test_flags_that_make_no_sense(given, message):
    with pytest.raises(Refused, match=message):
        distributed.join(given, {}, 1)


def test_a_disagreement_is_told_to_all_with_the_keys_and_the_processes():
    found = refusals((0, {"seed": 0, "lr": 1.0}), (1, {"seed": 3, "lr": 1.0}), (2, {"seed": 3}))
    assert set(found) == {
        "The processes disagree on lr (1.0 on process 0, nothing on process 2), seed (0 on process 0, 3 on processes "
        "1, 2): start all with the same command and versions."
    }


def test_what_was_exchanged_does_not_stay():
    """In the coordinator's memory, for as long as the run lasts."""
    code = """
import sys
import jax
from gptjax.runtime import distributed
jax.distributed.initialize(sys.argv[1], 1, 0)
assert [distributed.exchange(number) for number in range(50)] == [[number] for number in range(50)]
assert distributed.exchange("in a thread", "save-1/written") == ["in a thread"]
distributed.exchange("the last")
print(*(key for key, _ in distributed.global_state.client.key_value_dir_get("gptjax/")))
"""
    argv = [sys.executable, "-c", code, f"127.0.0.1:{free_port()}"]
    done = subprocess.run(argv, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    kept = ["gptjax/50/0", "gptjax/50/all", "gptjax/save-1/written/0", "gptjax/save-1/written/all"]
    assert sorted(done.stdout.split()) == kept, done


def test_versions_are_compared(monkeypatch):
    version = iter(["0.1.0", "0.2.0"])
    monkeypatch.setattr(distributed.importlib.metadata, "version", lambda name: next(version) if name == "jax" else "1")
    found = refusals((0, {}), (1, {}))
    assert len(set(found)) == 1 and "disagree on jax (0." in found[0]


@pytest.mark.slow
def test_who_is_missing_is_named():
    found = refusals((0, {}), (2, {}), num_processes=4, timeout=5)
    assert set(found) == {
        "Of 4 processes only 2 came to HOST:PORT in 5 s, without processes 1, 3: check that all are started, "
        "and read their output."
    }


def test_two_of_the_same_number():
    found = refusals((0, {}), (1, {}), (1, {}))
    assert set(found) == {"Two processes came to HOST:PORT as --process_id=1: give each its own."}


def test_a_coordinator_that_is_not_there():
    (found,) = refusals((1, {}), num_processes=2, timeout=1)
    assert found.startswith("Process 1 of 2 can't reach the coordinator HOST:PORT in 1 s (Connection refused): check ")


@pytest.mark.slow
def test_something_else_at_the_coordinators_port():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
        given = {"coordinator": f"127.0.0.1:{server.getsockname()[1]}", "num_processes": 2, "process_id": 1}
        threads.submit(lambda: server.accept()[0].close())
        with pytest.raises(Refused, match="does not answer process 1 as process 0 of this run would"):
            distributed.join(given, {}, 1)
        with pytest.raises(Refused, match="Process 0 can't listen on port .*Address already in use"):
            distributed.join(given | {"process_id": 0}, {}, 1)


@pytest.mark.parametrize("words", [b"[" * 100_000, b"{}", b"[[1], {}]", b"[true, 3]", b"\xff", b'["1", {}]'])
def test_strangers_at_the_port_of_process_0(words):
    """What they say is nothing, and the wait for the others goes on."""
    port = free_port()
    given = {"coordinator": f"127.0.0.1:{port}", "num_processes": 2, "process_id": 0}

    def call():
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(words + b"\n")

    with ThreadPoolExecutor() as threads:
        called = threads.submit(call)
        with pytest.raises(Refused, match="Of 2 processes only 1 came to .* without process 1:"):
            distributed.join(given, {}, 1)
        called.result()


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; of a cluster that the tests themselves run in nothing is left."""
    for name in ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize("variables", [
    {},
    SLURM | {"SLURM_NTASKS": "1"},
    SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # the shell of `salloc -n4`
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
])  # fmt: skip
def test_a_process_by_itself_joins_nothing(environment, variables, capfd):
    environment(**variables)
    with warnings.catch_warnings(action="error"):
        distributed.join({}, {}, 1)
    assert not jax.distributed.is_initialized() and capfd.readouterr() == ("", "")
    assert distributed.exchange(5) == [5] and distributed.shared(lambda: 6) == 6


def test_a_cluster_is_found_by_its_environment(environment):
    environment(**SLURM, SLURM_NTASKS="3", JAX_COORDINATOR_PORT=str(free_port()))
    with pytest.raises(Refused, match="Of 3 processes only 1 came to localhost:.* without processes 1, 2"):
        distributed.join({}, {}, 1)


def test_a_pod_of_a_job_must_find_the_others(environment):
    environment(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="3")
    with pytest.raises(Refused, match=r"JOB_COMPLETION_INDEX=3 .* --coordinator=HOST:PORT"):
        distributed.join({}, {}, 1)


def test_a_place_that_can_not_be_found(environment):
    environment(OMPI_MCA_orte_hnp_uri="1531576320.0;no address")
    with pytest.raises(Refused, match=r"JAX finds a cluster, but not .* \(\w+: .*\): give --coordinator=HOST:PORT"):
        distributed.join({}, {}, 1)
