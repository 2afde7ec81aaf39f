"""The manifest of a checkpoint: `manifest.json` names every file of the checkpoint's `state` with size and hash.

The manifest is written last, so a save that was killed leaves none. It carries a hash of its own content. No file
that the manifest names may lie outside of the checkpoint's folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
from importlib import metadata

from etils import epath

from gptjax import __version__
from gptjax.errors import shown
from gptjax.runtime import untrusted
from gptjax.runtime.files import reason, size_of, to_disk, write_whole

FORMAT = 1
VERSIONS = {"gptjax": __version__} | {name: metadata.version(name) for name in ("jax", "orbax-checkpoint")}
NAME = "manifest.json"
LOST = errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP  # errors that tell of the content
MAX_BYTES = 64 << 20  # a longer file is cut, and then does not match its hash


class Damaged(Exception):
    """A checkpoint is unusable. The message is the reason; callers put step and folder before it."""


class Unreadable(Damaged):
    """An error while looking, such as of a lost file system or a permission: the checkpoint may be whole."""


def stored(folder: epath.Path) -> list[str]:
    """The files of a checkpoint's state, as paths in its folder, sorted; a link is listed, not followed."""
    found, top = [], None
    for where, folders, files in (folder / "state").walk():
        top = top or where  # on a bucket it has another form than `folder`
        inside = epath.Path("state") / where.relative_to(top)
        links = [name for name in folders if os.path.islink(where / name)]
        found += [(inside / name).as_posix() for name in (*files, *links)]
    return sorted(found)


def digests(folder: epath.Path, paths: list[str]) -> dict[str, dict]:
    """Flushes each file to the disk; returns its bytes and sha256. Raises: OSError."""
    found = {}
    for path in paths:
        with (folder / path).open("rb") as file:
            # epath types the open file as an IO, which has no readinto(); the file itself has that method.
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
            to_disk(file)
            found[path] = {"bytes": file.tell(), "sha256": digest}
    return found


def write(folder: epath.Path, content: dict) -> None:
    """Writes the manifest, which makes the folder a checkpoint. Raises: OSError."""
    write_whole(folder / NAME, _encoded(content), sync=True)


def _encoded(content: dict) -> bytes:
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({"sha256": digest} | content, indent=1).encode() + b"\n"


@contextlib.contextmanager
def _reading(path: str):
    """Context manager around reading a file of a checkpoint.

    Raises:
      Damaged: if the file is missing, or its content is lost.
      Unreadable: for any other error.
    """
    try:
        yield
    except (Damaged, MemoryError):
        raise
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except Exception as error:  # gcsfs and google-auth raise errors that are not OSError
        lost = isinstance(error, OSError) and error.errno in LOST
        raise (Damaged if lost else Unreadable)(f"{path} can't be read ({reason(error)})") from error


def read(folder: epath.Path, step: int) -> dict:
    """Reads the manifest in the folder of a step. Raises: Damaged."""
    with _reading(NAME):
        if not untrusted.is_file(folder / NAME):
            raise Damaged(f"{NAME} is missing")
        with (folder / NAME).open("rb") as file:
            text = file.read(MAX_BYTES)
    try:
        content = json.loads(text)
        del content["sha256"]
        whole = _encoded(content) == text
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{NAME} is damaged: its content does not match its hash")
    if content.get("format") != FORMAT:
        raise Damaged(f"{NAME} is of format {content.get('format')}, and this gptjax reads {FORMAT}")
    if content.get("step") != step:
        raise Damaged(f"{NAME} is that of step {content.get('step')}")
    _check_form(content)
    return content


def _is_count(value) -> bool:
    return type(value) is int and value >= 0


def _check_form(content: dict) -> None:
    """Checks the form of files, arrays and config, whoever wrote them. Raises: Damaged."""
    try:
        for path, file in content["files"].items():
            parts = pathlib.PurePosixPath(path).parts
            if parts[:1] != ("state",) or ".." in parts or not path.isprintable():
                raise Damaged(f"{NAME} names {path}, which is not in its state")
            if not (_is_count(file["bytes"]) and isinstance(file["sha256"], str)):
                raise TypeError
        for array in content["arrays"].values():
            if not all(map(_is_count, (*array["shape"], array["bytes"]))):
                raise TypeError
        if not (isinstance(content["config"], dict) and _is_count(content["saved_at"])):
            raise TypeError
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{NAME} does not have the form of format {FORMAT}") from error


def check_sizes(folder: epath.Path, content: dict, share: int = 0, shares: int = 1) -> None:
    """Checks the sizes of a share of the files that a manifest names; share 0 also looks for unknown files.

    Raises: Damaged.
    """
    files = content["files"]
    for path in sorted(files)[share::shares]:
        with _reading(path):
            if any(os.path.islink(folder / part) for part in (path, *pathlib.PurePosixPath(path).parents[:-1])):
                raise Damaged(f"{path} is a link")
            size = size_of(folder / path)
            if not untrusted.is_file(folder / path):
                raise Damaged(f"{path} is not a file")
            if size != files[path]["bytes"]:
                raise Damaged(f"{path} has {size:,} bytes of {files[path]['bytes']:,}")
    with _reading("state"):
        others = sorted(set(stored(folder)) - files.keys()) if share == 0 else ()
    if others:
        raise Damaged(f"{shown(others[0])} is not in {NAME}")


def verify(folder: epath.Path, step: int, share: int = 0, shares: int = 1) -> dict:
    """Reads a share of a checkpoint's files and compares them with the manifest, which is returned.

    Raises: Damaged, for the first file that differs.
    """
    content = read(folder, step)
    check_sizes(folder, content, share, shares)
    for path, file in sorted(content["files"].items())[share::shares]:
        with _reading(path), (folder / path).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != file["sha256"]:
            raise Damaged(f"{path} is not what was written: its hash differs")
    return content
