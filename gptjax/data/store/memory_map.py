"""Reads tokens of a local store from a memory map, about as fast as a bare memory map.

A zarr3 shard that is written in one go holds its chunks in order, each followed by its CRC-32C, then their index. The
place of a token is therefore a formula. TensorStore compares a whole chunk with its checksum on every read, so each
chunk is read through TensorStore only once, on first touch; later reads copy from the mapped memory. A store of any
size opens at once and costs one byte of memory for each chunk that was touched.
"""

import mmap

import numpy as np
import tensorstore as ts
from etils import epath

CHECKSUM = 4  # bytes after each chunk, and after the index


class Mapped:
    """A one-dimensional zarr3 array of shards on a local disk."""

    def __init__(self, folder: epath.Path, array: ts.TensorStore, shard: int, chunk: int):
        """Maps a folder.

        Args:
          folder: where the array's shards are.
          array: the same array, opened by TensorStore.
          shard: elements in a shard.
          chunk: elements in a chunk.
        """
        self._folder, self._array, self._shard, self._chunk = folder, array, shard, chunk
        self._dtype, self._length = array.dtype.numpy_dtype, array.shape[0]
        self._chunks = shard // chunk  # in a whole shard
        self._stride = chunk + CHECKSUM // self._dtype.itemsize  # from one chunk to the next, in elements
        self._shards: dict[int, np.ndarray] = {}
        self._verified = np.zeros(-(-self._length // chunk), bool)  # the system allocates its pages on first write

    def copy(self, starts: np.ndarray, places: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        """Copies spans of the array into `out`.

        Args:
          starts: first element of each span in the array.
          places: where each span begins in `out`.
          lengths: elements of each span; all of them must exist.
          out: the array that is written.

        Raises: ValueError, if a chunk does not match its checksum.
        """
        self._verify(starts, lengths)
        shards, inside = np.divmod(starts, self._shard)
        chunks, at = np.divmod(inside, self._chunk)
        # The start of each span in its shard's file, and how much of its chunk follows that start.
        columns = shards, chunks * self._stride + at, self._chunk - at, places, lengths
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for shard, begin, whole, place, length in rows:
            stop = place + length
            while place < stop:
                mapped = self._shards.get(shard)
                if mapped is None:
                    mapped = self._shards[shard] = self._map(shard)
                part = min(whole, stop - place)
                out[place : place + part] = mapped[begin : begin + part]
                place, begin, whole = place + part, begin + part + self._stride - self._chunk, self._chunk
                if begin == self._chunks * self._stride:
                    shard, begin = shard + 1, 0

    def _verify(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Compares the chunks of some spans with their checksums, unless that was done before."""
        first, after = starts // self._chunk, -(-(starts + lengths) // self._chunk)
        more = range((after - first).max(initial=0))
        touched = [chunks[chunks < after] for chunks in (first + n for n in more)] or [first[:0]]
        touched = np.concatenate(touched)
        new = np.unique(touched[~self._verified[touched]])
        if not len(new):
            return
        with ts.Batch() as batch:
            bounds = ((chunk * self._chunk, min((chunk + 1) * self._chunk, self._length)) for chunk in new.tolist())
            reads = [self._array[start:stop].read(batch=batch) for start, stop in bounds]
        for chunk, read in zip(new, reads, strict=True):
            read.result()
            self._verified[chunk] = True

    def _map(self, number: int) -> np.ndarray:
        """The elements of a shard's file, including the checksums."""
        path = self._folder / "c" / str(number)
        chunks = -(-(min((number + 1) * self._shard, self._length) - number * self._shard) // self._chunk)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        index = np.frombuffer(mapped, np.uint8)[-16 * (self._shard // self._chunk) - CHECKSUM : -CHECKSUM]
        size = self._stride * self._dtype.itemsize
        expected = np.stack([size * np.arange(chunks), np.full(chunks, size)], axis=1)
        if not np.array_equal(index.view("<u8").reshape(-1, 2)[:chunks], expected):
            raise ValueError(f"{path}: chunks must lie end to end, in order, as gptjax writes them")
        return np.frombuffer(mapped, self._dtype.newbyteorder("<"), count=chunks * self._stride)
