"""Inspects and prunes the checkpoints of a workdir without a run: `gptjax checkpoint ls|verify|diff|prune`."""

import contextlib
import time

import numpy as np
from etils import epath

from gptjax.checkpoints import manifest, retention, verification
from gptjax.checkpoints.manager import Checkpoints
from gptjax.errors import Failed, Refused
from gptjax.runtime import distributed
from gptjax.runtime.files import flatten, reason, stated
from gptjax.runtime.progress import duration


def checkpoints_of(workdir: epath.Path) -> tuple[epath.Path, list[int]]:
    """Returns the folder and the steps of a workdir's checkpoints. Raises: Refused, if there are none."""
    folder = workdir / "checkpoints"
    steps, _ = retention.found(folder)
    if not steps:
        raise Refused(f"{folder} holds no checkpoint: give the --workdir of a run that has saved one.")
    return folder, steps


def ls(workdir: epath.Path, config: dict, losses: dict[int, float]) -> list[dict]:
    """Returns one row per checkpoint: step, saved_at (seconds since 1970), bytes, files, differs, damage, eval_loss.

    `differs` lists the config keys whose values differ from config.json, as "key (there, here)". `damage` is what the
    manifest and the files' sizes show; empty for a checkpoint that seems whole. `eval_loss` is there if evaluated.

    Args:
      workdir: the folder of a run.
      config: config.json of the workdir, empty if missing.
      losses: held-out losses by step.
    """
    folder, steps = checkpoints_of(workdir)
    here, rows = flatten(config), []
    for step in steps:
        row = {"step": step, "saved_at": None, "bytes": None, "files": None, "differs": [], "damage": ""}
        row |= {"eval_loss": losses[step]} if step in losses else {}
        try:
            saved = manifest.read(retention.at(folder, step), step)
            sizes = [file["bytes"] for file in saved["files"].values()]
            row |= {"saved_at": saved["saved_at"], "bytes": sum(sizes), "files": len(sizes)}
            row["differs"] = _differing(flatten(saved["config"]), here) if here else []
            manifest.check_sizes(retention.at(folder, step), saved)
        except manifest.Damaged as damage:
            row["damage"] = str(damage)
        rows.append(row)
    return rows


def _differing(one: dict, other: dict) -> list[str]:
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    return [f"{key} ({stated(one, key)}, {stated(other, key)})" for key in keys]


def table(rows: list[dict]) -> str:
    """Formats the rows of `ls` as text."""
    best = retention.best(
        {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}, [row["step"] for row in rows]
    )
    lines = [f"{'step':>10}  {'age':>9}  {'MB':>10}  {'files':>5}"]
    for row in rows:
        known = row["files"] is not None
        age = duration(max(0, time.time() - row["saved_at"])) if known else "?"
        size, files = (f"{row['bytes'] / 1e6:,.1f}", row["files"]) if known else ("?", "?")
        lines.append(f"{row['step']:>10}  {age:>9}  {size:>10}  {files:>5}  {row['damage'] or 'whole, by its sizes'}")
        if row["step"] == best:
            lines[-1] += f", the best: held-out loss {row['eval_loss']:.4f}"
        if row["differs"]:
            lines.append(f"{'':>10}  not as in config.json: {', '.join(row['differs'])}")
    return "\n".join(lines)


def verify(workdir: epath.Path, step: int) -> None:
    """Reads all files of all checkpoints, or of one step (-1: all), and prints the damage.

    Raises:
      Refused: for an unknown step.
      Failed: if a checkpoint is damaged.
    """
    folder, steps = checkpoints_of(workdir)
    if step != -1 and step not in steps:
        raise Refused(f"--step={step} must be a checkpoint in {folder}; found {', '.join(map(str, steps))}.")
    chosen = steps if step == -1 else [step]
    damages = {step: _damage(folder, step) for step in chosen}
    for step, damage in damages.items():
        print(f"step {step}: {damage or 'verified'}", flush=True)
    damaged = [step for step, damage in damages.items() if damage]
    if damaged:
        raise Failed(
            f"{len(damaged)} of {len(chosen)} checkpoints in {folder} can't be used: put the files of step "
            f"{', '.join(map(str, damaged))} back; a run goes on from the newest that verifies."
        )


def _damage(folder: epath.Path, step: int) -> str:
    try:
        return verification.damage(retention.at(folder, step), step)
    except manifest.Unreadable as reason:
        return str(reason)


