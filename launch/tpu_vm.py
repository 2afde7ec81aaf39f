"""Runs one training command on Cloud TPU VMs, one slice or several, until it is done:

    python launch/tpu_vm.py --name=llama8b --zone=us-east5-b --type=v6e-256 --spot -- \\
        gptjax train --config=configs/llama_8b.py --workdir=gs://BUCKET/llama8b

It creates a queued resource and waits for it, ships the files that git tracks, installs them, starts the command on
all workers and follows the log of the first. After a preemption it creates the resource anew, and after exit code 75
("try again") it starts the command anew: the run goes on from the checkpoints in its workdir. In the end it deletes
the resource. The training does not need this program: leave it by Ctrl-C, and the same command follows the run again.
"""

import argparse
import itertools
import pathlib
import shlex
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # so that nothing need be installed here

from gptjax.errors import Refused
from launch.arguments import parse
from launch.gcloud import Gcloud, Unreachable, say
from launch.pod import Pod, Worker
from launch.rehearsal import Rehearsal
from launch.tree import pack

TRY_AGAIN = 75, 143  # EX_TEMPFAIL in sysexits.h; SIGTERM, by which a machine that is taken away ends what runs on it
STILL_RUNNING = 124  # of `timeout`, in worker.sh follow
FRUITLESS_STARTS, FRUITLESS_SECONDS = 3, 600


class Preempted(Exception):
    """The resource is no longer ACTIVE."""


class GivenUp(Exception):
    """A failure with an exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def run(args: argparse.Namespace, pod: Pod) -> None:
    """Runs the command until all workers have ended with 0. Raises: GivenUp, Refused."""
    with tempfile.TemporaryDirectory(prefix="gptjax-") as folder:
        tree = pack(folder)
        while True:
            acquire(args, pod)
            try:
                return work(args, pod, tree)
            except Preempted:
                say("preempted: the run goes on from its last checkpoint on a new resource")


def acquire(args: argparse.Namespace, pod: Pod) -> None:
    """Waits until the resource is ACTIVE, after creating the resource if absent. Raises: GivenUp, Refused, Unreachable.

    A failure that ends the first request only delays a later request: by then the run has started, and capacity or
    the network will return.
    """
    seen = refusal = None
    while True:
        try:
            state, why = pod.state()
            if state not in (seen, "NONE"):
                say(f"{args.name} is {state}{': ' if why else ''}{why}")
            seen = state
            if state == "ACTIVE":
                return
            if state == "NONE" and refusal and not pod.workers:
                raise GivenUp(f"{args.name} could not be created: {refusal}")
            if state == "FAILED" and pod.created and not pod.workers:
                raise GivenUp(f"the request for {args.name} failed: {why or 'gcloud gives no reason'}")
            if state == "NONE":
                refusal = request(args, pod)
            elif state in ("SUSPENDED", "FAILED"):  # preempted, or left by an earlier launch
                pod.delete()
            else:
                pod.gcloud.sleep(args.poll)
        except Unreachable as error:
            if seen is None:
                raise
            say(f"trying again in {args.poll:g} s: {error}")
            pod.gcloud.sleep(args.poll)


def request(args: argparse.Namespace, pod: Pod) -> Unreachable | None:
    """Requests the resource. Returns gcloud's error, if any; only the state of the resource shows the outcome."""
    tier = "spot" if args.spot else "reserved" if args.reserved else "on demand"
    say(f"creating {args.name}: {args.slices} × {args.type}, {args.slices * args.chips} chips, {tier}")
    try:
        pod.create()
    except Unreachable as refusal:
        say(str(refusal))
        pod.gcloud.sleep(args.poll)
        return refusal
    return None


