"""The supervisor: a thread that connects a run's processes, and answers signals while the main thread compiles.

During the run each process holds a TCP connection to process 0 and sends a beat (heartbeat.py) every second; process 0
sends beats to all. A closed connection means that a process is gone. Process 0 judges the silence and standstill of the
others (watchdog.py); the others judge the silence of process 0. Every remaining process prints the verdict, leaves
stacks in WORKDIR/hosts/N.stacks.txt and ends with exit code 75: the same command resumes from the last checkpoint. JAX
alone would notice later and name nobody.

Messages are JSON objects with one key, one per line:
    beat: …                    beat of the sender
    stop: why                  to process 0: the sender got a signal
    hold: why                  from process 0: wait at the next tick, and answer
    held: ticks                the answer
    after: [ticks, why]        from process 0: stop after so many ticks (preemption.py)
    verdict: [sentence, code]  from process 0: end at once
    end: [sentence, code]      the sender ends by itself; with code 0 in order
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

from gptjax.errors import TRY_AGAIN, Preempted, Refused
from gptjax.runtime import heartbeat, preemption, watchdog
from gptjax.runtime.heartbeat import Beat
from gptjax.runtime.watchdog import WatchdogConfig

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
# Phases with nothing unsaved, in which the process may end at once. In all others the main thread stops at a tick. A
# rollback also compiles, but returns to a saved state.
SAVED = "starting", "preparing data", "compiling", "restoring", "sampling"
SAME_SECONDS = 1.0  # some launchers signal a process and then the process group; a repeat within this time is ignored
REFUSED_SECONDS = 2.0  # most refusals happen on all processes, and each prints the refusal itself within this time
FAREWELL_SECONDS = 3.0  # for others to hear the reason; when process 0 ends, JAX aborts the others within 0.1 s


class Peer:
    """The other end of a connection."""

    def __init__(self, connection: socket.socket, process: int):
        self.connection, self.unread = connection, b""
        self.beat = dataclasses.replace(heartbeat.beat(), process=process, host="its host", pid=0)
        self.heard = time.monotonic()
        self.ended = False

    def age(self) -> float:
        return time.monotonic() - self.heard


class Supervisor(threading.Thread):
    """The thread that this module describes. The main thread calls only `connect`, `watch` and `leave`."""

    def __init__(self):
        super().__init__(name="supervisor", daemon=True)
        self.stop = preemption.begin()
        self.process, self.peers = 0, {}
        self.config: WatchdogConfig | None = None
        self._selector = selectors.DefaultSelector()
        self._ear, self.signalled = socket.socketpair()  # carries a signal's number, or 0 to wake the thread
        self._ear.setblocking(False)
        self.signalled.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, self._hear)
        self._due, self._leaving = 0.0, None  # time of the next beat; arguments of `leave`
        self._asked_at, self._why = None, ""  # time of the first signal, and the reason to stop
        self._held, self._agreed = {}, False  # ticks by process; whether the last tick is agreed
        self._sentence = None  # a pending end announced by another process: (time, sentence, code)

    def connect(self, process: int, connections: dict[int, socket.socket]) -> None:
        heartbeat.number(process)
        self.process = process
        self.peers = {number: Peer(connection, number) for number, connection in connections.items()}
        for peer in self.peers.values():
            peer.connection.settimeout(5)
            peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(peer.connection, selectors.EVENT_READ, lambda peer=peer: self._receive(peer))
        self._due = 0.0
        self.signalled.send(b"\0")

    def watch(self, config: WatchdogConfig) -> None:
        self.config = config

    def leave(self, sentence: str, code: int) -> None:
        """Tells the other processes that the run ends on this process, and ends the thread."""
        self._leaving = sentence, code
        self.signalled.send(b"\0")
        self.join(FAREWELL_SECONDS)

    def run(self) -> None:
        try:
            self._serve()
        except Exception:  # without this thread, signals and the other processes would go unheard
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exc()
            os._exit(TRY_AGAIN)

    def _serve(self) -> None:
        beaten = time.monotonic()
        while self._leaving is None:
            for key, _ in self._selector.select(max(0.0, self._due - time.monotonic())):
                key.data()
            if time.monotonic() >= self._due:
                late = time.monotonic() - beaten - 1
                if late > 2:  # the whole process stood still, and could not hear the others
                    heartbeat.excuse(late)
                    for peer in self.peers.values():
                        peer.heard += late
                beaten = time.monotonic()
                self._due = beaten + 1
                self._beat()
        self._tell_all({"end": self._leaving})

    def _beat(self) -> None:
        own = heartbeat.beat()
        self._tell_all({"beat": dataclasses.asdict(own)})
        if self._sentence and time.monotonic() > self._sentence[0]:
            self._end(*self._sentence[1:])
        if self.config is None:
            return
        present = [peer for peer in self.peers.values() if not peer.ended]
        silent = [watchdog.silent(p.beat, p.age()) for p in present if p.age() > self.config.silent_seconds]
        if silent:
            self._end(" and ".join(silent), TRY_AGAIN)
        if self.process == 0:
            beats = [own]
            for peer in present:
                beats.append(dataclasses.replace(peer.beat, idle_seconds=peer.beat.idle_seconds + peer.age()))
            if stuck := watchdog.at_fault(beats, self.config):
                self._end(watchdog.stuck(stuck), TRY_AGAIN)

    # Messages

    def _tell(self, peer: Peer, message: dict) -> None:
        with contextlib.suppress(OSError):  # `_receive` notices that a peer is gone
            peer.connection.sendall(json.dumps(message).encode() + b"\n")

    def _tell_all(self, message: dict) -> None:
        for peer in self.peers.values():
            if not peer.ended:
                self._tell(peer, message)

    def _receive(self, peer: Peer) -> None:
        try:
            received = peer.connection.recv(1 << 16)
        except OSError:
            received = b""
        *lines, peer.unread = (peer.unread + received).split(b"\n")
        for line in lines:
            for kind, value in json.loads(line).items():
                self._take(peer, kind, value)
        if not received:
            self._selector.unregister(peer.connection)
            if not peer.ended:
                self._end(watchdog.gone(peer.beat, peer.age()), TRY_AGAIN)

    def _take(self, peer: Peer, kind: str, value) -> None:
        peer.heard = time.monotonic()
        if kind == "beat":
            peer.beat = Beat(**value)
        elif kind == "stop":
            self._hold(value)
        elif kind == "hold":
            self._tell(peer, {"held": self.stop.hold()})
        elif kind == "held":
            self._held[peer.beat.process] = value
            self._agree()
        elif kind == "after":
            self.stop.after(*value)
        elif kind == "verdict":
            self._end(*value)
        elif kind == "end":
            sentence, code = value
            peer.ended = True
            self._agree()
            if code:
                wait = REFUSED_SECONDS if code == 2 else 0
                self._sentence = time.monotonic() + wait, f"{watchdog.described(peer.beat)}, {sentence}", code

    # Signals

    def _hear(self) -> None:
        for number in self._ear.recv(64):
            if number not in SIGNALS:  # a wake-up, or another signal that Python handles
                continue
            if self._asked_at is None:
                self._asked_at = time.monotonic()
                self._ask(signal.Signals(number).name)
            elif time.monotonic() - self._asked_at > SAME_SECONDS:
                say(f"a second {signal.Signals(number).name}: ending at once; {ON_DISK}")
                os._exit(TRY_AGAIN)

    def _ask(self, name: str) -> None:
        own = heartbeat.beat()
        why = f"{name} on {own.host}" + (f" (process {own.process})" if self.peers else "")
        if own.phase in SAVED:
            self._tell_all({"end": [f"was ended by {name}", TRY_AGAIN]})
            say(f"{why} while {own.phase}: nothing is unsaved, and {ON_DISK}")
            in_time(heartbeat.withdraw)
            self._exit(TRY_AGAIN)
        say(f"{why} while {own.phase}, after step {own.step}: stopping at the next step; a second one ends at once")
        if self.process == 0:
            self._hold(why)
        else:
            self._tell(self.peers[0], {"stop": why})

    def _hold(self, why: str) -> None:
        if not self._held:
            self._why = why
            self._tell_all({"hold": why})
            self._held[0] = self.stop.hold()
            self._agree()

    def _agree(self) -> None:
        answered = all(number in self._held or peer.ended for number, peer in self.peers.items())
        if self._held and answered and not self._agreed:
            self._agreed = True
            most = max(self._held.values())
            self._tell_all({"after": [most, self._why]})
            self.stop.after(most, self._why)

    # The end

    def _end(self, sentence: str, code: int) -> None:
        """Ends all processes with a sentence that names the culprit, whatever the main thread is doing."""
        if self.process == 0:
            self._tell_all({"verdict": [sentence, code]})
        own = heartbeat.beat()
        here = f"; process {own.process} ({own.host}) was {own.phase}, after step {own.step}" if self.peers else ""
        say(f"{sentence}{here}.")
        in_time(lambda: say(f"stacks of all threads: {heartbeat.leave_stacks(sentence)}"))
        if code == TRY_AGAIN:
            say(ON_DISK)
        self._exit(code)

    def _exit(self, code: int) -> None:
        deadline = time.monotonic() + FAREWELL_SECONDS
        waited_for = [peer.connection for peer in self.peers.values() if self.process == 0 and not peer.ended]
        for connection in waited_for:
            with contextlib.suppress(OSError):
                while time.monotonic() < deadline:
                    connection.settimeout(max(0.01, deadline - time.monotonic()))
                    if not connection.recv(1 << 16):
                        break
        os._exit(code)


ON_DISK = f"the same command goes on from the last checkpoint (exit code {TRY_AGAIN})"
_current: Supervisor | None = None


def say(sentence: str) -> None:
    """Prints a sentence to stderr, from any process and thread."""
    with contextlib.suppress(OSError, ValueError):  # stderr has no reader any more, or is closed
        print(f"gptjax: {sentence}", file=sys.stderr, flush=True)


def in_time(function: Callable[[], None]) -> None:
    """Calls a function that needs the file system, and waits a limited time, because the file system may hang."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(FAREWELL_SECONDS)


