import signal
import sys

import pytest

from benchmarks import chaos


@pytest.mark.slow
def test_a_run_that_is_killed_eight_times_loses_nothing(tmp_path):
    """In most phases once; `python -m benchmarks.chaos` has all of them, as often as one likes."""
    rows = chaos.chaos(8, 1, tmp_path)
    assert sum(kills for _, kills, _, _ in rows) == 8
    for phase, kills, resumed, equal in rows:
        assert (resumed, equal) == (kills, kills), phase


def test_a_start_that_hangs_is_none_that_was_killed(tmp_path):
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert chaos.killed(argv, tmp_path / "run", "training", 0, limit=0.5) == (None, "starting")
    assert chaos.killed(argv, tmp_path / "run", "starting", 0, limit=5) == (-signal.SIGKILL, "starting")


GOES_ON = "going on from the checkpoint of step 12\n"
COMPLETE = "The run in /run is complete at step 12 of num_steps=12."


@pytest.mark.parametrize("code, phase, log, step, resumed", [
    (-9, "training", GOES_ON, 12, True),
    (-9, "training", GOES_ON + GOES_ON.replace("12", "6"), 12, True),  # it went back
    (-9, "training", GOES_ON, 18, False),
    (-9, "training", GOES_ON, 0, False),
    (-9, "training", "", 12, False),  # silently from the beginning
    (-9, "training", "", 0, True),
    (-9, "restoring", "", 12, True),  # before it could
    (-9, "starting", GOES_ON, 6, False),
    (0, "sampling", GOES_ON, 12, True),
    (0, "starting", COMPLETE, 12, True),
    (0, "starting", "", 12, False),
    (1, "training", GOES_ON, 12, False),
    (None, "training", GOES_ON, 12, False),
])  # fmt: skip
def test_what_counts_as_resumed(code, phase, log, step, resumed):
    assert chaos.resumed(code, phase, log, step) == resumed
