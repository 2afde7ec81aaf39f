"""Reads files that anyone may have made or damaged: within bounds, as plain data, never executed.

A workdir or a store may come from somebody else, or from a disk that lost power. Any content of such a file gives a
value or a refusal: no other exception, no wait on a pipe, and no more memory than the bound allows.
"""

import io
import json
import os
import re
import typing
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from gptjax.errors import Refused, shown

MAX_DEPTH = 16  # nesting of JSON, so that code which walks a value may recurse
# Paths in the form that this program writes: not `..`, not `/etc`, not `gs://other`.
PLAIN_PATH = re.compile(r"(?!\.)[\w.+-]+(/(?!\.)[\w.+-]+)*", re.ASCII)


def read(path: epath.Path, most: int, remedy: str) -> bytes:
    """Returns the bytes of a file.

    Args:
      path: the file.
      most: the largest size in bytes that is accepted.
      remedy: the action for the user, as the end of a sentence.

    Raises: Refused, if the path is missing, not a file, unreadable, or too large.
    """
    try:
        if not is_file(path):
            raise Refused(f"{path} is {'not a file' if path.exists() else 'missing'}: {remedy}.")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except Refused:
        raise
    except Exception as error:  # ValueError: a name that no file can have; errors of gcsfs are not OSError
        raise Refused(f"{path} can't be read ({getattr(error, 'strerror', None) or error}): {remedy}.") from error
    if len(content) > most:
        raise Refused(f"{path} must have at most {most} bytes, and has more: {remedy}.")
    return content


def opened(path: epath.Path) -> BinaryIO:
    """Opens a file to read bytes. Raises: OSError, or the errors of a bucket's library."""
    file = path.open("rb")
    if "://" in str(path):
        return io.BufferedReader(typing.cast(io.RawIOBase, file))  # gcsfs ignores the bound of readline
    return typing.cast(BinaryIO, file)


def is_file(path: epath.Path) -> bool:
    """Says whether the path is a file with an end; `epath` also accepts a pipe, on which a reader would wait."""
    return path.is_file() if "://" in str(path) else os.path.isfile(path)


def json_object(content: bytes, where, remedy: str) -> dict:
    """Parses a file's bytes as a JSON object. Raises: Refused, for anything else, or for nesting beyond MAX_DEPTH."""
    try:
        value = json.loads(content.decode())
        if type(value) is not dict:
            raise ValueError(f"{shown(value)} is not an object")
        if _depth(value) > MAX_DEPTH:
            raise ValueError(f"the object is nested {_depth(value)} deep")
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
    """Reads the JSON object in a file of at most `most` bytes. Raises: Refused."""
    return json_object(read(path, most, remedy), path, remedy)


def check_types(values: dict, kinds: dict[str, type], where, remedy: str) -> None:
    """Raises: Refused, if `values` lacks a name in `kinds` or has another type there."""
    for name, kind in kinds.items():
        if type(values.get(name)) is not kind:
            found = shown(values[name]) if name in values else "missing"
            raise Refused(f"{where} is damaged ({name} is {found}, not of type {kind.__name__}): {remedy}.")


def protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (number, content) of each field with a length in a protobuf message; a repeated field several times.

    Raises: ValueError, for an incomplete message, and for bytes that protobuf's own readers might read differently.
    """
    for number, kind, value in protobuf_values(message):
        if kind == 2:
            yield number, typing.cast(bytes, value)


def protobuf_values(message: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """Yields (number, wire type, value) of each field of a protobuf message. The value is an int for type 0.

    Raises: ValueError, like `protobuf_fields`.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        elif kind:
            raise ValueError(f"a field of kind {kind} at byte {at}")
        value, at = _varint(message, at) if not kind else (message[at : at + size], at + size)
        if at > len(message) or key >= 1 << 32:
            raise ValueError(f"field {number} goes to byte {at} of {len(message)}")
        yield number, kind, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    number = 0
    for shift, byte in zip(range(0, 70, 7), message[at : at + 10], strict=False):
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at + 1 + shift // 7
    raise ValueError(f"a number without an end at byte {at}")


def inside(folder: epath.Path, name: str, remedy: str) -> epath.Path:
    """Returns the file of a name in a folder. Raises: Refused, if the name, or a link, leads out of the folder."""
    path = folder / name if PLAIN_PATH.fullmatch(name) else None
    if path is None or ("://" not in str(folder) and not _within(os.path.realpath(path), os.path.realpath(folder))):
        raise Refused(f"{shown(name)} leads out of {folder}: {remedy}.")
    return path


def _within(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
