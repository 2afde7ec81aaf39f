"""Who is lost, and who is at fault when a run stands still."""

import dataclasses
from collections.abc import Sequence

from gptjax.runtime.heartbeat import Beat

# Their ticks come at a steady pace. Everything else may take long, and says nothing while it does.
STEADY = "training", "evaluating"
SLACK = 10  # times the longest that a tick has taken


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """When a process counts as lost, and the run ends with exit code 75 (try again)."""

    silent_seconds: float = 30.0  # without a beat: stopped, or cut off
    step_seconds: float = 60.0  # without going on in training or evaluating; or ten times its longest step, if more
    phase_seconds: float = 3600.0  # without going on in any other phase, such as compiling, or before two steps


def limit(beat: Beat, config: WatchdogConfig) -> float:
    """How many seconds a process may stand still at what it does."""
    if beat.phase in STEADY and beat.longest_seconds:
        return max(config.step_seconds, SLACK * beat.longest_seconds)
    return config.phase_seconds


def at_fault(beats: Sequence[Beat], config: WatchdogConfig) -> list[Beat]:
    """Those that hold up the run: who has stood still for too long, and not who waits for them.

    Where all wait (for a device, or a network that lost something), those that are behind.
    """
    busy = [beat for beat in beats if not beat.waiting]
    if busy:
        return [beat for beat in busy if beat.idle_seconds > limit(beat, config)]
    if not all(beat.idle_seconds > limit(beat, config) for beat in beats):
        return []
    behind = min(beat.ticks for beat in beats)
    return [beat for beat in beats if beat.ticks == behind]


def described(beat: Beat) -> str:
    """Who it is and where: `process 1 (node-b, pid 4711) while training, after step 23`."""
    return f"process {beat.process} ({beat.host}, pid {beat.pid}) while {beat.phase}, after step {beat.step}"


def stuck(beats: Sequence[Beat]) -> str:
    """The sentence about those at fault."""
    waits = ", waiting for its device or the others" if beats[0].waiting else ""
    return " and ".join(f"{described(beat)}, has not gone on for {beat.idle_seconds:.0f} s{waits}" for beat in beats)


def silent(beat: Beat, seconds: float) -> str:
    return f"{described(beat)}, has given no sign of life for {seconds:.1f} s: it is stopped, or cut off"


def gone(beat: Beat, seconds: float) -> str:
    return f"{described(beat)}, is gone: its connection closed {seconds:.1f} s after its last sign of life"
