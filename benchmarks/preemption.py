"""How long a run takes from SIGTERM to its end, by phase:

    python -m benchmarks.preemption [--config=configs/quickstart.py] [--config.KEY=VALUE …]

One run in a temporary folder, which is signalled in each phase and started again. Prints a table, in Markdown.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
# Phase, step from which on, and seconds after the phase begins.
MOMENTS = (
    ("starting", 0, 0.5),
    ("preparing data", 0, 3),
    ("compiling", 0, 1),
    ("training", 0, 5),
    ("evaluating", 1, 0),
    ("saving", 1, 0),
    ("restoring", 1, 0),
    ("sampling", 1, 0.5),
)


def main() -> None:
    flags = sys.argv[1:] if any(flag.startswith("--config=") for flag in sys.argv[1:]) else [
        f"--config={ROOT}/configs/quickstart.py", *sys.argv[1:]
    ]  # fmt: skip
    print("| the signal came while | exit code | seconds to the end |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for phase, step, seconds in MOMENTS:
            program = [sys.executable, f"{ROOT}/tests/support/signalled.py", phase, str(step), str(seconds), "SIGTERM"]
            done = subprocess.run([*program, *flags, f"--workdir={folder}/run"], capture_output=True, text=True)
            ended = time.time()
            sent = re.findall(r"^signalled ([\d.]+) while (.*)$", done.stdout, re.MULTILINE)
            if not sent:
                sys.exit(f"{phase} was not reached: {done.stdout}{done.stderr}")
            when, where = sent[-1]
            print(f"| {where} | {done.returncode} | {ended - float(when):.2f} |", flush=True)


main()
