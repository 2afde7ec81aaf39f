"""Preemption: on request all processes of a run stop before the same train step or evaluation batch.

A *tick* is a call before each thing that all processes do together; every process makes the same sequence of ticks.
On a request to stop, each process says how many ticks have begun there, and waits at the next tick. Each then learns
the highest count of any process, goes on up to that count, and stops before the next tick. All processes thus stop at
the same step, and a normal step costs nothing.
"""

import threading

from gptjax.errors import Preempted
from gptjax.runtime import heartbeat


class Stop:
    """Holds whether to stop, and where. The main thread calls `tick`; the supervisor calls the other methods."""

    def __init__(self):
        self._changed = threading.Condition()
        self._held, self._last, self._reason = False, None, ""  # _last: ticks until the stop, once agreed

    def tick(self) -> None:
        with self._changed:
            while self._held and self._last is None:
                self._changed.wait()
            if self._last is not None and heartbeat.ticks() >= self._last:
                raise Preempted(self._reason)
            heartbeat.tick()

    def hold(self) -> int:
        """Makes the next tick wait for `after`. Returns the number of ticks begun."""
        with self._changed:
            self._held = True
            return heartbeat.ticks()

    def after(self, ticks: int, reason: str) -> None:
        """Makes the tick after so many raise Preempted."""
        with self._changed:
            self._last, self._reason = ticks, reason
            self._changed.notify_all()


_stop = Stop()


def begin() -> Stop:
    """Starts a new run, which nobody has asked to stop."""
    global _stop
    _stop = Stop()
    return _stop


def tick() -> None:
    """Must be called before each thing that all processes do together. Raises: Preempted, on all at the same tick."""
    _stop.tick()
