"""Hostile inputs to every reader: each must give a value or a refusal, in bounded time and memory, and write nothing.

    python -m benchmarks.fuzz [--inputs=110000] [--reader=NAME]

Each reader runs in a process of its own, so that one that dies is counted as well. The tests run a few hundred inputs
of the same (tests/runtime/test_hostile.py).
"""

import argparse
import collections
import contextlib
import io
import json
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, given, settings

from benchmarks import readers, stored
from gptjax.errors import Refused, one_line

KINDS = "refused", "accepted", "other"
SECONDS = 10  # for one input
MORE_BYTES = 4 << 30  # of address space that a reader may take

READERS = {
    "config.json": readers.config_json,
    "config values": readers.config_values,
    "config files": readers.config_files,
    "--config.KEY=VALUE": readers.overrides,
    "command line": readers.command_line,
    "topology, mesh, remat": readers.words,
    "metrics.jsonl": readers.metrics_rows,
    "store manifest": stored.store_manifest,
    "store files": stored.store_files,
    "tokenizer files": stored.tokenizer_files,
    "tokenizer.json of Hugging Face": stored.huggingface_files,
    "checkpoint manifest": stored.checkpoint_manifest,
    "checkpoint files": stored.checkpoint_files,
    "hosts/N.json": stored.read_status,
}


def listing(folder: pathlib.Path) -> list:
    found = ((str(path), path.lstat()) for path in sorted(folder.rglob("*")))
    return [(path, stat.st_size, stat.st_mtime_ns, stat.st_mode) for path, stat in found]


def outcome(reader: readers.Reader, given, folder: pathlib.Path) -> str:
    """`accepted`, `refused`, or what is wrong with how `reader` took an input, in words."""
    try:
        reader.place(given)
    except (OSError, ValueError):  # no such file can exist
        return "refused"
    before = listing(folder)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader.read(given)
        result = "accepted"
    except Refused as refusal:
        one_line(str(refusal)).encode()  # it can be printed
        result = "refused"
    except SystemExit as end:  # --help and --version
        result = "accepted" if end.code == 0 else f"exit code {end.code}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        result = f"{type(error).__name__} in {pathlib.Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return result if listing(folder) == before else f"wrote into the folder ({result})"


class Late(BaseException):
    """No reader catches it, as it would a TimeoutError."""


def late(*_):
    raise Late(f"no answer in {SECONDS} s")


def fuzz(name: str, inputs: int, folder: pathlib.Path, seen: Callable[[object], None] = lambda given: None) -> dict:
    """How a reader took so many inputs: {outcome: number}, and of each that is wrong the first input."""
    reader, counts, examples = READERS[name](folder), dict.fromkeys(KINDS, 0), {}

    @settings(
        max_examples=inputs, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(reader.inputs)
    def one(given):
        seen(given)
        result = outcome(reader, given, folder)
        counts[result if result in counts else "other"] += 1
        if result not in counts:
            examples.setdefault(result, repr(given)[:500])

    previous = signal.signal(signal.SIGALRM, late)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            one()
    finally:
        signal.signal(signal.SIGALRM, previous)
    return counts | {"examples": examples}


def child(name: str, inputs: int, last: str) -> None:
    """Prints the result of one reader as JSON, and what it took of memory. Keeps what it tries in the file `last`."""
    used = int(pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES,) * 2)

    def seen(given) -> None:
        pathlib.Path(last).write_text(repr(given)[: 1 << 20], encoding="utf-8", errors="backslashreplace")

    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = fuzz(name, inputs, pathlib.Path(folder), seen)
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps(result | {"megabytes": more // 1024}))


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--inputs", type=int, default=110_000, help="of all readers together")
    args.add_argument("--reader", choices=READERS, help="only this one")
    args.add_argument("--last", help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.last:
        return child(args.reader, args.inputs, args.last)
    print("| reader | inputs | refused | accepted | other | MB | s |\n|---|---|---|---|---|---|---|")
    totals = collections.Counter()
    for name in [args.reader] if args.reader else READERS:
        inputs = args.inputs if args.reader else -(-args.inputs // len(READERS))
        began = time.monotonic()
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as last:
            command = [sys.executable, "-m", "benchmarks.fuzz", f"--reader={name}", f"--inputs={inputs}"]
            done = subprocess.run([*command, f"--last={last.name}"], capture_output=True, text=True)
            died = {f"died with code {done.returncode}": f"{last.read()[:500]}\n{done.stderr[:2000]}"}
        lost = {"refused": 0, "accepted": 0, "other": 1, "examples": died, "megabytes": 0}
        result = lost if done.returncode else json.loads(done.stdout.splitlines()[-1])
        counts, seconds = [result[kind] for kind in KINDS], time.monotonic() - began
        totals.update(dict(zip(KINDS, counts, strict=True)))
        numbers = (sum(counts), *counts, result["megabytes"], round(seconds))
        print(f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |")
        for ending, example in result["examples"].items():
            print(f"    {ending}\n        {example}")
        sys.stdout.flush()
    print(f"| all | {totals.total():,} | {' | '.join(f'{totals[kind]:,}' for kind in KINDS)} | | |")


if __name__ == "__main__":
    main()
