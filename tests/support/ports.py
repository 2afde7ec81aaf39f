"""Addresses and environments of processes that join one another on this machine."""

import contextlib
import os
import random
import socket

SLURM = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="localhost", SLURM_PROCID="0", SLURM_LOCALID="0")


def free_port() -> int:
    """One that is taken seconds later: below those that the system gives connections, and apart for each worker."""
    first = 20_000 + 1_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 12)
    for port in random.SystemRandom().sample(range(first, first + 1_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError(f"no port is free from {first} on")