def diff(workdir: epath.Path, steps: str) -> dict:
    """Compares the checkpoints of --steps=A:B: `says` lists differences of the manifests, `arrays` those by array name.

    An array in both checkpoints gets `norm`, the norm of A, and `difference`, the norm of B - A. Raises: Refused.
    """
    folder, there = checkpoints_of(workdir)
    first, _, second = steps.partition(":")
    if not {first, second} <= set(map(str, there)):
        raise Refused(f"--steps={steps} must be A:B, two checkpoints in {folder}; found {', '.join(map(str, there))}.")
    with Checkpoints(folder) as checkpoints:
        pair = int(first), int(second)
        said = [flatten(_compared(checkpoints, step)) for step in pair]
        one, other = (checkpoints.manifest(step)["arrays"] for step in pair)
        arrays = {}
        for name in sorted(one.keys() | other.keys()):
            shapes = [
                f"{saved[name]['dtype']} {saved[name]['shape']}" if name in saved else "" for saved in (one, other)
            ]
            if shapes[0] != shapes[1]:
                arrays[name] = {"there": shapes[0] or "no such array", "here": shapes[1] or "no such array"}
                continue
            a, b = (checkpoints.array(step, name).astype(np.float64) for step in pair)
            arrays[name] = {"norm": float(np.linalg.norm(a)), "difference": float(np.linalg.norm(b - a))}
    return {"says": _differing(*said), "arrays": arrays}


def _compared(checkpoints: Checkpoints, step: int) -> dict:
    """The parts of a manifest that `diff` compares; the tokenizer is compared by its hash."""
    written, run = checkpoints.manifest(step), checkpoints.record(step).to_json()
    del run["tokenizer"]
    if "recovery" in run:
        del run["recovery"]["losses"]  # they belong to the latest steps
    return {"format": written["format"], "versions": written["versions"]} | run


def differences(found: dict) -> str:
    """Formats the result of `diff` as text."""
    lines = found["says"] or ["the manifests say the same"]
    for name, row in found["arrays"].items():
        if "norm" in row:
            lines.append(f"{name}: norm {row['norm']:.6g}, of the difference {row['difference']:.6g}")
        else:
            lines.append(f"{name}: {row['there']}, {row['here']}")
    return "\n".join(lines)


def prune(workdir: epath.Path, keep: int, dry_run: bool, config: dict, losses: dict[int, float]) -> None:
    """Removes all checkpoints but the newest `keep` that verify, and prints each removed folder.

    Damaged checkpoints, those put aside and leftovers of a killed save go too. If the run keeps the best checkpoint,
    that one stays as long as it verifies.

    Args:
      workdir: the folder of a run.
      keep: how many checkpoints stay.
      dry_run: print only, remove nothing.
      config: config.json of the workdir, empty if missing.
      losses: held-out losses by step.

    Raises: Refused, if no checkpoint verifies, a run is at work, a removal fails, or `keep` is below 1.
    """
    if keep < 1:
        raise Refused(f"--keep={keep} must be at least 1: the newest checkpoint that verifies stays.")
    checkpoints_of(workdir)  # refused before a lock is made
    with contextlib.nullcontext() if dry_run else distributed.owned(workdir):
        folder, steps = checkpoints_of(workdir)
        _prune(folder, steps, keep, _best(flatten(config), losses, steps), dry_run)


def _best(config: dict, losses: dict[int, float], steps: list[int]) -> int:
    """Returns the step that a run with early stopping keeps, as `rotate` does; 0 if there are none."""
    return retention.best(losses, steps) if config.get("stopping.patience") else 0


def _prune(folder: epath.Path, steps: list[int], keep: int, best: int, dry_run: bool) -> None:
    kept = []
    for step in reversed(steps):
        if (len(kept) < keep or step == best) and not _damage(folder, step):
            kept.append(step)
    if not kept:
        raise Refused(f"None of the {len(steps)} checkpoints in {folder} verifies, so none is removed: see `ls`.")
    _, left = retention.found(folder)
    for path in [*left, *retention.aside(folder), *(retention.at(folder, step) for step in steps if step not in kept)]:
        try:
            if not dry_run:
                retention.remove(path)
        except Exception as error:  # each file system raises errors of its own
            raise Refused(f"{path} can't be removed ({reason(error)}): make it writable.") from error
        print(f"{'would remove' if dry_run else 'removed'} {path.name}", flush=True)
    print(f"kept {', '.join(retention.at(folder, step).name for step in sorted(kept))}", flush=True)
