"""A peer's train step beside ours: live processes on one machine that compute in turn.

Each side is a process with the Python and the libraries that it needs. It trains its own model on the tokens of
`tokens`, and does `k` more steps whenever a line `k` reaches it (`serve`). `compare` starts ours and the peer's, gives
them turns, and prints the medians and the quartiles of the rounds' ratios; load that comes and goes falls on all.
Counted alike: the shape, AdamW in float32, no dropout, one device, buffers donated, one batch again and again and no
loading of data, the number of parameters up to the padding of the vocabulary. `taskset -c 0` before it: one core.
"""

import argparse
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    layers: int
    heads: int
    width: int
    length: int
    batch: int
    vocab: int


SHAPES = {"W1": Shape(6, 6, 384, 256, 8, 65), "W2": Shape(12, 12, 768, 512, 2, 50304)}
RATE, BETA1, BETA2, DECAY, CLIP = 3e-4, 0.9, 0.95, 0.1, 1.0  # of all sides: AdamW, and the gradient's largest norm


def tokens(shape: Shape) -> np.ndarray:
    """[batch, length + 1] int32, the same for all sides; never 0, which is padding to some."""
    return np.random.default_rng(0).integers(1, shape.vocab, (shape.batch, shape.length + 1), dtype=np.int32)


def arguments(doc: str) -> argparse.ArgumentParser:
    args = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--shape", choices=SHAPES, default="W1")
    args.add_argument("--rounds", type=int, default=20)
    args.add_argument("--steps", type=int, default=3, help="that are timed in each turn, after one that is not")
    args.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # be the peer's process
    return args


def serve(build) -> None:
    """Runs the process of a side. build: returns the number of parameters, and a function that trains a step and
    returns the loss."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print too
    parameters, step = build()
    first = float(step())
    float(step())  # what a step returns may differ in layout from what it began with, and compile once more
    print(parameters, first, file=answers)
    for line in sys.stdin:
        float(step())  # fills the caches, and the other side's threads fall asleep
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        loss = float(loss)  # waits
        print(time.perf_counter() - began, loss, file=answers)


class Side:
    """The handle of a side's process."""

    def __init__(self, name: str, command: list[str]):
        self.name, self.errors = name, tempfile.TemporaryFile("w+", encoding="utf-8")
        root = pathlib.Path(__file__).resolve().parents[1]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        parameters, first = self.answer()
        self.parameters, self.first = int(parameters), float(first)

    def answer(self) -> list[str]:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit(f"{self.errors.read()[-3000:]}\n{self.name} ended with code {self.process.wait()}: see above.")
        return line.split()

    def seconds(self, steps: int) -> float:
        """Returns the mean seconds of a step over a turn of `steps` steps."""
        print(steps, file=self.process.stdin, flush=True)
        seconds, loss = self.answer()
        self.last = float(loss)
        return float(seconds) / steps


def compare(args: argparse.Namespace, peers: dict[str, list[str]], *, biases: bool) -> None:
    """Prints a table of our step and the peers'.

    Args:
      args: the flags of `arguments`.
      peers: name → the command of the process, without the flags that all sides share.
      biases: whether the peer's model has biases; ours then has biases too.
    """
    shape = SHAPES[args.shape]
    commands = {"gptjax": [sys.executable, "-m", "benchmarks.ours", *(["--biases"] if biases else [])]} | peers
    sides = [Side(name, [*command, "--serve", "--shape", args.shape]) for name, command in commands.items()]
    ours = sides[0]
    for side in sides[1:]:
        if abs(side.parameters - ours.parameters) > 127 * shape.width:
            counts = f"{side.name} has {side.parameters:,} parameters and ours {ours.parameters:,}"
            sys.exit(f"{counts}: give both the same model; only the padding of the vocabulary may differ.")
    times = {side: [] for side in sides}
    for round in range(args.rounds):
        turn = round % len(sides)
        for side in sides[turn:] + sides[:turn]:
            times[side].append(side.seconds(args.steps))

    print(f"{args.shape}: {shape}, {args.rounds} rounds of {args.steps} steps")
    print(f"{'':18}{'parameters':>12}{'loss':>18}{'tokens/s':>10}   speed of ours over it (quartiles)")
    for side in sides:
        if not (math.isfinite(side.last) and side.last < side.first):
            sys.exit(f"{side.name} does not train: its loss went from {side.first} to {side.last} on one batch.")
        ratios = [theirs / mine for theirs, mine in zip(times[side], times[ours], strict=False)]
        quartiles = ", ".join(f"{q:.3f}" for q in statistics.quantiles(ratios, n=4)) if args.rounds > 1 else "one round"
        speed = f"{statistics.median(ratios):.3f} ({quartiles})" if side is not ours else ""
        per_second = shape.batch * shape.length / statistics.median(times[side])
        loss = f"{side.first:.2f} → {side.last:.2f}"
        print(f"{side.name:18}{side.parameters:>12,}{loss:>18}{per_second:>10,.0f}   {speed}")
        side.process.stdin.close()
        side.process.wait()
