"""Finds the files of a source, and reads them in bounded pieces, compressed or not."""

import contextlib
import glob
import gzip
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, cast

from etils import epath

from gptjax.data.sources.documents import END, PART_BYTES, RECORD_BYTES, Damages, DataConfig, Part
from gptjax.errors import Refused
from gptjax.runtime import optional, untrusted
from gptjax.runtime.files import size_of

COMPRESSED = ".gz", ".zst"


def parts(data: DataConfig) -> list[Part]:
    """The files that data.path matches, each one part. Raises: Refused."""
    return [Part(data.source, str(file), 0, END, size) for file, size in sized(data)]


def ranges(data: DataConfig) -> list[Part]:
    """The files that data.path matches, in parts of PART_BYTES. Raises: Refused."""
    return [part for file, size in sized(data) for part in split(file, size, data.source)]


def split(file: epath.Path, size: int, source: str) -> list[Part]:
    """Splits a file into parts of PART_BYTES; a compressed file stays whole, since only its start can be found."""
    whole = size <= PART_BYTES or file.name.endswith(COMPRESSED)
    starts = [0] if whole else range(0, size, PART_BYTES)
    stops = [*starts[1:], END]
    ends = zip(starts, stops, strict=True)
    return [Part(source, str(file), start, stop, min(stop, size) - start) for start, stop in ends]


def sized(data: DataConfig) -> list[tuple[epath.Path, int]]:
    """The files that data.path matches, sorted, with their bytes. Raises: Refused, if there are none."""
    path = data.path
    if not path:
        raise Refused(
            f'data.source={data.source} needs data.path; found "": give a file or a glob, such as corpus/*.txt.'
        )
    files = matching(path)
    if not files:
        folder = epath.Path(os.path.expanduser(path)).is_dir()
        hint = f' This is a folder: try "{path.rstrip("/")}/*".' if folder else ""
        raise Refused(f'data.path "{path}" matches 0 files, and at least 1 is needed.{hint}')
    return with_bytes(files)


def with_bytes(files: list[epath.Path]) -> list[tuple[epath.Path, int]]:
    """Pairs files with their size in bytes."""
    return list(zip(files, _at_once(size_of, files), strict=True))


def _at_once(ask: Callable, files: list[epath.Path]) -> list:
    """Calls `ask` for many files at a time: for files in a bucket each call is a request that waits for its answer."""
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(ask, files))


def matching(path: str) -> list[epath.Path]:
    """The files that a glob matches, sorted."""
    if "://" not in path:
        literal, pattern = _literal(os.path.expanduser(path))
        names = glob.glob(glob.escape(literal) + pattern, recursive=True)
        return [epath.Path(name) for name in sorted(names) if os.path.isfile(name)]
    if not glob.has_magic(path):
        return [epath.Path(path)] if epath.Path(path).is_file() else []
    if "**" in path:
        raise Refused(f'data.path "{path}" has **, which works on local paths alone: write one * for each level.')
    scheme, rest = path.split("://", 1)
    bucket, pattern = rest.split("/", 1)
    found = sorted(epath.Path(f"{scheme}://{bucket}").glob(pattern))
    folders = _at_once(lambda file: file.is_dir(), found)
    return [file for file, is_folder in zip(found, folders, strict=True) if not is_folder]


def _literal(path: str) -> tuple[str, str]:
    """The longest beginning of a path that exists as it is written, and the rest, in which `[`, `*` and `?` match."""
    end = 0
    for match in re.finditer("/+|$", path):
        if not os.path.lexists(path[: match.start()] or "/"):
            break
        end = match.end()
    return path[:end], path[end:]


def opened(path: str) -> BinaryIO:
    """Opens a file, decompressed if its name ends in one of COMPRESSED."""
    file = untrusted.opened(epath.Path(path))
    if path.endswith(COMPRESSED):
        if not file.read(1):
            raise EOFError("it is empty, which no compressed file is")
        file.seek(0)
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(file))
    if path.endswith(".zst"):
        arrow = optional.package("pyarrow", f"{path} (zstandard)")
        return io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(file), "zstd"))
    return file


@contextlib.contextmanager
def local(path: str):
    """Yields a local path for libraries that need one; a file in a bucket is copied for the block."""
    if "://" not in path:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(epath.Path(path).copy(f"{folder}/{epath.Path(path).name}"))


class Lines:
    """The lines that begin in a part, with their line ends. A line of more than RECORD_BYTES is damage.

    offset: byte of the decompressed file at which the last line began.
    next: byte at which the next line begins.
    """

    def __init__(self, part: Part, damages: Damages):
        self._part, self._damages, self._count = part, damages, 0
        self.offset = self.next = part.start

    def __iter__(self) -> Iterator[bytes]:
        with opened(self._part.path) as stream:
            if self._part.start:
                stream.seek(self._part.start - 1)
                self.next += self._rest(stream, self._part.stop - self._part.start + 1) - 1
            while self.next < self._part.stop and (line := stream.readline(RECORD_BYTES + 1)):
                self.offset, self.next, self._count = self.next, self.next + len(line), self._count + 1
                if len(line) <= RECORD_BYTES or line.endswith(b"\n"):
                    yield line
                else:
                    self._damages(self.where, f"has more than {RECORD_BYTES:,} bytes", "cut the line")
                    del line
                    self.next += self._rest(stream, END)

    @staticmethod
    def _rest(stream: BinaryIO, most: int) -> int:
        """Reads to the end of a line, at most `most` bytes; returns the number of bytes."""
        count, line = 0, b""
        while count < most and not line.endswith(b"\n") and (line := stream.readline(min(1 << 20, most - count))):
            count += len(line)
        return count

    def where(self) -> str:
        """The file, and the number of the last line in the file, from 1."""
        number = self._count
        if self._part.start:
            number = 1
            with opened(self._part.path) as stream:
                while (at := stream.tell()) < self.offset:
                    number += stream.read(min(1 << 20, self.offset - at)).count(b"\n")
        return f"{self._part.path} line {number}"
