"""A gcloud for --dry-run: prints the commands that it is given, and answers as a cloud would."""

import argparse
import json
import shlex

from launch.gcloud import Gcloud, Unreachable


class Rehearsal(Gcloud):
    """Plays a run that ends well; with --dry-run=preemption the resource is preempted once during the run.

    The commands come from the same code as in a real run; only the answers are made up.
    """

    at_once = 1

    def __init__(self, args: argparse.Namespace):
        self.nodes = [args.name] if args.slices == 1 else [f"{args.name}-{number}" for number in range(args.slices)]
        # Machines have 4 chips, but for these two and what is smaller.
        self.workers = 1 if args.type in ("v5litepod-8", "v6e-8") else max(1, args.chips // 4)
        self.type = args.type
        self.preemption = args.dry_run == "preemption"
        self.states = []  # of the resource, the next one first; the last one stays
        self.worker = "none 0 0"

    def run(self, command: list[str], answers: int = 0) -> str:
        print(shlex.join(command), flush=True)
        group, verb = command[3:5]
        if group == "queued-resources":
            return self.resource(verb)
        if verb == "describe":
            return json.dumps({"networkEndpoints": [{}] * self.workers})
        return f"gptjax worker {self.worker}\n" * answers

    def resource(self, verb: str) -> str:
        if verb == "create":
            self.states = ["WAITING_FOR_RESOURCES", "ACTIVE"]
        elif verb == "delete":
            self.states, self.worker = [], "none 0 0"
        elif not self.states:
            raise Unreachable("NOT_FOUND")
        else:
            state = self.states[0] if len(self.states) == 1 else self.states.pop(0)
            specs = [{"nodeId": node, "node": {"acceleratorType": self.type}} for node in self.nodes]
            return json.dumps({"state": {"state": state}, "tpu": {"nodeSpec": specs}})
        return ""

    def stream(self, command: list[str]) -> tuple[int, int]:
        print(shlex.join(command), flush=True)
        if self.preemption:
            self.preemption, self.states = False, ["SUSPENDED"]
            return 255, 0
        self.worker = "exited 0 0"
        return 0, 0

    def sleep(self, seconds: float) -> None:
        pass
