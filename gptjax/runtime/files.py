"""Small files: replaced whole or not at all, and flat views of what JSON holds."""

import contextlib
import io
import os
import pathlib
import re
import tempfile
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from gptjax.errors import Refused


def check_writable(folder: epath.Path, flag: str = "--workdir") -> None:
    """A local folder can be made, or written into where it exists. Raises: Refused."""
    if "://" not in str(folder) and "\\" in os.path.abspath(folder):
        raise Refused(f"{flag}={os.path.abspath(folder)} has a backslash, which TensorStore takes for /: give another.")
    inside = next(path for path in (folder, *folder.parents) if path.exists())
    if not inside.is_dir():
        raise Refused(f"{flag}={folder} can't be a folder, because {inside} is a file: give another.")
    try:  # the permission bits alone say nothing to root, on a read-only mount or in /proc
        with tempfile.TemporaryDirectory(dir=inside):
            pass
    except OSError as error:
        raise Refused(f"{flag}={folder} can't be written to ({inside}: {error.strerror}): give another.") from error


def user_path(path: str) -> str:
    """A path as its writer means it: the home folder for a leading `~` or `~NAME`, which shells leave alone after `=`.

    A folder that is named `~` is `./~`. Raises: Refused, if the home folder is unknown.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise Refused(
            f'"{path}" begins with a home folder that is unknown: write the whole path, or "./{path}" for a folder of '
            "that name."
        )
    return expanded


def write_whole(path: epath.Path | pathlib.Path, content: bytes, suffix: str = "partial", sync: bool = False) -> None:
    """Replaces a small file so that a kill at any moment leaves the old content or the new.

    Args:
      path: the file; on gs:// too.
      content: the new bytes.
      suffix: ends the name of the file written first; writers that may overlap each need their own.
      sync: whether the bytes must be on the disk before the file takes its name.
    """
    beside = path.with_name(f"{path.name}.{suffix}")
    with beside.open("wb") as file:
        file.write(content)
        if sync:
            to_disk(file)
    beside.replace(path)


def contents(folder: epath.Path) -> list:
    """The paths in a folder that a user may have put there: without lost+found, which a new file system has."""
    return [path for path in listed(folder) if path.name != "lost+found"]


def fill(folder: epath.Path, made: epath.Path, last: str) -> None:
    """Moves everything in `made` into an existing folder, which may be a mount; the entry named `last` at the end."""
    for path in sorted(made.iterdir(), key=lambda path: path.name == last):
        path.rename(folder / path.name)


def size_of(path: epath.Path) -> int:
    """The bytes of a file. epath's `stat` of a local file fails where the user database has no name for the owner."""
    return path.stat().length if "://" in str(path) else os.stat(path).st_size


def listed(folder: epath.Path, suffix: str = "") -> list:
    """The paths in a folder whose names end in `suffix`, sorted; none if the folder does not exist.

    A glob would take `[` in the name of the folder itself for a pattern.
    """
    return sorted(path for path in folder.iterdir() if path.name.endswith(suffix)) if folder.is_dir() else []


def to_disk(file) -> None:
    """Flushes an open file to its disk; a full or lost file system may report its failure only here."""
    file.flush()
    with contextlib.suppress(io.UnsupportedOperation):  # gs:// has no fsync
        os.fsync(file.fileno())


def reason(error: Exception) -> str:
    """Shortens the message of an exception of the disk, orbax or TensorStore to fit in a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).partition("See full TensorStore details")[0].split())
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {text[:200]}"


def flatten(config, prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones: {"model.num_layers": 6, …}."""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, (dict, ConfigDict))
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def stated(flat: dict[str, Any], key: str) -> str:
    """The value of a key, as it stands in a sentence."""
    return '""' if flat.get(key) == "" else str(flat.get(key, "not set"))
