"""The token store: a tokenized corpus in a folder, read at any token, with the same code from a disk and from gs://.

    manifest.json               settings, sizes, and the length of every other file; written last
    tokenizer/                  the tokenizer that made the tokens
    train/  heldout/
        tokens/                 zarr3, uint16 or uint32 [tokens]: documents end to end, each [end_of_text] + its tokens
        document_starts/        zarr3, int64 [documents]: index of each document's first token
        prompts/                zarr3, int64 [documents], only if documents have prompts: the number of prompt tokens
                                that follow each document's end_of_text
        documents.jsonl         name and byte offset of each document, in the same order

Arrays are zarr3, read through TensorStore: shards of 32 Mi tokens, uncompressed, with chunks of 8 Ki that can be read
alone and have a CRC-32C each. ArrayRecord was measured too (benchmarks/NOTES.md). Both read random windows of 1,025
tokens at about a fifth of a memory map's speed, tens of millions of tokens a second on 2 cores, so speed does not
decide. TensorStore also reads gs://, has all windows of a batch in flight together, and needs no arithmetic on record
borders. From a local disk, windows are copied out of a memory map of the same files (`memory_map.py`), at several times
the speed. There a chunk is compared with its checksum on first touch in a process; on gs:// on every read.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tensorstore as ts
from etils import epath

from gptjax.data.store.memory_map import Mapped
from gptjax.data.store.split import REMEDY, Split
from gptjax.errors import Refused, shown
from gptjax.runtime import untrusted
from gptjax.runtime.files import size_of
from gptjax.tokenizers.tokenizer import Tokenizer, from_files, hash_of, read_files

FORMAT = 1
SPLITS = "train", "heldout"
SHARD = 1 << 25
CHUNK = 1 << 13
# For the indexes of shards, and for chunks that neighbouring windows share.
CACHE_BYTES = 64 << 20
# A manifest lists the store's files: 10 T tokens have some 300,000.
MAX_MANIFEST_BYTES = 64 << 20
SIZES: dict[str, type] = {"tokens": int, "documents": int, "bytes": int}
MANIFEST: dict[str, type] = {
    "tokenizer_hash": str,
    "text_hash": str,
    "settings": dict,
    "splits": dict,
    "files": dict,
    "vocab_size": int,
    "compressed_heldout_bytes": int,
    "gzip_bytes": int,
    "xz_bytes": int,
}


@dataclass(frozen=True)
class Store:
    """A complete store.

    manifest: the content of manifest.json.
    splits: by name, `train` and `heldout`.
    """

    folder: epath.Path
    manifest: dict
    tokenizer: Tokenizer
    splits: dict[str, Split]

    @classmethod
    def open(cls, folder: epath.PathLike) -> "Store":
        """Opens the store in a folder. Raises: Refused, if the store is missing, damaged or of another format."""
        folder = epath.Path(folder)
        if not is_whole(folder):
            raise Refused(f"{folder} holds no token store (no manifest.json): prepare the data there first.")
        where = folder / "manifest.json"
        manifest = untrusted.read_json(where, MAX_MANIFEST_BYTES, REMEDY)
        if manifest.get("format") != FORMAT:
            raise Refused(
                f"{folder} is a token store of format {shown(manifest.get('format'))} and this gptjax reads format "
                f"{FORMAT}: prepare the data again in another folder."
            )
        _check_manifest(manifest, where)
        _check_files(folder, manifest["files"])
        files = read_files(folder / "tokenizer")
        if hash_of(files) != manifest["tokenizer_hash"]:
            raise Refused(
                f"{folder}/tokenizer has hash {hash_of(files)[:12]}, but the tokens of {folder} were made "
                f"by {manifest['tokenizer_hash'][:12]}: put that tokenizer back, or prepare the data again."
            )
        tokenizer = from_files(files, str(folder / "tokenizer"))
        splits = {name: _open_split(folder, name, manifest) for name in SPLITS}
        return cls(folder, manifest, tokenizer, splits)

    def split(self, name: str) -> Split:
        return self.splits[name]


def is_whole(folder: epath.PathLike) -> bool:
    """Whether a store was finished in this folder: the manifest is written last."""
    return (epath.Path(folder) / "manifest.json").exists()


class SplitWriter:
    """Appends documents to a split; holds at most one shard of tokens in memory."""

    def __init__(self, folder: epath.Path, dtype: type[np.integer], prompts: bool = False):
        """prompts: whether documents have prompts."""
        folder.mkdir(parents=True)
        self.tokens = self.documents = self.bytes = 0
        self._tokens = _Appender(folder / "tokens", dtype)
        self._document_starts = _Appender(folder / "document_starts", np.int64)
        self._prompts = _Appender(folder / "prompts", np.int64) if prompts else None
        self._names = (folder / "documents.jsonl").open("w")

    def append(self, name: str, offset: int, tokens: np.ndarray, num_bytes: int):
        """Adds a document.

        Args:
          name, offset: where the document comes from.
          tokens: its tokens, end_of_text first.
          num_bytes: bytes of its text in UTF-8.
        """
        self.begin(np.array([len(tokens)]), named(name, offset), num_bytes)
        self.extend(tokens)

    def begin(self, lengths: np.ndarray, names: str, num_bytes: int, prompts: np.ndarray | None = None):
        """Announces documents, whose tokens follow by `extend`.

        Args:
          lengths: tokens of each document.
          names: `named` of each document, joined.
          num_bytes: bytes of all texts in UTF-8.
          prompts: prompt tokens of each document; needed if the split has prompts.
        """
        ends = self.tokens + np.cumsum(lengths)
        self._document_starts.append(ends - lengths)
        if self._prompts:
            assert prompts is not None, "a split with prompts needs the prompt tokens of each document"
            self._prompts.append(prompts)
        self._names.write(names)
        self.tokens, self.documents, self.bytes = int(ends[-1]), self.documents + len(lengths), self.bytes + num_bytes

    def extend(self, tokens: np.ndarray):
        """Adds the next tokens of the documents that `begin` announced."""
        self._tokens.append(tokens)

    def close(self) -> dict:
        """Writes what is still in memory; returns the split's part of the manifest."""
        self._names.close()
        self._tokens.close()
        self._document_starts.close()
        if self._prompts:
            self._prompts.close()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}


