"""The thread that keeps a run's processes in touch, and answers signals while the main thread is deep in a compiler.

Each process holds a TCP connection with process 0 for as long as the run lasts, and sends a beat (heartbeat.py) over it
every second; process 0 sends its own to all. A connection that closes is a process that is gone; process 0 judges the
others' silence and standstill (watchdog.py), they judge its silence. The verdict is printed by every process that is
left, with its stacks in WORKDIR/hosts/N.stacks.txt, and ends it with exit code 75: the same command goes on from the last
checkpoint. JAX would notice later and name nobody.

Messages are JSON objects of one key, a line each:
    beat: …                    beat of the sender
    stop: why                  to process 0, which got or is told of a signal
    hold: why                  from process 0: wait at the next tick, and answer
    held: ticks                the answer
    after: [ticks, why]        from process 0: stop after so many (preemption.py)
    verdict: [sentence, code]  from process 0: end at once
    end: [sentence, code]      the sender ends by itself; with code 0 it is done
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

SIGNALS = signal.SIGTERM, signal.SIGINT
# Phases with nothing unsaved, where ending at once loses nothing. In all others the main thread stops at a tick. A run
# also compiles where it goes back, to what is saved.
SAVED = "starting", "preparing data", "compiling", "restoring", "sampling"
SAME_SECONDS = 1.0  # some launchers send a signal to a process and to its group, which is no second request
REFUSED_SECONDS = 2.0  # a refusal is mostly one of all, each of which tells it by itself
FAREWELL_SECONDS = 3.0  # for others to hear why; when process 0 ends, JAX aborts them within 0.1 s


class Peer:
    """The other end of a connection."""

    def __init__(self, connection: socket.socket, process: int):
        self.connection, self.unread = connection, b""
        self.beat = dataclasses.replace(heartbeat.beat(), process=process, host="its host", pid=0)
        self.heard = time.monotonic()
        self.ended = False

    def age(self) -> float:
        return time.monotonic() - self.heard


class Lifeline(threading.Thread):
    """All that this module's text says, in one thread. Only `connect`, `watch` and `leave` are the main thread's."""

    def __init__(self):
        super().__init__(name="lifeline", daemon=True)
        self.stop = preemption.begin()
        self.process, self.peers, self.config = 0, {}, None
        self._selector = selectors.DefaultSelector()
        self._ear, self.signalled = socket.socketpair()  # the signal's number, or 0 to be woken
        self._ear.setblocking(False)
        self.signalled.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, self._hear)
        self._due, self._leaving = 0.0, None  # when to beat next; what `leave` was given
        self._asked_at, self._why, self._held, self._agreed = None, "", {}, False  # of a signal; ticks, by process
        self._sentence = None  # when to end by what another process said: (time, sentence, code)

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
        """The run ends on this process: tells the others, and ends this thread."""
        self._leaving = sentence, code
        self.signalled.send(b"\0")
        self.join(FAREWELL_SECONDS)

    def run(self) -> None:
        try:
            self._serve()
        except Exception:  # without this thread nobody would hear a signal, nor the other processes
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
                if late > 2:  # the whole process stood still, and so could not hear the others
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
        with contextlib.suppress(OSError):  # that it is gone is noticed where it is heard
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
            if number not in SIGNALS:  # to be woken, or another one that Python handles
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
        """Ends all processes with a sentence that names the culprit, whatever the main thread is at."""
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
_line = None


def say(sentence: str) -> None:
    """On stderr, of any process and from any thread."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
        print(f"gptjax: {sentence}", file=sys.stderr, flush=True)


def in_time(function: Callable[[], None]) -> None:
    """Calls what needs a file system, which may be what everything hangs on."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(FAREWELL_SECONDS)


def connect(process: int, connections: dict[int, socket.socket]) -> None:
    """Takes over the connections of a run's processes: of process 0 with each other, of another with process 0."""
    if _line is not None:
        _line.connect(process, connections)
    else:  # a verb that needs none
        for connection in connections.values():
            connection.close()


def watch(config: WatchdogConfig) -> None:
    """From now on who stands still for too long, or is silent, is named, and the run ends."""
    _line.watch(config)


@contextlib.contextmanager
def alive():
    """In the block SIGTERM and SIGINT stop the run in order, and the other processes are told how this one fares."""
    global _line
    heartbeat.begin()
    line = _line = Lifeline()
    # The number goes to the thread from C, whatever the main thread is at; a Python handler would wait for it.
    wakeup = signal.set_wakeup_fd(line.signalled.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    line.start()
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
        _hear_of_others(line, error)
        raise
    finally:
        line.leave(sentence, code)
        in_time(heartbeat.withdraw if in_order else heartbeat.end)
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _line = None


def _hear_of_others(line: Lifeline, error: BaseException) -> None:
    """Collectives fail soon after a process is gone or stopped. Then the verdict, which ends this one too, is due."""
    if line.peers and isinstance(error, RuntimeError):  # JAX's own are
        seconds = line.config.silent_seconds + FAREWELL_SECONDS
        say(f"{type(error).__name__}; waiting up to {seconds:.0f} s to hear whether another process is lost")
        time.sleep(seconds)
