"""Memory over many saves of a real run, and how long a save blocks the step.

pip install matplotlib
python -m benchmarks.saves WORKDIR PICTURE [--config.KEY=VALUE …]

Runs the quickstart's config with a save every tenth step, 200 saves, in an empty WORKDIR.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.memory import resident

SAVES, EVERY = 200, 10


def rows(folder: pathlib.Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(workdir: str, picture: str, *overrides: str) -> None:
    folder, found = pathlib.Path(workdir), {}
    config = pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py"
    flags = dict(num_steps=SAVES * EVERY, checkpoint_every=EVERY, log_every=EVERY, eval_every=10**6, num_samples=0)
    argv = [sys.executable, "-m", "gptjax", "train", f"--config={config}", f"--workdir={folder}", "--fresh"]
    argv += [f"--config.{key}={value}" for key, value in flags.items()]
    process = subprocess.Popen([*argv, *overrides])
    while process.poll() is None:
        number = sum("save_seconds" in row for row in rows(folder))
        if number and number not in found:
            found[number] = resident(process.pid)
        time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)
    tenth, last = found[10], found[max(found)]
    saves = [row for row in rows(folder) if "save_seconds" in row]
    step, blocked, whole = (
        statistics.median(row[key] for row in rows(folder) if key in row)
        for key in ("step_seconds", "save_blocked_seconds", "save_seconds")
    )
    print(f"memory after save 10 {tenth:,.0f} MB, after save {max(found)} {last:,.0f} MB ({last / tenth - 1:+.1%})")
    print(
        f"{len(saves)} saves, medians: a step {1e3 * step:,.1f} ms, blocked by a save {1e3 * blocked:,.1f} ms "
        f"({blocked / step:.1%} of a step), a whole save {1e3 * whole:,.0f} ms"
    )

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    axes.plot(list(found), list(found.values()), color="#1f4e8c")
    axes.set(xlabel="saves", ylabel="resident memory, MB", ylim=(0, 1.1 * max(found.values())), xlim=(0, len(saves)))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
