"""Tokens of a local store by a memory map, at the speed of a bare one.

A zarr3 shard written in one go holds its chunks in order, each followed by its CRC-32C, and at its end their index. So
where a token lies is a formula. TensorStore, which compares a whole chunk with its checksum whenever a window touches
it, is asked to read each chunk once, when it is first touched; from then on the chunk is read as it lies in memory. So a
store of any size begins at once, and costs a byte of memory for each chunk that was touched.
"""

import mmap

import numpy as np
import tensorstore as ts
from etils import epath

CHECKSUM = 4  # bytes behind a chunk, and behind the index


class Mapped:
    """A one-dimensional zarr3 array of shards on a local disk."""

    def __init__(self, folder: epath.Path, array: ts.TensorStore, shard: int, chunk: int):
        """`array`: the same opened by TensorStore. `shard`, `chunk`: their lengths, in elements."""
        self._folder, self._array, self._shard, self._chunk = folder, array, shard, chunk
        self._dtype, self._length = array.dtype.numpy_dtype, array.shape[0]
        self._chunks = shard // chunk  # in a whole shard
        self._stride = chunk + CHECKSUM // self._dtype.itemsize  # from a chunk to the next, in elements
        self._shards: dict[int, np.ndarray] = {}
        self._verified = np.zeros(-(-self._length // chunk), bool)  # its pages come into being as they are written

    def copy(self, starts: np.ndarray, places: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        """Puts spans of the array into `out`: so many elements from each start, all of which there are, to each place.

        Raises: ValueError, for a chunk that is not as it was written.
        """
        self._verify(starts, lengths)
        shards, inside = np.divmod(starts, self._shard)
        chunks, at = np.divmod(inside, self._chunk)
        # Where each span begins in its shard's file, and how much of its chunk is from there on.
        rows = zip(*(each.tolist() for each in (shards, chunks * self._stride + at, self._chunk - at, places, lengths)))
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
        """Has the chunks of some spans compared with their checksums that were not before."""
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
        for chunk, read in zip(new, reads):
            read.result()
            self._verified[chunk] = True

    def _map(self, number: int) -> np.ndarray:
        """The elements of a shard's file, checksums among them."""
        path = self._folder / "c" / str(number)
        chunks = -(-(min((number + 1) * self._shard, self._length) - number * self._shard) // self._chunk)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        index = np.frombuffer(mapped, np.uint8)[-16 * (self._shard // self._chunk) - CHECKSUM : -CHECKSUM]
        size = self._stride * self._dtype.itemsize
        expected = np.stack([size * np.arange(chunks), np.full(chunks, size)], axis=1)
        if not np.array_equal(index.view("<u8").reshape(-1, 2)[:chunks], expected):
            raise ValueError(f"{path}: its chunks do not lie end to end, in order, as gptjax writes them")
        return np.frombuffer(mapped, self._dtype.newbyteorder("<"), count=chunks * self._stride)
