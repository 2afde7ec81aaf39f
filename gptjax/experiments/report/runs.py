"""Reads a report's data from the workdir of a run; any file may be missing, cut short or damaged."""

import dataclasses
import math
import statistics
from array import array

from etils import epath

from gptjax.errors import Refused, nearest
from gptjax.runtime import files, untrusted
from gptjax.training import workdir
from gptjax.training.config import schema
from gptjax.training.monitoring import records, status

CURVES = "loss", "eval_loss", "eval_bits_per_byte", "learning_rate", "tokens_per_second", "grad_norm", "mfu"
SAMPLE_BYTES = 1 << 20  # bytes of samples that are read; the page shows fewer
EVENTS = 20  # listed starts, skipped steps, and failed evaluations, at most of each


@dataclasses.dataclass
class Curve:
    """Steps and values of the rows with a number for one key, in order."""

    steps: array = dataclasses.field(default_factory=lambda: array("q"))
    values: array = dataclasses.field(default_factory=lambda: array("d"))


@dataclasses.dataclass
class Run:
    """One run."""

    folder: epath.Path
    name: str
    config: dict[str, object]  # by dotted key; empty without a readable config
    curves: dict[str, Curve]
    last: dict[str, object]  # the last value of each key in the rows
    best: tuple[int, float] | None = None  # step and value of the least held-out loss
    step: int = 0  # the last step with a row
    state: str = ""
    starts: list[dict] = dataclasses.field(default_factory=list)
    failed_evaluations: list[dict] = dataclasses.field(default_factory=list)
    skipped: list[dict] = dataclasses.field(default_factory=list)
    num_skipped: int = 0
    samples: str = ""
    seconds: dict[str, float | None] = dataclasses.field(default_factory=dict)
    saves: int = 0

    @property
    def goodput(self) -> float | None:
        """The share of time since the start spent on steps that count; None if rows have no `time`."""
        whole = self.seconds.get("whole")
        return self.seconds["steps"] / whole if whole else None


def read(folders: list[epath.Path]) -> list[Run]:
    """Reads the runs, with the shortest distinct names. Raises: Refused, for a folder without a run."""
    for folder in folders:
        if not any((folder / name).exists() for name in ("config.json", "metrics.jsonl")):
            beside = [path.name for path in files.listed(folder.parent)]
            hint = nearest(folder.name, [name for name in beside if name != folder.name])
            raise Refused(f"{folder} has no config.json and no metrics.jsonl: give the workdirs of runs.{hint}")
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise Refused(f"{twice[0]} is given twice: name each run once.")
    return [_read(folder, name) for folder, name in zip(folders, names(folders), strict=True)]


def names(folders: list[epath.Path]) -> list[str]:
    """Returns the last parts of the paths, as many parts as make all names distinct."""
    parts = [folder.resolve().parts if "://" not in str(folder) else folder.parts for folder in folders]
    for number in range(1, max(map(len, parts)) + 1):
        found = ["/".join(each[-number:]) for each in parts]
        if len(set(found)) == len(found):
            break
    return found


def _read(folder: epath.Path, name: str) -> Run:
    run = Run(folder, name, _config(folder), {key: Curve() for key in CURVES}, {})
    _read_rows(run)
    path = folder / "samples.txt"
    if path.exists():
        try:
            run.samples = untrusted.read(path, SAMPLE_BYTES, "").decode(errors="replace").strip()
        except Refused as refusal:
            run.samples = str(refusal)
    for row in records.each_row(folder / "skipped.jsonl"):
        run.num_skipped += 1
        run.skipped += [row] if len(run.skipped) < EVENTS else []
    running = any(process["running"] for process in status.status(folder)["processes"])
    wanted = run.config.get("num_steps")
    if running:
        run.state = "in progress"
    elif type(wanted) is int and run.step >= wanted:
        run.state = "complete"
    else:
        run.state = "stopped" if run.step else "not begun"
    return run


def _config(folder: epath.Path) -> dict[str, object]:
    try:
        return files.flatten(workdir.read_config(folder))
    except Refused:
        return {}


def _number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e300


def _read_rows(run: Run) -> None:
    """Reads metrics.jsonl row by row, and keeps only the numbers of the curves."""
    before, first_time, last_time = 0, None, None
    steps = starting = blocked = 0.0
    for row in records.each_row(run.folder / "metrics.jsonl"):
        step = row["step"]
        if not 0 <= step < 1 << 62:
            continue
        run.step = max(run.step, step)
        run.last |= row
        for key, curve in run.curves.items():
            if _number(row.get(key)):
                curve.steps.append(step)
                curve.values.append(row[key])
        if "first_step_seconds" in row:
            run.starts += [row] if len(run.starts) < EVENTS else []
            starting += row["first_step_seconds"] if _number(row["first_step_seconds"]) else 0
            before = step
        if _number(row.get("step_seconds")):
            steps += row["step_seconds"] * max(step - before, 0)
            before = max(before, step)
        if _number(row.get("save_blocked_seconds")):
            run.saves, blocked = run.saves + 1, blocked + row["save_blocked_seconds"]
        if "eval_error" in row and len(run.failed_evaluations) < EVENTS:
            run.failed_evaluations.append(row)
        if _number(row.get("eval_loss")) and (run.best is None or row["eval_loss"] < run.best[1]):
            run.best = step, float(row["eval_loss"])
        if _number(row.get("time")):
            if first_time is None:  # a start writes a row after the first step
                first_time = row["time"] - (
                    row.get("first_step_seconds") if _number(row.get("first_step_seconds")) else 0
                )
            last_time = row["time"]
    whole = last_time - first_time if first_time is not None and last_time > first_time else None
    run.seconds = {"steps": steps, "starting": starting, "saving": blocked, "whole": whole}


def median(curve: Curve) -> float | None:
    return statistics.median(curve.values) if curve.values else None


def differences(runs: list[Run]) -> list[tuple[str, list]]:
    """Returns (key, values by run) where the configs differ; for one run, (key, [default, value]).

    A key that an older config lacks has the default, as when the run resumes.
    """
    defaults = files.flatten(schema.default())
    columns = [defaults | run.config if run.config else {} for run in runs]
    columns = [defaults, *columns] if len(runs) == 1 else columns
    present = [column for column in columns if column]
    keys = dict.fromkeys(key for column in present for key in column)
    differing = [key for key in keys if len({repr(column.get(key)) for column in present}) > 1]
    return [(key, [column.get(key) for column in columns]) for key in differing]