def work(args: argparse.Namespace, pod: Pod, tree: str) -> None:
    """Starts or joins the command on an ACTIVE resource and waits for the end. Raises: Preempted, GivenUp, Refused."""
    workers = patiently(args, pod, pod.statuses)
    running = {worker.command for worker in workers if worker.state == "running"}
    if running - {" ".join(args.command)}:
        raise Refused(f"{args.name} is busy with {running.pop()!r}: give another --name, or delete it first.")
    if running:
        say(f"{args.name} is running this command already")
    else:
        install(args, pod, tree)
        start(args, pod)
    fruitless = 0
    while True:
        began = time.monotonic()
        failed = attend(args, pod)
        if failed is None:
            return
        fruitless = fruitless + 1 if time.monotonic() - began < FRUITLESS_SECONDS else 0
        what = f"ended with exit code {failed.code}" if failed.code else "was lost"
        if failed.code not in (0, *TRY_AGAIN):
            give_up(args, pod, failed, what)
        if fruitless == FRUITLESS_STARTS:
            minutes = FRUITLESS_SECONDS // 60
            give_up(args, pod, failed, f"{what}, {fruitless} times in a row within {minutes} minutes of a start")
        say(f"{failed.host} of {failed.node} {what}")
        if failed.state == "none":
            install(args, pod, tree)
        start(args, pod)


def install(args: argparse.Namespace, pod: Pod, tree: str) -> None:
    say(f"shipping to {sum(pod.workers.values())} workers, and installing")
    patiently(args, pod, lambda: pod.ship(tree))


def start(args: argparse.Namespace, pod: Pod) -> None:
    say(f"starting {shlex.join(args.command)}")
    patiently(args, pod, lambda: pod.start(args.command))


def attend(args: argparse.Namespace, pod: Pod) -> Worker | None:
    """Follows the log of the first worker until the command has ended. Raises: Preempted.

    Returns: the worker that failed first, since the others then fail for lack of that worker; None if all ended
    with 0.
    """
    offset = 0
    while True:
        code, count = pod.follow(offset)
        offset += count
        if code == STILL_RUNNING:
            check_active(pod)
            continue
        workers = patiently(args, pod, pod.statuses, tries=0)
        failed = [worker for worker in workers if worker.state in ("lost", "none") or worker.code]
        if failed:
            # A preemption ends the workers before gcloud tells of it.
            pod.gcloud.sleep(args.poll)
            check_active(pod)
            return min(failed, key=lambda worker: worker.when)  # 0 where it was lost, which nothing but a machine does
        if all(worker.state == "exited" for worker in workers):
            return None
        pod.gcloud.sleep(args.poll)


def patiently(args: argparse.Namespace, pod: Pod, call, tries: int = 5):
    """Repeats a call until it succeeds. tries: 0 means no limit. Raises: Preempted, GivenUp, Unreachable."""
    for number in itertools.count(1):
        try:
            return call()
        except Unreachable as error:
            check_active(pod)
            if number == tries and pod.created:
                raise GivenUp(f"{args.name} is ACTIVE but can't be used: {error}") from None
            if number == tries:  # what we did not make may be well, and out of sight of this machine alone
                raise
            say(f"trying again in {args.poll:g} s: {error}")
            pod.gcloud.sleep(args.poll)


def check_active(pod: Pod) -> None:
    """Raises Preempted if gcloud reports another state than ACTIVE; ignores a gcloud that does not answer."""
    try:
        state, _ = pod.state()
    except Unreachable:
        return
    if state != "ACTIVE":
        raise Preempted


def give_up(args: argparse.Namespace, pod: Pod, failed: Worker, what: str) -> None:
    """Prints the end of the worker's log. Raises: GivenUp."""
    say(f"the end of the log of {failed.host} of {failed.node}:")
    print(patiently(args, pod, lambda: pod.tail(failed)), end="", flush=True)
    if args.keep:
        patiently(args, pod, pod.stop)
    raise GivenUp(f"{failed.host} of {failed.node} {what}", failed.code or 1)


def main() -> int:
    pod = None
    code = 1
    try:
        args = parse(sys.argv[1:], __doc__)
        pod = Pod(args, Rehearsal(args) if args.dry_run else Gcloud())
        try:
            run(args, pod)
            code = 0
            say("the command has ended well")
        except GivenUp as error:
            code = error.code
            say(f"given up: {error}")
        if pod.exists and not args.keep:
            pod.delete()
    except Refused as refusal:
        print(f"tpu_vm.py: {refusal}", file=sys.stderr)
        code = 2
    except Unreachable as error:
        say(f"given up: {error}")
    except KeyboardInterrupt:
        code = 130
    if pod and pod.exists:
        if code == 130:
            say("what was started goes on without this program, and the same command follows it again")
        say(f"{args.name} still exists, and is billed; this deletes it:")
        print("    " + shlex.join(pod.delete_command()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
