"""Reading files that anyone may have made or damaged: within bounds, as plain data, never executed.

A workdir or a store may come from somebody else, or from a disk that lost power. Whatever such a file holds gives a
value or a refusal: no other exception, no waiting on a pipe, and no more memory than its bound allows.
"""

import io
import json
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from gptjax.errors import Refused, shown

MAX_DEPTH = 16  # of nested JSON; whoever walks it may recurse
# What this program itself names its files. Not `..`, not `/etc`, not `gs://other`.
PLAIN_PATH = re.compile(r"(?!\.)[\w.+-]+(/(?!\.)[\w.+-]+)*", re.ASCII)


def read(path: epath.Path, most: int, remedy: str) -> bytes:
    """The bytes of a file.

    Args:
      most: bytes that it may have. remedy: what to do about it, as the end of a sentence.

    Raises: Refused, for what is no file, can't be read, or is larger.
    """
    try:
        if not is_file(path):
            raise Refused(f"{path} is {'no file' if path.exists() else 'missing'}: {remedy}.")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except Refused:
        raise
    except Exception as error:  # ValueError: a name that no file can have; those of gcsfs are no OSError
        raise Refused(f"{path} can't be read ({getattr(error, 'strerror', None) or error}): {remedy}.") from error
    if len(content) > most:
        raise Refused(f"{path} has more than the {most} bytes that such a file may have: {remedy}.")
    return content


def opened(path: epath.Path) -> BinaryIO:
    """A file to read bytes of. Raises: OSError, or what a bucket's library does."""
    file = path.open("rb")
    return io.BufferedReader(file) if "://" in str(path) else file  # gcsfs reads lines of any length alone


def is_file(path: epath.Path) -> bool:
    """Whether it can be read to an end; `epath` also calls a pipe a file, which would be waited for."""
    return path.is_file() if "://" in str(path) else os.path.isfile(path)


def json_object(content: bytes, where, remedy: str) -> dict:
    """The JSON object that the bytes of a file are. Raises: Refused, for anything else, or one nested too deep."""
    try:
        value = json.loads(content.decode())
        if type(value) is not dict:
            raise ValueError(f"{shown(value)} is no object")
        if _depth(value) > MAX_DEPTH:
            raise ValueError(f"it is nested {_depth(value)} deep")
    except (ValueError, RecursionError) as error:
        raise Refused(f"{where} is damaged ({error}): {remedy}.") from error
    return value


def _depth(value) -> int:
    depth, level = 0, [value]
    while level:
        nested = [item.values() if type(item) is dict else item for item in level if type(item) in (dict, list)]
        depth, level = depth + 1, [item for items in nested for item in items]
    return depth


def read_json(path: epath.Path, most: int, remedy: str) -> dict:
    """The JSON object in a file of at most `most` bytes. Raises: Refused."""
    return json_object(read(path, most, remedy), path, remedy)


def check_types(values: dict, kinds: dict[str, type], where, remedy: str) -> None:
    """Raises: Refused, where `values` lacks one of these names or has another type there."""
    for name, kind in kinds.items():
        if type(values.get(name)) is not kind:
            found = shown(values[name]) if name in values else "missing"
            raise Refused(f"{where} is damaged ({name} is {found}, not of type {kind.__name__}): {remedy}.")


def protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of those fields of a protobuf message that have a length; repeated ones each time.

    Raises: ValueError, for what is no whole message, and for what protobuf's own readers might take in another way.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 2:
            size, at = _varint(message, at)
            yield number, message[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind} at byte {at}")
        if at > len(message) or key >= 1 << 32:
            raise ValueError(f"field {number} goes to byte {at} of {len(message)}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    number = 0
    for shift, byte in zip(range(0, 70, 7), message[at : at + 10]):
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at + 1 + shift // 7
    raise ValueError(f"a number without an end at byte {at}")


def inside(folder: epath.Path, name: str, remedy: str) -> epath.Path:
    """The file of that name in a folder. Raises: Refused, where the name, or a link on the way, leads out of it."""
    path = folder / name if PLAIN_PATH.fullmatch(name) else None
    if path is None or "://" not in str(folder) and not _within(os.path.realpath(path), os.path.realpath(folder)):
        raise Refused(f"{shown(name)} leads out of {folder}: {remedy}.")
    return path


def _within(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
