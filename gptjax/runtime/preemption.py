"""Where a run stops when it is asked to: all its processes before the same train step or evaluation batch.

A *tick* is a call before each thing that all processes do together, and every process makes the same sequence of them.
Asked to stop, each says how many ticks it has begun and from then on waits at its next one; when it hears the most that
any has begun, it goes on up to that one and stops before the next. So all stop at one step, and a step costs nothing.
"""

import threading

from gptjax.errors import Preempted
from gptjax.runtime import heartbeat


class Stop:
    """Whether to stop, and where. `tick` is the main thread's, the others are the lifeline's."""

    def __init__(self):
        self._changed = threading.Condition()
        self._held, self._last, self._reason = False, None, ""

    def tick(self) -> None:
        with self._changed:
            while self._held and self._last is None:
                self._changed.wait()
            if self._last is not None and heartbeat.ticks() >= self._last:
                raise Preempted(self._reason)
            heartbeat.tick()

    def hold(self) -> int:
        """From now on the next tick waits for `after`. Returns how many have begun."""
        with self._changed:
            self._held = True
            return heartbeat.ticks()

    def after(self, ticks: int, reason: str) -> None:
        """The tick after so many raises Preempted."""
        with self._changed:
            self._last, self._reason = ticks, reason
            self._changed.notify_all()


_stop = Stop()


def begin() -> Stop:
    """A new run, which nobody has asked to stop."""
    global _stop
    _stop = Stop()
    return _stop


def tick() -> None:
    """To be called before each thing that all processes do together. Raises: Preempted, on all at the same one."""
    _stop.tick()
