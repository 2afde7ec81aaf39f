"""Retention: lists the folder of a run's checkpoints, and decides which stay, go or are put aside."""

import contextlib
import math
import re
from collections.abc import Iterable, Mapping

from etils import epath

from gptjax.checkpoints import manifest
from gptjax.errors import Refused
from gptjax.runtime import files

PATTERN = re.compile(r"[][*?\\]")  # the signs of a path that orbax's glob takes for a pattern
UNFINISHED = "unfinished"  # name of a file that marks a checkpoint's folder until the manifest is written


def at(folder: epath.Path, step: int) -> epath.Path:
    """Returns the folder of a step's checkpoint."""
    return folder / f"step_{step:08}"


def found(folder: epath.Path) -> tuple[list[int], list[epath.Path]]:
    """Returns the checkpoints' steps, ascending, whole or damaged, and leftover folders of killed saves.

    Raises: Refused.
    """
    steps, left = [], []
    try:
        for path in folder.iterdir() if folder.exists() else ():
            named = re.fullmatch(r"step_(\d{8,})", path.name)
            if not (named and path == at(folder, int(named[1])) and path.is_dir()):
                continue
            killed = (path / UNFINISHED).exists() and not (path / manifest.NAME).exists()
            if killed or not any(path.iterdir()):
                left.append(path)
            else:
                steps.append(int(named[1]))
    except Exception as error:  # errors of gcsfs and google-auth are not OSError
        raise Refused(f"{folder} can't be read ({files.reason(error)}): give another --workdir.") from error
    return sorted(steps), sorted(left)


def aside(folder: epath.Path) -> list[epath.Path]:
    """Lists the checkpoints that were put aside."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}\.(damaged|replaced)\d*", path.name))


def put_aside(folder: epath.Path, step: int, why: str) -> epath.Path:
    """Renames a checkpoint to step_….WHY, numbered if that name is taken; returns the new path. Raises: OSError."""
    taken = {path.name for path in folder.iterdir()}
    names = (f"{at(folder, step).name}.{why}{number}" for number in ("", *range(2, len(taken) + 3)))
    return at(folder, step).rename(folder / next(name for name in names if name not in taken))


def remove(path: epath.Path) -> None:
    """Removes a checkpoint, the manifest first, so that a kill never leaves a seeming checkpoint. Raises: OSError."""
    with contextlib.suppress(OSError):  # a full disk takes no mark; the remains of a kill then count as damaged
        (path / UNFINISHED).touch()
    if (path / manifest.NAME).is_file():
        (path / manifest.NAME).unlink()
    if (path / "state").is_dir():  # removed before the mark `unfinished`
        (path / "state").rmtree()
    path.rmtree()


def clear(path: epath.Path) -> None:
    """Removes the files of a failed save. Raises: OSError.

    The mark `unfinished` stays for the next save to remove: TensorStore may still complete pending writes, and recreate
    their folders.
    """
    unfinished = (path / UNFINISHED).exists() and not (path / manifest.NAME).exists()
    if unfinished and (path / "state").is_dir():
        (path / "state").rmtree()


def rotate(folder: epath.Path, keep: int, keep_every: int, losses: Mapping[int, float]) -> None:
    """Removes all checkpoints but the newest `keep`, multiples of `keep_every`, and the best by `losses`.

    Raises: OSError.
    """
    steps, _ = found(folder)
    spared = best(losses, steps)
    for step in steps[:-keep]:
        if not (step == spared or (keep_every and step % keep_every == 0)):
            remove(at(folder, step))


def best(losses: Mapping[int, float], steps: Iterable[int]) -> int:
    """Returns the first of these steps with the lowest loss; 0 if none was evaluated."""
    known = {step: losses[step] for step in sorted(steps) if step in losses and math.isfinite(losses[step])}
    return min(known, key=known.__getitem__, default=0)
