"""The token store: a tokenized corpus in a folder, read at any token, the same from a disk and from gs://.

    manifest.json               settings, sizes, and the length of every other file; written last
    tokenizer/                  the tokenizer that made the tokens
    train/  heldout/
        tokens/                 zarr3, uint16 or uint32 [tokens]: documents end to end, each [end_of_text] + its tokens
        document_starts/        zarr3, int64 [documents]: where each begins in tokens
        documents.jsonl         name and byte offset of each, in the same order

Zarr3 read through TensorStore, in shards of 32 Mi tokens whose parts of 8 Ki can be read alone, uncompressed, with
a CRC-32C each. Measured beside ArrayRecord and a bare memory map (benchmarks/NOTES.md): both read random windows of
1,025 tokens at about a fifth of the memory map's speed, tens of millions of tokens a second on 2 cores, so speed
doesn't choose between them. TensorStore also reads gs://, has all windows of a batch in flight together, and needs no
arithmetic on record borders.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import tensorstore as ts
from etils import epath

from gptjax import tokenizer as tokenizers
from gptjax.errors import Refused

FORMAT = 1
SPLITS = "train", "heldout"
SHARD = 1 << 25
CHUNK = 1 << 13
# Holds the shards' indexes, and the chunks that neighbouring windows share.
CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Split:
    """One part of a store. tokens, documents, bytes: how many, the last of UTF-8 text."""

    tokens: int
    documents: int
    bytes: int
    folder: epath.Path
    _tokens: ts.TensorStore = field(repr=False)
    _document_starts: ts.TensorStore = field(repr=False)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of tokens, read together: [len(starts), length] in the store's dtype, 0 beyond the last token."""
        windows = np.zeros((len(starts), length), self._tokens.dtype.numpy_dtype)
        stops = np.minimum(np.asarray(starts) + length, self.tokens)
        with ts.Batch() as batch:
            reads = [self._tokens[int(a) : int(b)].read(batch=batch) for a, b in zip(starts, stops)]
        for window, read in zip(windows, reads):
            part = read.result()
            window[: len(part)] = part
        return windows

    def document_starts(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Where documents `start` to `stop` begin in the tokens: int64."""
        return self._document_starts[start : self.documents if stop is None else stop].read().result()


@dataclass(frozen=True)
class Store:
    """A whole store. manifest: what manifest.json says; splits: by name, `train` and `heldout`."""

    folder: epath.Path
    manifest: dict
    tokenizer: tokenizers.Tokenizer
    splits: dict[str, Split]

    @classmethod
    def open(cls, folder: epath.PathLike) -> "Store":
        """Opens the store in a folder; refused if it is missing, of another format, or not what was written."""
        folder = epath.Path(folder)
        if not is_whole(folder):
            raise Refused(f"{folder} holds no token store (no manifest.json): prepare the data there first.")
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except ValueError as error:
            raise Refused(f"{folder}/manifest.json is cut short or changed: copy the whole store again.") from error
        if manifest["format"] != FORMAT:
            raise Refused(
                f"{folder} is a token store of format {manifest['format']} and this gptjax reads format {FORMAT}: "
                "prepare the data again in another folder."
            )
        _check_files(folder, manifest["files"])
        tokenizer = tokenizers.load(folder / "tokenizer")
        if tokenizer.hash != manifest["tokenizer_hash"]:
            raise Refused(
                f"{folder}/tokenizer has hash {tokenizer.hash[:12]}, but the tokens of {folder} were made by "
                f"{manifest['tokenizer_hash'][:12]}: put that tokenizer back, or prepare the data again."
            )
        splits = {
            name: Split(
                **manifest["splits"][name],
                folder=folder / name,
                _tokens=_open(folder / name / "tokens"),
                _document_starts=_open(folder / name / "document_starts"),
            )
            for name in SPLITS
        }
        return cls(folder, manifest, tokenizer, splits)

    def split(self, name: str) -> Split:
        return self.splits[name]


def is_whole(folder: epath.PathLike) -> bool:
    """Whether a store was finished here: its manifest is the last thing written."""
    return (epath.Path(folder) / "manifest.json").exists()


class SplitWriter:
    """Appends documents to a split; holds at most one shard of tokens."""

    def __init__(self, folder: epath.Path, dtype: type[np.integer]):
        folder.mkdir(parents=True)
        self.tokens = self.documents = self.bytes = 0
        self._tokens = _Appender(folder / "tokens", dtype)
        self._document_starts = _Appender(folder / "document_starts", np.int64)
        self._names = (folder / "documents.jsonl").open("w")

    def append(self, name: str, offset: int, tokens: np.ndarray, num_bytes: int):
        """Adds a document: its tokens, end_of_text first, and the UTF-8 bytes of its text."""
        self._document_starts.append(np.array([self.tokens]))
        self._tokens.append(tokens)
        self._names.write(json.dumps({"name": name, "offset": offset}) + "\n")
        self.tokens, self.documents, self.bytes = self.tokens + len(tokens), self.documents + 1, self.bytes + num_bytes

    def close(self) -> dict:
        """Writes what is left; returns the split's part of the manifest."""
        self._names.close()
        self._tokens.close()
        self._document_starts.close()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The smallest dtype that the store uses for a vocabulary."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_manifest(folder: epath.Path, manifest: dict):
    """Finishes a store: adds the format and the length of every file, and writes the manifest."""
    files = {str(file.relative_to(folder)): file.stat().length for file in _walk(folder)}
    content = {"format": FORMAT, **manifest, "files": files}
    (folder / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")


class _Appender:
    """A one-dimensional array that grows by whole shards, so that each is written once."""

    def __init__(self, folder: epath.Path, dtype: type[np.integer]):
        self._buffer, self._waiting, self._written = np.empty(SHARD, dtype), 0, 0
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {"chunk_shape": [CHUNK], "codecs": codecs, "index_codecs": codecs, "index_location": "end"}
        metadata = {
            "shape": [0],
            "data_type": np.dtype(dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        self._array = ts.open(_spec(folder) | {"metadata": metadata}, create=True).result()

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
        self._array = self._array.resize(exclusive_max=[self._written], expand_only=True).result()
        self._array[start : self._written].write(self._buffer[: self._waiting]).result()
        self._waiting = 0


def _spec(folder: epath.Path) -> dict:
    path = str(folder)
    return {"driver": "zarr3", "kvstore": f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}}


def _open(folder: epath.Path) -> ts.TensorStore:
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    # The manifest's file lengths were just compared, so nothing cached can be stale.
    return ts.open(_spec(folder), open=True, read=True, context=context, recheck_cached=False).result()


def _walk(folder: epath.Path) -> list[epath.Path]:
    paths = sorted(folder.iterdir())
    return [file for path in paths for file in (_walk(path) if path.is_dir() else [path])]


def _check_files(folder: epath.Path, files: dict[str, int]):
    """Refuses a store in which a file is gone or has another length; a missing shard would be read as zeros."""

    def length(name: str) -> int:
        file = folder / name
        return file.stat().length if file.exists() else -1

    with ThreadPoolExecutor(16) as threads:
        found = dict(zip(files, threads.map(length, files)))
    for name, expected in files.items():
        if found[name] != expected:
            state = "is missing" if found[name] < 0 else f"has {found[name]} bytes"
            raise Refused(
                f"{folder / name} {state} where {expected} bytes were written: copy the whole store again, or delete "
                f"{folder} and prepare the data again."
            )