def named(name: str, offset: int) -> str:
    """The line of a document in documents.jsonl."""
    return json.dumps({"name": name, "offset": offset}) + "\n"


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The smallest dtype that holds every id of a vocabulary."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_manifest(folder: epath.Path, manifest: dict):
    """Finishes a store: writes the manifest, with the format and the length of every file added."""
    files = {str(file.relative_to(folder)): size_of(file) for file in _walk(folder)}
    content = {"format": FORMAT, **manifest, "files": files}
    (folder / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")


class _Appender:
    """A one-dimensional array that grows by whole shards, so that each shard is written once."""

    def __init__(self, folder: epath.Path, dtype: type[np.integer]):
        self._buffer, self._waiting, self._written = np.empty(SHARD, dtype), 0, 0
        try:
            self._array = ts.open(_spec(folder, dtype, 0), create=True).result()
        except ValueError as error:
            raise OSError(f"… {' '.join(str(error).split())[-200:]}") from error

    def append(self, values: np.ndarray):
        while len(values):
            fitting = values[: SHARD - self._waiting]
            self._buffer[self._waiting : self._waiting + len(fitting)] = fitting
            self._waiting += len(fitting)
            if self._waiting == SHARD:
                self.close()
            values = values[len(fitting) :]

    def close(self):
        start, self._written = self._written, self._written + self._waiting
        try:
            self._array = self._array.resize(exclusive_max=[self._written], expand_only=True).result()
            self._array[start : self._written].write(self._buffer[: self._waiting]).result()
        except ValueError as error:  # TensorStore also raises this error for a full disk
            raise OSError(f"… {' '.join(str(error).split())[-200:]}") from error
        self._waiting = 0


def _spec(folder: epath.Path, dtype: type[np.integer], length: int) -> dict:
    """TensorStore's description of an array; opening fails where the disk says anything else."""
    path = str(folder)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [CHUNK], "codecs": codecs, "index_codecs": codecs, "index_location": "end"}
    metadata = {
        "shape": [length],
        "data_type": np.dtype(dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return {
        "driver": "zarr3",
        "kvstore": f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,  # so that every token has bytes on disk: see `_open_split`
    }


def _open_split(folder: epath.Path, name: str, manifest: dict) -> Split:
    """Opens a split that matches its manifest. Raises: Refused."""
    tokens, documents, num_bytes = (manifest["splits"][name][key] for key in SIZES)
    dtype = token_dtype(manifest["vocab_size"])
    stored = sum(size for file, size in manifest["files"].items() if file.startswith(f"{name}/tokens/c/"))
    if not 0 < documents < tokens or tokens * np.dtype(dtype).itemsize > stored:
        raise Refused(
            f"{folder}/manifest.json is damaged ({name} has {shown(documents)} documents of {shown(tokens)} tokens in "
            f"{shown(stored)} bytes): {REMEDY}."
        )
    array = _open(folder / name / "tokens", dtype, tokens)
    return Split(
        tokens,
        documents,
        num_bytes,
        folder / name,
        array,
        _open(folder / name / "document_starts", np.int64, documents),
        None if "://" in str(folder) else Mapped(folder / name / "tokens", array, SHARD, CHUNK),
        _open(folder / name / "prompts", np.int64, documents)
        if f"{name}/prompts/zarr.json" in manifest["files"]
        else None,
    )


def _open(folder: epath.Path, dtype: type[np.integer], length: int) -> ts.TensorStore:
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    # The lengths of files were just compared with the manifest, so no cached data can be stale.
    opened = ts.open(_spec(folder, dtype, length), open=True, read=True, context=context, recheck_cached=False)
    try:
        return opened.result()
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{folder}/zarr.json is not as it was written ({reason}): {REMEDY}.") from error


def _walk(folder: epath.Path) -> list[epath.Path]:
    paths = sorted(folder.iterdir())
    return [file for path in paths for file in (_walk(path) if path.is_dir() else [path])]


def _check_manifest(manifest: dict, where: epath.Path):
    """Refuses a manifest with a key that is missing, of another type, or a number out of range."""
    untrusted.check_types(manifest, MANIFEST, where, REMEDY)
    untrusted.check_types(manifest["splits"], dict.fromkeys(SPLITS, dict), where, REMEDY)
    parts = [manifest["splits"][name] for name in SPLITS]
    for part in parts:
        untrusted.check_types(part, SIZES, where, REMEDY)
    untrusted.check_types(manifest["files"], dict.fromkeys(manifest["files"], int), where, REMEDY)
    for values in (manifest, *parts):
        for key, value in values.items():
            if type(value) is int and not 0 < value < 1 << 53:
                raise Refused(f"{where} is damaged ({key} is {shown(value)}): {REMEDY}.")


def _check_files(folder: epath.Path, files: dict[str, int]):
    """Refuses a store with a file missing, of another length, or outside the folder; a missing shard reads as zeros."""

    def length(name: str) -> int:
        file = untrusted.inside(folder, name, REMEDY)
        return size_of(file) if untrusted.is_file(file) else -1

    with ThreadPoolExecutor(16) as threads:
        found = dict(zip(files, threads.map(length, files), strict=True))
    for name, expected in files.items():
        if found[name] != expected:
            state = "is missing" if found[name] < 0 else f"has {found[name]} bytes"
            raise Refused(
                f"{folder / name} {state} where {shown(expected)} bytes were written: copy the whole store again, or "
                f"delete {folder} and prepare the data again."
            )
