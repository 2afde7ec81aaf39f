"""Weights in safetensors files, tensor by tensor: mapped into memory, so that none of them is ever held whole.

A file is 8 bytes with the length of its header, the header in JSON (of each tensor the dtype, the shape, and where in
the rest its bytes begin and end), and the rest (https://github.com/huggingface/safetensors, Format). Several files of
one model have an index beside them. The library `safetensors` itself writes a file only from all of its tensors at once.
"""

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
MAX_HEADER_BYTES = 100_000_000  # as many as the library takes
SHARD_BYTES = 5 << 30  # what Hugging Face's own files have at most
OTHERS = ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf"
REMEDY = "give a folder as transformers' save_pretrained writes it"


class Tensor(NamedTuple):
    """Where a tensor lies. dtype: as the file calls it."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def mapped(self, mode: str = "r") -> np.ndarray:
        """The tensor as it lies in the file; what is written to it under the mode `r+` is written there."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(self.path, DTYPES[self.dtype], mode, self.offset, self.shape)


def found(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a model by name. Raises: Refused, for files that are missing, damaged, or of another kind."""
    if (folder / INDEX).exists():
        names = untrusted.read_json(epath.Path(folder / INDEX), MAX_HEADER_BYTES, REMEDY).get("weight_map")
        if type(names) is not dict or not all(type(name) is str for name in names.values()):
            raise Refused(f"{folder / INDEX} is damaged (its weight_map is {shown(names)}): {REMEDY}.")
        files = sorted(set(names.values()))
    elif (folder / SINGLE).exists():
        names, files = {}, [SINGLE]
    else:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHERS)
        if others:
            raise Refused(
                f"{folder} has its weights in {others[0]}, and only safetensors are read, since a pickle can run "
                "anything: write them anew with save_pretrained(…, safe_serialization=True)."
            )
        raise Refused(f"{folder} holds neither {SINGLE} nor {INDEX}: {REMEDY}.")
    tensors = {}
    for name in files:
        if not untrusted.PLAIN_PATH.fullmatch(name) or "/" in name:
            raise Refused(f"{folder / INDEX} is damaged (it names the file {shown(name)}): {REMEDY}.")
        for tensor, place in _read(folder / name):
            if tensor in tensors or names.get(tensor, name) != name:
                raise Refused(f"{folder / name} has the tensor {shown(tensor)}, as has another file: {REMEDY}.")
            tensors[tensor] = place
    if missing := sorted(names.keys() - tensors.keys()):
        raise Refused(f"{folder / names[missing[0]]} has no tensor {missing[0]}, which {INDEX} names: {REMEDY}.")
    return tensors


def _read(path: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
    """Raises: Refused, for a header that does not fit its file."""
    damaged = lambda what: Refused(f"{path} is damaged ({what}): fetch it again.")
    try:
        if not os.path.isfile(path):
            raise Refused(f"{path} is {'no file' if path.exists() else 'missing'}: {REMEDY}.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise damaged(f"a header of {length} bytes, in a file of {size}")
            header = untrusted.json_object(file.read(length), path, "fetch it again")
    except OSError as error:
        raise Refused(f"{path} can't be read ({error.strerror}): {REMEDY}.") from error
    number = lambda value: type(value) is int and 0 <= value < 1 << 63
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not (type(dtype) is str and type(shape) is list and all(map(number, (*shape, begin, end)))):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(f"its header says {shown(entry)} of {shown(name)}") from error
        of_shape = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
        if not (begin <= end <= size - 8 - length and end - begin == of_shape):
            raise damaged(
                f"{name} is at bytes {begin} to {end} of {size - 8 - length}, and its shape {shape} takes {of_shape}"
            )
        spans.append((begin, end, name))
        yield name, Tensor(path, dtype, tuple(shape), 8 + length + begin)
    for (_, end, one), (begin, _, other) in zip(sorted(spans), sorted(spans)[1:]):
        if begin < end:
            raise damaged(f"{one} and {other} share bytes")


def create(folder: pathlib.Path, shapes: dict[str, tuple[str, tuple[int, ...]]], most: int) -> dict[str, Tensor]:
    """Files of at most so many bytes of tensors (or one larger tensor), to be filled; where each tensor is to go.

    Args:
      shapes: (dtype, shape) of each.

    Raises: OSError, where they don't fit on the disk.
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
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            # Where there is this call, a disk that is full says so here, and not by a signal when a page is written.
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
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return tensors
