"""`gptjax train` that gets signals at a chosen moment, from itself; run as a program by the tests of preemption.

    python tests/support/signalled.py PHASE STEP SECONDS SIGNAL[,SIGNAL…] FLAGS…

So many seconds after it enters the phase for the first time from that step on (0: in the phase, however short it is; of
training they count from its first step), the first signal comes, and the others 1.2 s apart. Prints `signalled TIME
while PHASE` at each, in seconds since 1970. With SAVE_SECONDS in the environment a save takes at least so long from the
phase on.
"""

import contextlib
import os
import signal
import sys
import threading
import time

from gptjax.cli import main
from gptjax.runtime import heartbeat, supervisor

phase, step, seconds, names = sys.argv[1:5]
sys.argv[1:] = ["train", *sys.argv[5:]]
entered, heard = threading.Event(), threading.Event()
real, real_ask = heartbeat.phase, supervisor.Supervisor._ask


def send() -> None:
    entered.wait()
    while phase == "training" and heartbeat.beat().step < 1:
        time.sleep(0.005)
    time.sleep(float(seconds))
    for index, name in enumerate(names.split(",")):
        time.sleep(1.2 if index else 0)
        print(f"signalled {time.time()} while {heartbeat.beat().phase}", flush=True)
        os.kill(os.getpid(), signal.Signals[name])


@contextlib.contextmanager
def watched(name: str):
    with real(name):
        if name == phase and heartbeat.beat().step >= int(step):
            entered.set()
            if not float(seconds):
                heard.wait(30)
        yield


def ask(line, name: str) -> None:
    real_ask(line, name)
    heard.set()


def slow(real):
    def rename(source, *to):
        if entered.is_set() and "step_" in str(source):
            time.sleep(float(os.environ.get("SAVE_SECONDS", 0)))
        return real(source, *to)

    return rename


os.rename, os.replace = slow(os.rename), slow(os.replace)
heartbeat.phase, supervisor.Supervisor._ask = watched, ask
threading.Thread(target=send, daemon=True).start()
if phase == "starting":
    entered.set()
main.main()