def connect(process: int, connections: dict[int, socket.socket]) -> None:
    """Takes over the connections between a run's processes, by process: to process 0, or from process 0 to all."""
    if _current is not None:
        _current.connect(process, connections)
    else:  # a command without a supervisor
        for connection in connections.values():
            connection.close()


def watch(config: WatchdogConfig) -> None:
    """Starts the watch: a process that stands still too long, or is silent, is named, and the run ends."""
    assert _current is not None
    _current.watch(config)


@contextlib.contextmanager
def alive():
    """Context manager: SIGTERM, SIGINT and SIGHUP stop the run in order; the other processes learn how it ends."""
    global _current
    heartbeat.begin()
    current = _current = Supervisor()
    # Python passes the signal's number to the thread from C; a Python handler would have to wait for the main thread.
    wakeup = signal.set_wakeup_fd(current.signalled.fileno(), warn_on_full_buffer=False)
    # nohup, which lets a run outlive the terminal, has SIGHUP ignored.
    numbers = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    current.start()
    threading.Thread(target=heartbeat.write, name="heartbeat", daemon=True).start()
    sentence, code, in_order = "", 0, True
    try:
        yield
    except Refused as refusal:
        sentence, code = f"refused: {refusal}", 2
        raise
    except Preempted:
        raise
    except BaseException as error:
        sentence, code, in_order = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", 1, False
        _hear_of_others(current, error)
        raise
    finally:
        current.leave(sentence, code)
        in_time(heartbeat.withdraw if in_order else heartbeat.end)
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _current = None


def _hear_of_others(current: Supervisor, error: BaseException) -> None:
    """Waits for the verdict on a lost process: collectives fail soon after a process is gone or stopped."""
    if current.peers and current.config and isinstance(error, RuntimeError):  # JAX's own errors are RuntimeErrors
        seconds = current.config.silent_seconds + FAREWELL_SECONDS
        say(f"{type(error).__name__}; waiting up to {seconds:.0f} s to hear whether another process is lost")
        time.sleep(seconds)
