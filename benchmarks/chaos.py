"""Kills real runs with SIGKILL in every phase, starts them again, and compares every loss bit for bit.

    python -m benchmarks.chaos [--kills=200] [--seed=0]

One run is left alone: its losses are what all others must have. Each other run is killed when it says that it is in the
phase whose turn it is (and a random moment later), started again in the same workdir, and so on until it ends; then the
next begins in a new one. What is printed, by the phase in which the kill came: kills; after how many the next start
went on by itself, from the newest checkpoint that was whole or from the beginning where there was none yet, and did
not hang; and after how many all losses that were logged until then, and after, equal those of the run left alone. It
ends with code 1 if any differs.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

DEBUG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "debug.py"
STEPS, EVERY = 240, 6
# Compiling takes most of a start; less of it means more kills in the same time.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# The phases that a run reports (gptjax/runtime/heartbeat.py), of the main thread or of the saving thread. By the order,
# each phase can be met after a kill in the phase before. The last means that, and the run ends before another begins.
SAVING = ("writing", "hashing", "rotating")
TURNS = ("starting", "preparing data", "compiling", "training", "writing", "any", "hashing", "evaluating", "rotating",
         "restoring", "sampling")  # fmt: skip


def command(folder: pathlib.Path, corpus: pathlib.Path) -> list[str]:
    return [
        *(sys.executable, "-m", "gptjax", "train", f"--config={DEBUG}", f"--workdir={folder}"),
        *("--config.data.source=text", f"--config.data.path={corpus}/*.txt", "--config.seq_len=32"),
        *(f"--config.num_steps={STEPS}", f"--config.checkpoint_every={EVERY}", "--config.log_every=1"),
        *("--config.eval_every=40", "--config.eval_batches=40", "--config.num_samples=1"),
        "--config.model.dropout=0.1",
    ]


def losses(folder: pathlib.Path) -> dict[int, float]:
    """Returns step → loss from the complete rows of metrics.jsonl."""
    found = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n") and "loss" in (row := json.loads(line)):
            found[row["step"]] = row["loss"]
    return found


def said(folder: pathlib.Path, pid: int) -> tuple[str, str]:
    """Returns the phases that a process reports for its main and saving threads; empty before the first beat."""
    try:
        beat = json.loads((folder / "hosts" / "0.json").read_text())
    except (OSError, ValueError):
        return "", ""
    return (beat["phase"], beat["background"]) if beat["pid"] == pid else ("", "")


def newest(folder: pathlib.Path) -> int:
    """Returns the step of the newest checkpoint with a manifest, which is written last; 0 without checkpoints."""
    found = folder.glob("checkpoints/step_????????/manifest.json")
    return max((int(path.parent.name[-8:]) for path in found), default=0)


def resumed(code: int | None, phase: str, log: str, step: int) -> bool:
    """Returns whether a start resumed from the checkpoint of `step`, or was killed before it could resume."""
    if code not in (0, -signal.SIGKILL):
        return False
    words = r"^(?:going on from the checkpoint of|The run in .* is complete at) step (\d+)"
    said = re.findall(words, log, re.MULTILINE)
    before = code != 0 and phase in ("starting", "preparing data", "restoring")
    return (before and not said) or said[:1] == [str(step)] * (step > 0)


def killed(
    argv: list[str], folder: pathlib.Path, target: str, delay: float, limit: float = 120
) -> tuple[int | None, str]:
    """Starts a run and kills it `delay` seconds after it says that it is in a phase ("any": after it began to train).

    Returns its exit code (-9 if the kill came in time; None if it had not ended at the limit) and the phase that it was
    in at the end.
    """
    log = folder.with_name("log.txt").open("w")
    process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
    until, phase = time.monotonic() + limit, "starting"
    while process.poll() is None and time.monotonic() < until:
        main, background = said(folder, process.pid)
        phase = background or main or phase
        starting = target == "starting" and not main  # before there is anything to say
        if target in (main, background) or starting or (target == "any" and main == "training"):
            time.sleep(delay)
            main, background = said(folder, process.pid)
            phase = background or main or phase
            break
        time.sleep(0.0005)
    hung = process.poll() is None and time.monotonic() >= until
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    return (None if hung else code), phase


def chaos(kills: int, seed: int, folder: pathlib.Path) -> list[tuple[str, int, int, int]]:
    """Rows of phase, kills, resumed, equal."""
    rng = random.Random(seed)
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for part in range(40):
        lines = (f"{a} plus {b} is {a + b}.\n" for a in range(part, 400, 40) for b in range(60))
        (corpus / f"{part:02}.txt").write_text("".join(lines))
    alone = folder / "alone" / "run"
    alone.parent.mkdir()
    subprocess.run(command(alone, corpus), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    expected = losses(alone)
    assert sorted(expected) == list(range(1, STEPS + 1))

    counts = collections.defaultdict(lambda: [0, 0, 0])
    run, done, last, saved, turns = 0, 0, "", 0, itertools.cycle(TURNS)
    while done < kills or last:
        workdir = folder / f"run{run}" / "run"
        workdir.parent.mkdir(exist_ok=True)
        target = "none" if done == kills or last == "sampling" else next(turns)
        delay = rng.random() * {"starting": 3, "any": 2, "compiling": 2}.get(target, 0.02 if target in SAVING else 0.2)
        code, phase = killed(command(workdir, corpus), workdir, target, delay)
        log = workdir.with_name("log.txt").read_text()
        went_on = resumed(code, phase, log, saved)
        found = losses(workdir)
        same = all(expected[step] == loss for step, loss in found.items()) and (code != 0 or len(found) == STEPS)
        if last:
            counts[last][1] += went_on
            counts[last][2] += same
        if not (went_on and same):
            how = f"exit code {code}, after step {saved} was saved, losses {'equal' if same else 'DIFFER'}"
            print(f"run {run}, {how}:\n{log}", flush=True)
        last = phase if code == -signal.SIGKILL else ""
        if last:
            done, saved = done + 1, newest(workdir)
            counts[last][0] += 1
            print(f"kill {done} of {kills}: {phase}, after step {max(found, default=0)}", flush=True)
        else:
            run, saved = run + 1, 0
    return [(phase, *counts[phase]) for phase in sorted(counts)]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--kills", type=int, default=200)
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = chaos(args.kills, args.seed, pathlib.Path(folder))
    print(f"{'phase':<16}{'kills':>7}{'resumed':>9}{'equal':>7}")
    for phase, *numbers in rows:
        print(f"{phase:<16}{numbers[0]:>7}{numbers[1]:>9}{numbers[2]:>7}")
    if any(number != numbers[0] for _, *numbers in rows for number in numbers):
        sys.exit(1)


if __name__ == "__main__":
    main()
