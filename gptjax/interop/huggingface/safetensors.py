"""Reads and writes safetensors files tensor by tensor; files are mapped into memory, so no tensor is held whole.

A file has 8 bytes with the length of the header, the header in JSON, and the bytes of the tensors. The header gives
dtype, shape, and begin and end of each tensor (https://github.com/huggingface/safetensors, Format). A model in several
files has an index file. The library `safetensors` is not used: it writes a file only from all tensors at once.
"""

import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from gptjax.errors import Refused, shown
from gptjax.runtime import untrusted

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the library
SHARD_BYTES = 5 << 30  # the largest size of Hugging Face's own files
OTHERS = ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf"
REMEDY = "give a folder as transformers' save_pretrained writes it"


class Tensor(NamedTuple):
    """The place of a tensor in a file. dtype: the file's name for the dtype. offset: in bytes."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def mapped(self, mode: str = "r") -> np.ndarray:
        """Maps the tensor into memory; in mode `r+`, writes to the array go to the file."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(self.path, DTYPES[self.dtype], mode, self.offset, self.shape)


def found(folder: pathlib.Path) -> dict[str, Tensor]:
    """Finds the tensors of a model by name. Raises: Refused, for files missing, damaged, or of another kind."""
    if (folder / INDEX).exists():
        names = untrusted.read_json(epath.Path(folder / INDEX), MAX_HEADER_BYTES, REMEDY).get("weight_map")
        if type(names) is not dict or not all(type(name) is str for name in names.values()):
            raise Refused(f"{folder / INDEX} is damaged (weight_map is {shown(names)}); {REMEDY}.")
        files = sorted(set(names.values()))
    elif (folder / SINGLE).exists():
        names, files = {}, [SINGLE]
    else:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHERS)
        if others:
            raise Refused(
                f"{folder} has the weights in {others[0]}, and only safetensors are read, since a pickle can run "
                "anything; save the model again with save_pretrained(…, safe_serialization=True)."
            )
        raise Refused(f"{folder} holds neither {SINGLE} nor {INDEX}; {REMEDY}.")
    tensors = {}
    for name in files:
        if not untrusted.PLAIN_PATH.fullmatch(name) or "/" in name:
            raise Refused(f"{folder / INDEX} is damaged (weight_map has the file {shown(name)}); {REMEDY}.")
        for tensor, place in _read(folder / name):
            if tensor in tensors or names.get(tensor, name) != name:
                raise Refused(f"{folder / name} and another file both have the tensor {shown(tensor)}; {REMEDY}.")
            tensors[tensor] = place
    if missing := sorted(names.keys() - tensors.keys()):
        raise Refused(f"{folder / names[missing[0]]} has no tensor {missing[0]}, which {INDEX} names; {REMEDY}.")
    return tensors


def _read(path: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and place of each tensor in a file. Raises: Refused, for a header that does not fit the file."""

    def damaged(reason: str) -> Refused:
        return Refused(f"{path} is damaged ({reason}); fetch the file again.")

    try:
        if not os.path.isfile(path):
            raise Refused(f"{path} is {'not a file' if path.exists() else 'missing'}; {REMEDY}.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise damaged(f"a header of {length} bytes, in a file of {size}")
            header = untrusted.json_object(file.read(length), path, "fetch it again")
    except OSError as error:
        raise Refused(f"{path} can't be read ({error.strerror}); {REMEDY}.") from error
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not (type(dtype) is str and type(shape) is list and all(map(_is_size, (*shape, begin, end)))):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(f"the header has {shown(entry)} for {shown(name)}") from error
        num_bytes = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
        if not (begin <= end <= size - 8 - length and end - begin == num_bytes):
            raise damaged(
                f"{name} is at bytes {begin} to {end} of {size - 8 - length}, and the shape {shape} takes {num_bytes}"
            )
        spans.append((begin, end, name))
        yield name, Tensor(path, dtype, tuple(shape), 8 + length + begin)
    for (_, end, one), (begin, _, other) in itertools.pairwise(sorted(spans)):
        if begin < end:
            raise damaged(f"{one} and {other} share bytes")


def _is_size(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def create(folder: pathlib.Path, shapes: dict[str, tuple[str, tuple[int, ...]]], most: int) -> dict[str, Tensor]:
    """Creates the files of a model, to be filled, and returns the place of each tensor.

    Args:
      folder: the folder for the files.
      shapes: (dtype, shape) of each tensor.
      most: bytes of tensors in one file; a larger tensor gets a file for itself.

    Raises: OSError, if the files don't fit on the disk.
    """
    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, (dtype, shape) in shapes.items()}
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > most:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    tensors = {}
    for number, names in enumerate(shards, 1):
        several = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path = folder / (several if len(shards) > 1 else SINGLE)
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            dtype, shape = shapes[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + sizes[name]]}
            at += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the tensors
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            # This call reports a full disk here; otherwise a signal would come when a page is written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 8 + len(text) + at)
            else:
                file.truncate(8 + len(text) + at)
        for name in names:
            begin = header[name]["data_offsets"][0]
            tensors[name] = Tensor(path, *shapes[name], 8 + len(text) + begin)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}}
        index["weight_map"] = {name: tensor.path.name for name, tensor in tensors.items()}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return tensors
