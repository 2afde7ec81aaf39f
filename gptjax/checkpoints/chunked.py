"""The arrays of a checkpoint piece by piece, so that a model larger than this machine's memory is written and read.

What is written is the other form that orbax's handler restores: a zarr array a leaf, in files of its own. What a run
saved lies in one key-value store (OCDBT), of which a piece is what one device held of one array.
"""

import itertools
import json
import time
from collections.abc import Iterator

import numpy as np
import tensorstore as ts
from etils import epath

from gptjax.checkpoints import manifest, retention
from gptjax.checkpoints.manager import VERSIONS
from gptjax.checkpoints.record import RunRecord
from gptjax.errors import Refused
from gptjax.runtime import files

PIECE_BYTES = 64 << 20


def create(state: epath.Path, name: str, shape: tuple[int, ...], dtype: str, order: tuple[int, ...]) -> ts.TensorStore:
    """A new array in the folder of a checkpoint's state. Raises: OSError.

    order: its axes, the first to be cut into pieces first.
    """
    (state / name).mkdir(parents=True)
    piece, size = [1] * len(shape), ts.dtype(dtype).numpy_dtype.itemsize
    for axis in reversed(order):
        piece[axis] = min(shape[axis], max(1, PIECE_BYTES // size))
        size *= piece[axis]
    metadata = {"shape": shape, "chunks": piece, "compressor": None}
    spec = {"driver": "zarr", "kvstore": _url(state / name), "metadata": metadata}
    return _done(ts.open(spec, dtype=ts.dtype(dtype), create=True))


def write(array: ts.TensorStore, region: tuple[slice, ...], block: np.ndarray) -> None:
    """Raises: OSError."""
    _done(array[region].write(block))


def piece(array: ts.TensorStore, region: tuple[slice, ...]) -> np.ndarray:
    """Raises: OSError."""
    return _done(array[region].read())


def _done(future):
    """What TensorStore was asked for. Raises: OSError."""
    try:
        return future.result()
    except Exception as error:  # TensorStore has no one kind for a full disk
        raise OSError(files.reason(error)) from error


def read(state: epath.Path, name: str, shape: tuple[int, ...]) -> ts.TensorStore:
    """An array of a checkpoint that was verified, not yet read. Raises: Refused, where it is none of this shape."""
    where = _url(state / name)
    if (state / "manifest.ocdbt").exists():
        where = {"driver": "ocdbt", "base": _url(state), "path": f"{name}/"}
    try:
        array = ts.open({"driver": "zarr", "kvstore": where}, open=True, read=True).result()
        if array.shape != shape or array.dtype.name not in ("float32", "bfloat16"):
            raise ValueError(f"{array.dtype.name} of shape {array.shape}, not {shape}")
    except ValueError as error:
        raise Refused(f"{state / name} can't be read ({files.reason(error)}): use another step.") from error
    return array


def _url(folder: epath.Path) -> str:
    return f"{folder}/" if "://" in str(folder) else f"file://{folder.resolve()}/"


def regions(array: ts.TensorStore) -> Iterator[tuple[slice, ...]]:
    """The pieces that an array is stored in."""
    cuts = zip(array.shape, array.chunk_layout.read_chunk.shape)
    axes = ([slice(at, min(at + size, length)) for at in range(0, length, size)] for length, size in cuts)
    yield from itertools.product(*axes)


def seal(checkpoints: epath.Path, step: int, run: RunRecord, arrays: dict[str, ts.TensorStore]) -> None:
    """Makes a checkpoint of the arrays that were created in a step's state.

    Args:
      run: the record of the run, for the manifest.
    """
    folder = retention.at(checkpoints, step)
    leaf = lambda array: {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(array.shape)}
    tree = {
        str((name,)): {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": leaf(array)}
        for name, array in arrays.items()
    }  # as orbax describes a dict's entries
    tree = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False}
    tree |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
    (folder / "state" / "_METADATA").write_text(json.dumps(tree))
    content = {"format": manifest.FORMAT, "step": step, "cursor": step, "saved_at": int(time.time())}
    content |= {"versions": VERSIONS} | run.to_json()
    content["arrays"] = {
        name: {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "bytes": array.size * array.dtype.numpy_dtype.itemsize,
        }
        for name, array in arrays.items()
    }
    manifest.write(folder, content | {"files": manifest.digests(folder, manifest.stored(folder))})
