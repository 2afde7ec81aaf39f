"""A queued resource of TPU VMs: each gcloud command that is run on one is written here."""

import argparse
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gptjax.errors import Refused
from launch.gcloud import ANSWER, Gcloud, Unreachable, say

BATCH = 32  # workers a command: gcloud opens an ssh connection to each, and warns of failures from 100 on
WORKER = "gptjax/launch/worker.sh"


class Worker(NamedTuple):
    """The state of a worker as reported by worker.sh."""

    node: str
    host: str
    state: str  # running, exited, lost (no exit code and no process) or none (nothing was shipped)
    code: int
    when: int  # nanoseconds, by the worker's clock
    command: str


class Pod:
    def __init__(self, args: argparse.Namespace, gcloud: Gcloud):
        self.args, self.gcloud = args, gcloud
        self.exists = False  # as far as we know; a request counts, since it may still be granted
        self.created = False  # by this program
        self.workers: dict[str, int] = {}  # their number on each node; a slice is a node

    def command(self, group: str, verb: str, *words: str) -> list[str]:
        place = [f"--zone={self.args.zone}"] + ([f"--project={self.args.project}"] if self.args.project else [])
        return ["gcloud", "compute", "tpus", group, verb, *words, *place, "--quiet"]

    def ssh(self, node: str, workers: str, remote: str) -> list[str]:
        # A machine that is gone says no goodbye: without the interval ssh would wait for it forever.
        alive = "--ssh-flag=-oServerAliveInterval=30"
        return self.command("tpu-vm", "ssh", node, f"--worker={workers}", alive, f"--command={remote}")

    def delete_command(self) -> list[str]:
        return self.command("queued-resources", "delete", self.args.name, "--force")

    def create(self) -> None:
        """Raises: Unreachable."""
        args = self.args
        if args.slices == 1:
            nodes = [f"--node-id={args.name}"]
        else:
            nodes = [f"--node-count={args.slices}", f"--node-prefix={args.name}"]
        kind = [f"--accelerator-type={args.type}", f"--runtime-version={args.runtime}"]
        tier = ["--spot"] if args.spot else ["--reserved"] if args.reserved else []
        self.exists = self.created = True  # also if this is cut short
        self.gcloud.run(self.command("queued-resources", "create", args.name, *nodes, *kind, *tier, *args.create_flag))

    def delete(self) -> None:
        """Raises: Unreachable."""
        say(f"deleting {self.args.name}")
        self.gcloud.run(self.delete_command())
        self.exists = False

    def state(self) -> tuple[str, str]:
        """Returns the state of the resource (NONE if absent) and why it failed. Raises: Unreachable, Refused."""
        try:
            text = self.gcloud.run(self.command("queued-resources", "describe", self.args.name, "--format=json"))
        except Unreachable as error:
            if "NOT_FOUND" not in str(error):
                raise
            self.exists = False
            return "NONE", ""
        self.exists = True
        found = json.loads(text)
        state, specs = found["state"], found["tpu"]["nodeSpec"]
        if state["state"] == "ACTIVE" and not self.workers:
            self.check(specs)
            self.workers = {spec["nodeId"]: self.count(spec["nodeId"]) for spec in specs}
        return state["state"], state.get("failedData", {}).get("error", {}).get("message", "")

    def check(self, specs: list[dict]) -> None:
        """Checks that the resource, new or found, has the requested slices and type. Raises: Refused."""
        asked = f"{self.args.slices} × {self.args.type}"
        there = f"{len(specs)} × {specs[0]['node'].get('acceleratorType', self.args.type)}"
        if there != asked:
            raise Refused(f"{self.args.name} exists and is {there}, not {asked}: give another --name, or delete it.")

    def count(self, node: str) -> int:
        found = json.loads(self.gcloud.run(self.command("tpu-vm", "describe", node, "--format=json")))
        return len(found["networkEndpoints"])

    def everywhere(self, call) -> list[tuple[str, str]]:
        """Runs `call(node, workers, size)`, which gives a command and its answers, for all workers.

        The commands go node by node, because `queued-resources ssh --node=all` passes over nodes in silence.
        Returns: pairs of node and stdout. Raises: Unreachable.
        """
        calls = [(node, *batch) for node, count in self.workers.items() for batch in batches(count)]
        with ThreadPoolExecutor(self.gcloud.at_once) as threads:
            futures = [threads.submit(self.gcloud.run, *call(*one)) for one in calls]
        return [(node, future.result()) for (node, *_), future in zip(calls, futures, strict=True)]

    def remote(self, text: str) -> list[tuple[str, str]]:
        """Runs a shell line on all workers, as `everywhere` does.

        Each worker prints ANSWER: gcloud exits with 0 if a worker fails whose number is above the number of workers
        in --worker.
        """
        return self.everywhere(lambda node, workers, size: (self.ssh(node, workers, f"{text} && echo {ANSWER}"), size))

    def ship(self, tree: str) -> None:
        """Raises: Unreachable."""

        def copy(node, workers, _):
            alive = "--scp-flag=-oServerAliveInterval=30"
            return self.command("tpu-vm", "scp", tree, f"{node}:gptjax.tar.gz", f"--worker={workers}", alive), 0

        self.everywhere(copy)
        unpack = "rm -rf gptjax && mkdir gptjax && tar -xzf gptjax.tar.gz -C gptjax && rm gptjax.tar.gz"
        self.remote(f"{unpack} && bash {WORKER} install")

    def statuses(self) -> list[Worker]:
        """Returns the state of all workers. Raises: Unreachable."""
        nothing = 'echo "gptjax $(hostname) none 0 0"'
        found = []
        for node, text in self.remote(f"if [ -e {WORKER} ]; then bash {WORKER} status; else {nothing}; fi"):
            for line in text.splitlines():
                if line.startswith("gptjax "):
                    _, host, state, code, when, *command = line.split(" ", 5)
                    found.append(Worker(node, host, state, int(code), int(when), "".join(command)))
        return found

    def start(self, command: list[str]) -> None:
        """Raises: Unreachable."""
        self.remote(f"bash {WORKER} start {shlex.join(command)}")

    def stop(self) -> None:
        """Raises: Unreachable."""
        self.remote(f"bash {WORKER} stop")

    def follow(self, offset: int) -> tuple[int, int]:
        """Prints the log of the first worker from a byte on. Returns the exit code of worker.sh and the byte count."""
        return self.gcloud.stream(self.ssh(next(iter(self.workers)), "0", f"bash {WORKER} follow {offset}"))

    def tail(self, worker: Worker) -> str:
        """Returns the end of a worker's log. Raises: Unreachable."""
        return "".join(text for _, text in self.remote(f"bash {WORKER} tail {worker.host}"))


def batches(count: int) -> list[tuple[str, int]]:
    """Returns values of --worker that together name `count` workers, each with the number of workers it names.

    A range of one worker, which gcloud would refuse, does not come up: big slices have a multiple of 16 machines.
    """
    if count <= BATCH:
        return [("all", count)]
    firsts = range(0, count, BATCH)
    return [(f"{first}-{min(first + BATCH, count) - 1}", min(BATCH, count - first)) for first in firsts]
