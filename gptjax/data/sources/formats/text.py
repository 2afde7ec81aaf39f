"""Plain text: the source code of the standard library, and files in UTF-8."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from gptjax.data.sources import files
from gptjax.data.sources.documents import END, Damages, DataConfig, Document, Part
from gptjax.errors import Refused

# A larger text file becomes several documents, so that a corpus in one file has documents to hold out.
MAX_TEXT_BYTES = 64 * 1024
SOURCE = """
    asm bash bzl c cc clj cmake cpp cs css cu cuh cxx d dart el elm erl ex exs f f90 fs go gradle groovy h hh hpp hrl hs
    html hxx java jl js jsx kt kts less lisp lua m md ml mli mm nim nix pas php pl pm proto ps1 py pyi pyx r rb rs rst s
    sass scala scm scss sh sol sql sv swift tcl tex tf toml ts tsx v vb vhd vim vue yaml yml zig zsh
"""
NOT_SOURCE = {"__pycache__", "node_modules", "site-packages", "dist-packages", "venv", "bower_components"}
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_parts(data: DataConfig) -> list[Part]:
    """The files of Python's standard library without its tests; data.path must be empty."""
    if data.path:
        raise Refused(f'data.path="{data.path}" must be empty with data.source=stdlib: set data.source=text.')
    root = _library()
    names = []
    for folder, inside, files_there in os.walk(root):
        inside[:] = [name for name in inside if name not in NOT_LIBRARY]  # site-packages alone has ten times the files
        parts = Path(folder).relative_to(root).parts
        names += [(*parts, name) for name in files_there if name.endswith(".py")]
    sizes = [("/".join(parts), root.joinpath(*parts).stat().st_size) for parts in sorted(names)]
    return [Part("stdlib", name, 0, size, size) for name, size in sizes]


def read_stdlib(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    with open(_library() / part.path, "rb") as code:
        encoding, _ = tokenize.detect_encoding(code.readline)
        code.seek(0)
        text = code.read().decode(encoding)
    if text:  # an empty __init__.py is skipped
        yield Document(part.path, 0, text)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def code_parts(data: DataConfig) -> list[Part]:
    """Source files below a folder, or the files that a glob matches; empty files are left out."""
    folder = epath.Path(data.path).expanduser()
    files_there = _tree(folder) if data.path and folder.is_dir() else None
    if files_there is not None and not files_there:
        raise Refused(
            f"data.path {data.path} has 0 files of source code: give a glob for others, such as src/**/*.tex."
        )
    sized = files.sized(data) if files_there is None else files.with_bytes(files_there)
    return [part for file, size in sized if size for part in files.split(file, size, data.source)]


def _tree(folder: epath.Path) -> list[epath.Path]:
    """The source files below a folder, sorted; skips hidden folders, NOT_SOURCE and links."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in NOT_SOURCE or os.path.islink(path):
            continue
        if path.is_dir():
            found += _tree(path)
        elif path.suffix.lower().removeprefix(".") in SOURCE.split():
            found.append(path)
    return found


def read_text(part: Part, data: DataConfig, damages: Damages) -> Iterator[Document]:
    """Yields a small file as one document; cuts a large file into several, after the last line end that fits."""
    with files.opened(part.path) as stream:
        start, stop = _boundary(stream, part.start), _boundary(stream, part.stop)
        if (part.start, part.stop) != (0, END):  # in a compressed file only the start can be found
            stream.seek(start)
        offset, rest = start, b""
        while read := stream.read(min(MAX_TEXT_BYTES + 1 - len(rest), stop - offset - len(rest))):
            rest += read
            while len(rest) > MAX_TEXT_BYTES:
                cut = rest.rfind(b"\n", 0, MAX_TEXT_BYTES) + 1 or _character_boundary(rest, MAX_TEXT_BYTES)
                yield from decoded(rest[:cut], part.path, offset, damages)
                offset, rest = offset + cut, rest[cut:]
        if rest:
            yield from decoded(rest, part.path, offset, damages)
        elif not offset:
            damages(part.path, "is empty (0 bytes)", "remove it, or narrow data.path so that it isn't matched")


def _boundary(stream: BinaryIO, at: int) -> int:
    """Where to cut documents near byte `at`: after the next line end if one is near, else between characters."""
    if at in (0, END):
        return at
    stream.seek(at - 4)  # no character is longer
    near = stream.read(MAX_TEXT_BYTES)
    return at - 4 + (near.find(b"\n", 3) + 1 or _character_boundary(near, 4))


def _character_boundary(data: bytes, at: int) -> int:
    """The last start of a UTF-8 character at or before `at`; a character has at most 3 bytes after its first."""
    return next((cut for cut in range(at, at - 4, -1) if data[cut] & 0xC0 != 0x80), at)


def decoded(data: bytes, path: str, offset: int, damages: Damages) -> Iterator[Document]:
    """Yields the document of some bytes, or reports that they are not UTF-8."""
    try:
        yield Document(path, offset, data.decode())
    except UnicodeDecodeError as error:
        damages(
            path,
            f"is not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02X})",
            "convert it, for example with iconv -t UTF-8, or narrow data.path so that it isn't matched",
        )
