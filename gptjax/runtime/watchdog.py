"""Decides which process is lost, and which is at fault when a run stands still."""

import dataclasses
from collections.abc import Sequence

from gptjax.runtime.heartbeat import Beat

# Phases whose ticks come at a steady pace. Any other phase may take long without a sign.
STEADY = "training", "evaluating"
SLACK = 10  # allowed time of a tick, in multiples of the longest tick so far


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """Says when a process counts as lost; the run then ends with exit code 75 (try again)."""

    silent_seconds: float = 30.0  # without a beat: the process is stopped, or cut off
    step_seconds: float = 60.0  # without progress in training or evaluating; ten times the longest step, if more
    phase_seconds: float = 3600.0  # without progress in any other phase, such as compiling, or before two steps


def limit(beat: Beat, config: WatchdogConfig) -> float:
    """Returns the seconds that a process may stand still in the current phase."""
    if beat.phase in STEADY and beat.longest_seconds:
        return max(config.step_seconds, SLACK * beat.longest_seconds)
    return config.phase_seconds


def at_fault(beats: Sequence[Beat], config: WatchdogConfig) -> list[Beat]:
    """Returns the processes that hold up the run: those that stood still too long, but not those waiting for others.

    If all processes wait (for a device, or a network that lost a message), those with the fewest ticks.
    """
    busy = [beat for beat in beats if not beat.waiting]
    if busy:
        return [beat for beat in busy if beat.idle_seconds > limit(beat, config)]
    if not all(beat.idle_seconds > limit(beat, config) for beat in beats):
        return []
    behind = min(beat.ticks for beat in beats)
    return [beat for beat in beats if beat.ticks == behind]


def described(beat: Beat) -> str:
    """Names a process and its state: `process 1 (node-b, pid 4711) while training, after step 23`."""
    return f"process {beat.process} ({beat.host}, pid {beat.pid}) while {beat.phase}, after step {beat.step}"


def stuck(beats: Sequence[Beat]) -> str:
    """Returns the sentence about the processes at fault."""
    waits = ", waiting for its device or the others" if beats[0].waiting else ""
    return " and ".join(f"{described(beat)}, has not gone on for {beat.idle_seconds:.0f} s{waits}" for beat in beats)


def silent(beat: Beat, seconds: float) -> str:
    return f"{described(beat)}, has given no sign of life for {seconds:.1f} s: stopped, or cut off"


def gone(beat: Beat, seconds: float) -> str:
    return f"{described(beat)}, is gone: its connection closed {seconds:.1f} s after its last sign of life"
