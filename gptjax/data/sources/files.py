"""Finds the files of a source, and reads them in bounded pieces, compressed or not."""

import bz2
import contextlib
import glob
import gzip
import io
import lzma
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

COMPRESSED = ".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz"
# The longest windows that are read, in bytes, which is the memory that a file takes: that of pyarrow, and that of
# `zstd --long=30`.
WINDOW, LONG_WINDOW = 1 << 27, 1 << 30
XZ_BYTES = 1 << 30


def parts(data: DataConfig) -> list[Part]:
    """The files that data.path matches, each one part. Raises: Refused."""
    return [Part(data.source, str(file), 0, END, size) for file, size in sized(data)]


def ranges(data: DataConfig) -> list[Part]:
    """The files that data.path matches, in parts of PART_BYTES. Raises: Refused."""
    return [part for file, size in sized(data) for part in split(file, size, data.source)]


def split(file: epath.Path, size: int, source: str) -> list[Part]:
    """Splits a file into parts of PART_BYTES; a compressed file stays whole, since only its start can be found."""
    whole = size <= PART_BYTES or is_compressed(file.name)
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
    if not is_compressed(path):
        return file
    if not file.read(1):
        raise EOFError("it is empty, which no compressed file is")
    file.seek(0)
    name = path.lower()
    if name.endswith((".gz", ".gzip")):
        return cast(BinaryIO, gzip.open(file))
    if name.endswith(".bz2"):
        return cast(BinaryIO, bz2.open(file))
    if name.endswith(".xz"):
        return io.BufferedReader(_Decompressed(file, lambda: lzma.LZMADecompressor(memlimit=XZ_BYTES)))
    return _zstandard(file, path)


def is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED)


def _zstandard(file: BinaryIO, path: str) -> BinaryIO:
    """Opens a file of zstandard's frames; the first frame says how much memory all need."""
    arrow, library = (optional.package(name, f"{path} (zstandard)") for name in ("pyarrow", "zstandard"))
    try:
        window = library.get_frame_parameters(file.read(18)).window_size
    except library.ZstdError:  # another kind of frame, or damage that the reader finds
        window = 0
    file.seek(0)
    if window > LONG_WINDOW:
        raise EOFError(
            f"its window of {window:,} bytes is longer than {LONG_WINDOW:,}, and would take as much memory; recompress "
            "the file with zstd --long=30 or less"
        )
    if window <= WINDOW:
        return io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(file), "zstd"))
    return io.BufferedReader(_Decompressed(file, library.ZstdDecompressor(max_window_size=LONG_WINDOW).decompressobj))


class _Decompressed(io.RawIOBase):
    """The decompressed bytes of a file of frames. Raises: EOFError, for a frame that was cut."""

    def __init__(self, file: BinaryIO, decompressor: Callable):
        self._file, self._new = file, decompressor
        self._frame, self._ready, self._rest = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if not self._rest:
                self._rest = self._file.read(1 << 20)
            if not self._rest:
                if self._frame is not None:
                    raise EOFError("it was cut before the end of a frame")
                return 0
            self._frame = self._frame or self._new()
            self._ready, self._rest = self._frame.decompress(self._rest), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data.lstrip(b"\0"), None  # xz pads with zeros
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


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
