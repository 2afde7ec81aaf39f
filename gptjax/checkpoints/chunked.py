"""Reads and writes the arrays of a checkpoint in pieces, for models larger than this machine's memory.

The writer uses the other form that orbax's handler restores: one zarr array per leaf, each in separate files. A run
saves all arrays into one key-value store (OCDBT), where a piece is the part of an array that one device held.
"""

import itertools
import json
import time
import typing
from collections.abc import Iterator

import numpy as np
import tensorstore as ts
from etils import epath

from gptjax.checkpoints import manifest, retention
from gptjax.checkpoints.record import RunRecord
from gptjax.errors import Refused
from gptjax.runtime import files

PIECE_BYTES = 64 << 20


def create(state: epath.Path, name: str, shape: tuple[int, ...], dtype: str, order: tuple[int, ...]) -> ts.TensorStore:
    """Creates an array in the folder of a checkpoint's state.

    Args:
      state: the folder.
      name: the array's name.
      shape: the array's shape.
      dtype: the array's type.
      order: all axes; the first is the first to be cut into pieces.

    Raises: OSError.
    """
    (state / name).mkdir(parents=True)
    piece, size = [1] * len(shape), ts.dtype(dtype).numpy_dtype.itemsize
    for axis in reversed(order):
        piece[axis] = min(shape[axis], max(1, PIECE_BYTES // size))
        size *= piece[axis]
    metadata = {"shape": shape, "chunks": piece, "compressor": None}
    spec = {"driver": "zarr", "kvstore": kvstore(state / name), "metadata": metadata}
    return _done(ts.open(spec, dtype=ts.dtype(dtype), create=True))


def write(array: ts.TensorStore, region: tuple[slice, ...], block: np.ndarray) -> None:
    """Writes a region of an array. Raises: OSError."""
    _done(array[region].write(block))


def piece(array: ts.TensorStore, region: tuple[slice, ...]) -> np.ndarray:
    """Reads a region of an array. Raises: OSError."""
    return _done(array[region].read())


def _done(future):
    """Waits for a result from TensorStore. Raises: OSError."""
    try:
        return future.result()
    except Exception as error:  # TensorStore raises several types for a full disk
        raise OSError(files.reason(error)) from error


def read(state: epath.Path, name: str, shape: tuple[int, ...]) -> ts.TensorStore:
    """Opens an array of a verified checkpoint without reading the values. Raises: Refused, if the shape differs."""
    try:
        array = opened(state, name)
        if array.shape != shape or array.dtype.name not in ("float32", "bfloat16"):
            raise ValueError(f"found {array.dtype.name} of shape {array.shape}, not {shape}")
    except ValueError as error:
        raise Refused(f"{state / name} can't be read ({files.reason(error)}): use another step.") from error
    return array


def opened(state: epath.Path, name: str) -> ts.TensorStore:
    """Opens an array of either form without reading the values. Raises: ValueError."""
    where = kvstore(state / name)
    if (state / "manifest.ocdbt").exists():
        where = {"driver": "ocdbt", "base": kvstore(state), "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": where}, open=True, read=True).result()


def kvstore(folder: epath.Path) -> str | dict:
    """A folder for TensorStore, which would read `%`, `#` and `?` of a local path in a URL as parts of the URL."""
    return f"{folder}/" if "://" in str(folder) else {"driver": "file", "path": f"{folder.resolve()}/"}


def regions(array: ts.TensorStore) -> Iterator[tuple[slice, ...]]:
    """Yields the regions of the pieces that an array is stored in."""
    chunk = typing.cast(tuple[int, ...], array.chunk_layout.read_chunk.shape)
    cuts = zip(array.shape, chunk, strict=True)
    axes = ([slice(at, min(at + size, length)) for at in range(0, length, size)] for length, size in cuts)
    yield from itertools.product(*axes)


def seal(checkpoints: epath.Path, step: int, run: RunRecord, arrays: dict[str, ts.TensorStore]) -> None:
    """Completes the checkpoint of a step from the arrays created in that step's state.

    Args:
      checkpoints: the folder of all checkpoints.
      step: the checkpoint's step.
      run: the record of the run, for the manifest.
      arrays: the arrays by name.
    """
    folder = retention.at(checkpoints, step)
    leaves = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(array.shape),
            },
        }
        for name, array in arrays.items()
    }  # orbax's description of a dict's entries
    tree = {"tree_metadata": leaves, "use_ocdbt": False, "use_zarr3": False}
    tree |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
    (folder / "state" / "_METADATA").write_text(json.dumps(tree))
    content = {"format": manifest.FORMAT, "step": step, "cursor": step, "saved_at": int(time.time())}
    content |= {"versions": manifest.VERSIONS} | run.to_json()
    content["arrays"] = {
        name: {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "bytes": array.size * array.dtype.numpy_dtype.itemsize,
        }
        for name, array in arrays.items()
    }
    manifest.write(folder, content | {"files": manifest.digests(folder, manifest.stored(folder))})
