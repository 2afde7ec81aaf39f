"""Where text comes from: iterators over documents, in an order that is the same every time."""

import glob
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from gptjax.errors import Refused, nearest

# A larger text file is several documents, so that a corpus in one file has documents to hold out.
MAX_TEXT_BYTES = 64 * 1024
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text, the file it is from, and the byte at which it starts there."""

    name: str
    offset: int
    text: str


def documents(source: str, path: str) -> Iterator[Document]:
    """The documents of a source, sorted by name; one is in memory at a time.

    source: `stdlib`, the source code of Python's standard library without its tests (`path` must be empty), or `text`,
    the UTF-8 files that the glob `path` matches, local or gs://. Refuses what is missing, empty or not UTF-8.
    """
    sources = {"stdlib": _stdlib, "text": _text}
    if source not in sources:
        raise Refused(f'data.source is "{source}", which is none of {", ".join(sources)}.{nearest(source, sources)}')
    return sources[source](path)


def _stdlib(path: str) -> Iterator[Document]:
    if path:
        raise Refused(f'data.path is "{path}", but data.source=stdlib takes no path: set data.source=text.')
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    for file in sorted(file for file in files if NOT_LIBRARY.isdisjoint(file.parts)):
        with open(root / file, "rb") as code:
            encoding, _ = tokenize.detect_encoding(code.readline)
            code.seek(0)
            text = code.read().decode(encoding)
        if text:  # an empty __init__.py is no document
            yield Document(file.as_posix(), 0, text)


def _text(path: str) -> Iterator[Document]:
    if not path:
        raise Refused('data.source=text needs data.path, which is "": give a file or a glob, such as corpus/*.txt.')
    files = _files(path)
    if not files:
        hint = f' It is a folder: try "{path.rstrip("/")}/*".' if epath.Path(path).is_dir() else ""
        raise Refused(f'data.path "{path}" matches 0 files, and at least 1 is needed.{hint}')
    for file in files:
        yield from _parts(file)


def _files(path: str) -> list[epath.Path]:
    """The files that a glob matches, sorted."""
    if "://" not in path:
        names = glob.glob(os.path.expanduser(path), recursive=True)
        return [epath.Path(name) for name in sorted(names) if os.path.isfile(name)]
    if not glob.has_magic(path):
        return [epath.Path(path)] if epath.Path(path).is_file() else []
    if "**" in path:
        raise Refused(f'data.path "{path}" has **, which works on local paths alone: write one * for each level.')
    scheme, rest = path.split("://", 1)
    bucket, pattern = rest.split("/", 1)
    return sorted(file for file in epath.Path(f"{scheme}://{bucket}").glob(pattern) if not file.is_dir())


def _parts(file: epath.Path) -> Iterator[Document]:
    """One document of a small file; several of a large one, cut after the last line end that fits."""
    offset, rest = 0, b""
    with file.open("rb") as stream:
        while read := stream.read(MAX_TEXT_BYTES + 1 - len(rest)):
            rest += read
            while len(rest) > MAX_TEXT_BYTES:
                cut = rest.rfind(b"\n", 0, MAX_TEXT_BYTES) + 1 or _character_boundary(rest, MAX_TEXT_BYTES)
                yield Document(str(file), offset, _decode(rest[:cut], file, offset))
                offset, rest = offset + cut, rest[cut:]
    if offset + len(rest) == 0:
        raise Refused(f"{file} is empty (0 bytes): remove it, or narrow data.path so that it isn't matched.")
    if rest:
        yield Document(str(file), offset, _decode(rest, file, offset))


def _character_boundary(data: bytes, at: int) -> int:
    """The last start of a UTF-8 character at or before `at`; a character has at most 3 bytes after its first."""
    return next((cut for cut in range(at, at - 4, -1) if data[cut] & 0xC0 != 0x80), at)


def _decode(data: bytes, file: epath.Path, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Refused(
            f"{file} is not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02X}): convert it, for example "
            "with iconv -t UTF-8, or narrow data.path so that it isn't matched."
        ) from error
