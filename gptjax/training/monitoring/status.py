"""Reads from WORKDIR/hosts what each process of a run is doing, and which process the others wait for."""

import contextlib
import dataclasses
import socket
import time

from etils import epath

from gptjax.errors import Refused
from gptjax.runtime import heartbeat, untrusted
from gptjax.runtime.files import listed
from gptjax.training.monitoring import records

MAX_BYTES = 1 << 16  # size of a beat's file
FRESH_SECONDS = 60.0  # a process of another machine counts as running until its beat is older; gs:// gets one per 10 s


def status(folder: epath.Path) -> dict:
    """Returns the facts `processes` (fields of a beat, seconds_ago, running), `slowest`, `unreadable`, `last_step`.

    slowest: the running process that is behind, with steps_behind the first process and the longest wait of another in
    seconds; None if fewer than two run. last_step: the last step in metrics.jsonl; None if there are none.

    Raises: Refused, if the folder is not the workdir of a run.
    """
    if not any((folder / name).exists() for name in ("config.json", "metrics.jsonl", heartbeat.FOLDER)):
        raise Refused(f"--workdir={folder} has no config.json, metrics.jsonl or hosts/: give the folder of a run.")
    processes, unreadable = [], []
    for path in sorted(listed(folder / heartbeat.FOLDER, ".json"), key=lambda path: (len(path.name), path.name)):
        try:
            processes.append(_fact(heartbeat.parsed(untrusted.read(path, MAX_BYTES, "see that process's output"))))
        except (Refused, ValueError, RecursionError) as error:
            if path.exists():  # otherwise the process has just ended
                unreadable.append(f"{path.name}: {error}")
    running = [fact for fact in processes if fact["running"]]
    last_step = _last_step(folder / "metrics.jsonl")
    return {"processes": processes, "slowest": _slowest(running), "unreadable": unreadable, "last_step": last_step}


def _fact(beat: heartbeat.Beat) -> dict:
    ago = max(0.0, time.time() - beat.time)
    here = beat.host == socket.gethostname()
    running = heartbeat.alive(beat.pid) if here else ago < FRESH_SECONDS
    return dataclasses.asdict(beat) | {"seconds_ago": round(ago, 1), "running": running}


def _slowest(running: list[dict]) -> dict | None:
    if len(running) < 2:
        return None
    # Among processes at the same step, the slowest is the one that the others wait for.
    slowest = min(running, key=lambda fact: (fact["ticks"], fact["waiting"], fact["idle_seconds"]))
    waited = max((fact["idle_seconds"] for fact in running if fact["waiting"] and fact is not slowest), default=0.0)
    behind = max(fact["step"] for fact in running) - slowest["step"]
    return {"process": slowest["process"], "steps_behind": behind, "seconds_waited_for": waited}


def _last_step(path: epath.Path) -> int | None:
    steps = []
    with contextlib.suppress(Exception):  # each file system raises errors of its own; report what could be read
        for row in records.each_row(path):
            steps.append(row["step"])
    return max(steps, default=None)


def text(found: dict) -> str:
    """Formats the facts as a table."""
    head = ("process", "host", "pid", "phase", "step", "in it for", "beat", "")
    rows: list[tuple[str, ...]] = [head]
    for fact in found["processes"]:
        phase = fact["phase"] + (f" + {fact['background']}" if fact["background"] else "")
        waits = f"waiting for {fact['idle_seconds']:.1f} s" if fact["waiting"] else ""
        rows.append(
            (
                str(fact["process"]),
                fact["host"],
                str(fact["pid"]),
                phase,
                str(fact["step"]),
                f"{fact['phase_seconds']:.0f} s",
                f"{fact['seconds_ago']:.0f} s ago",
                waits if fact["running"] else "gone",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = lines if found["processes"] else []
    lines += [f"unreadable: {name}" for name in found["unreadable"]]
    if not any(fact["running"] for fact in found["processes"]):
        lines.append("nobody runs here")
    if slowest := found["slowest"]:
        lines.append(
            f"the slowest is process {slowest['process']}: {slowest['steps_behind']} steps behind the first, which has "
            f"waited for {slowest['seconds_waited_for']:.1f} s"
        )
    lines.append("no step is logged yet" if found["last_step"] is None else f"last logged step: {found['last_step']}")
    return "\n".join(lines)
