"""The token store: a tokenized corpus in a folder, read at any token, the same from a disk and from gs://.

    manifest.json               settings, sizes, and the length of every other file; written last
    tokenizer/                  the tokenizer that made the tokens
    train/  heldout/
        tokens/                 zarr3, uint16 or uint32 [tokens]: documents end to end, each [end_of_text] + its tokens
        document_starts/        zarr3, int64 [documents]: where each begins in tokens
        prompts/                zarr3, int64 [documents], where there are any: how many of each one's tokens, after its
                                end_of_text, are of its prompt
        documents.jsonl         name and byte offset of each, in the same order

Zarr3 read through TensorStore, in shards of 32 Mi tokens whose parts of 8 Ki can be read alone, uncompressed, with
a CRC-32C each. Measured beside ArrayRecord and a bare memory map (benchmarks/NOTES.md): both read random windows of
1,025 tokens at about a fifth of the memory map's speed, tens of millions of tokens a second on 2 cores, so speed
doesn't choose between them. TensorStore also reads gs://, has all windows of a batch in flight together, and needs no
arithmetic on record borders. From a local disk windows are copied out of a memory map of the same files (`mapped.py`), at
several times the speed; there a part is compared with its checksum once a process, when it is first touched, and on
gs:// whenever it is read.
"""

import bisect
import functools
import itertools
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import tensorstore as ts
from etils import epath

from gptjax.data.store.memory_map import Mapped
from gptjax.errors import Refused, shown
from gptjax.runtime import untrusted
from gptjax.tokenizers import tokenizer as tokenizers

FORMAT = 1
SPLITS = "train", "heldout"
SHARD = 1 << 25
CHUNK = 1 << 13
# Holds the shards' indexes, and the chunks that neighbouring windows share.
CACHE_BYTES = 64 << 20
# A manifest lists its files, of which 10 T tokens have some 300,000.
MAX_MANIFEST_BYTES = 64 << 20
REMEDY = "copy the whole store again, or prepare the data again in another folder"
SIZES = dict.fromkeys(("tokens", "documents", "bytes"), int)
MANIFEST = dict.fromkeys(("tokenizer_hash", "text_hash"), str) | dict.fromkeys(("settings", "splits", "files"), dict)
MANIFEST |= dict.fromkeys(("vocab_size", "compressed_heldout_bytes", "gzip_bytes", "xz_bytes"), int)


@dataclass(frozen=True)
class Split:
    """One part of a store. tokens, documents, bytes: how many, the last of UTF-8 text."""

    tokens: int
    documents: int
    bytes: int
    folder: epath.Path
    _tokens: ts.TensorStore = field(repr=False)
    _document_starts: ts.TensorStore = field(repr=False)
    _mapped: Mapped | None = field(repr=False)  # of a local store
    _prompts: ts.TensorStore | None = field(repr=False, default=None)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of tokens, read together: [len(starts), length] in the store's dtype, 0 beyond the last token.

        Raises: ValueError, for tokens that are not as they were written.
        """
        return self.spans(np.asarray(starts), np.full(len(starts), length)).reshape(len(starts), length)

    def spans(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Spans of tokens end to end, otherwise as `read`."""
        ends = np.cumsum(lengths)
        there = np.clip(self.tokens - starts, 0, lengths)
        new = np.empty if (there == lengths).all() else np.zeros
        tokens = new(ends[-1] if len(ends) else 0, self._tokens.dtype.numpy_dtype)
        if self._mapped:
            self._mapped.copy(starts, ends - lengths, there, tokens)
            return tokens
        places = [(int(a), int(b), int(n)) for a, b, n in zip(starts, ends - lengths, there)]
        with ts.Batch() as batch:
            reads = [self._tokens[start : start + length].read(batch=batch) for start, _, length in places]
        for (_, place, length), read in zip(places, reads):
            tokens[place : place + length] = read.result()
        return tokens

    def document_starts(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Where documents `start` to `stop` begin in the tokens: int64, ascending. Raises: Refused."""
        stop = self.documents if stop is None else stop
        try:
            starts = self._document_starts[start:stop].read().result()
            # Each has a token at least, and the first begins with the first token.
            if (np.diff(starts, append=self.tokens) < 1).any() or starts[0] < start or starts[0] > start == 0:
                raise ValueError(f"documents {start} to {stop} do not follow one another")
        except ValueError as error:
            where, reason = self.folder / "document_starts", " ".join(str(error).split())[:200]
            raise Refused(f"{where} is not as it was written ({reason}): {REMEDY}.") from error
        return starts

    @property
    def has_prompts(self) -> bool:
        return self._prompts is not None

    @functools.cached_property
    def _prompt_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """The first token of each document's prompt, and that after its last; held for all. Raises: Refused."""
        starts = self.document_starts()
        try:
            prompts = self._prompts.read().result()
            if (prompts < 0).any() or (prompts >= np.diff(starts, append=self.tokens)).any():
                raise ValueError("a prompt is longer than its document")
        except ValueError as error:
            where, reason = self.folder / "prompts", " ".join(str(error).split())[:200]
            raise Refused(f"{where} is not as it was written ({reason}): {REMEDY}.") from error
        return starts + 1, starts + 1 + prompts

    def in_prompts(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Of spans of tokens, end to end: which are of a prompt. bool. Raises: Refused."""
        first, stop = self._prompt_spans
        tokens = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        document = np.searchsorted(first, tokens, "right") - 1
        return (document >= 0) & (tokens < stop[document])

    def document_at(self, token: int) -> int:
        """The number of the document that a token belongs to."""
        start = lambda number: self.document_starts(number, number + 1)[0]
        return bisect.bisect_right(range(self.documents), token, key=start) - 1

    def names(self, numbers: Collection[int]) -> list[dict]:
        """Name and byte offset of the documents of these numbers, in ascending order. Raises: Refused."""
        path = self.folder / "documents.jsonl"
        with path.open("rb") as lines:
            until_last = itertools.islice(lines, max(numbers, default=-1) + 1)
            wanted = [line for number, line in enumerate(until_last) if number in numbers]
        rows = [untrusted.json_object(line, path, REMEDY) for line in wanted]
        for row in rows:
            untrusted.check_types(row, {"name": str, "offset": int}, path, REMEDY)
        return rows


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
        where = folder / "manifest.json"
        manifest = untrusted.read_json(where, MAX_MANIFEST_BYTES, REMEDY)
        if manifest.get("format") != FORMAT:
            raise Refused(
                f"{folder} is a token store of format {shown(manifest.get('format'))} and this gptjax reads format "
                f"{FORMAT}: prepare the data again in another folder."
            )
        _check_manifest(manifest, where)
        _check_files(folder, manifest["files"])
        files = tokenizers.read_files(folder / "tokenizer")
        if tokenizers.hash_of(files) != manifest["tokenizer_hash"]:
            raise Refused(
                f"{folder}/tokenizer has hash {tokenizers.hash_of(files)[:12]}, but the tokens of {folder} were made "
                f"by {manifest['tokenizer_hash'][:12]}: put that tokenizer back, or prepare the data again."
            )
        tokenizer = tokenizers.from_files(files, str(folder / "tokenizer"))
        splits = {name: _open_split(folder, name, manifest) for name in SPLITS}
        return cls(folder, manifest, tokenizer, splits)

    def split(self, name: str) -> Split:
        return self.splits[name]


def is_whole(folder: epath.PathLike) -> bool:
    """Whether a store was finished here: its manifest is the last thing written."""
    return (epath.Path(folder) / "manifest.json").exists()


class SplitWriter:
    """Appends documents to a split; holds at most one shard of tokens."""

    def __init__(self, folder: epath.Path, dtype: type[np.integer], prompts: bool = False):
        """prompts: whether documents have them."""
        folder.mkdir(parents=True)
        self.tokens = self.documents = self.bytes = 0
        self._tokens = _Appender(folder / "tokens", dtype)
        self._document_starts = _Appender(folder / "document_starts", np.int64)
        self._prompts = _Appender(folder / "prompts", np.int64) if prompts else None
        self._names = (folder / "documents.jsonl").open("w")

    def append(self, name: str, offset: int, tokens: np.ndarray, num_bytes: int):
        """Adds a document: its tokens, end_of_text first, and the UTF-8 bytes of its text."""
        self.begin(np.array([len(tokens)]), named(name, offset), num_bytes)
        self.extend(tokens)

    def begin(self, lengths: np.ndarray, names: str, num_bytes: int, prompts: np.ndarray | None = None):
        """Announces documents, whose tokens follow by `extend`.

        Args:
          lengths: tokens of each. names: `named` of each, together. num_bytes: of their texts in UTF-8, together.
          prompts: tokens of each one's prompt, where they have them.
        """
        ends = self.tokens + np.cumsum(lengths)
        self._document_starts.append(ends - lengths)
        if self._prompts:
            self._prompts.append(prompts)
        self._names.write(names)
        self.tokens, self.documents, self.bytes = int(ends[-1]), self.documents + len(lengths), self.bytes + num_bytes

    def extend(self, tokens: np.ndarray):
        """Adds the next tokens of the documents that `begin` announced."""
        self._tokens.append(tokens)

    def close(self) -> dict:
        """Writes what is left; returns the split's part of the manifest."""
        self._names.close()
        self._tokens.close()
        self._document_starts.close()
        if self._prompts:
            self._prompts.close()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}


def named(name: str, offset: int) -> str:
    """A document's line of documents.jsonl."""
    return json.dumps({"name": name, "offset": offset}) + "\n"


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
        except ValueError as error:  # which is what TensorStore raises for a full disk too
            raise OSError(f"… {' '.join(str(error).split())[-200:]}") from error
        self._waiting = 0


def _spec(folder: epath.Path, dtype: type[np.integer], length: int) -> dict:
    """All that TensorStore has to know of an array; one in which anything else is written does not open."""
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
        "store_data_equal_to_fill_value": True,  # so that every token has its bytes on disk: see `_open_split`
    }


def _open_split(folder: epath.Path, name: str, manifest: dict) -> Split:
    """A split that is as its manifest says. Raises: Refused."""
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
    # The manifest's file lengths were just compared, so nothing cached can be stale.
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
    """Everything that is read of a manifest is there, of its type, and a number that can be. Raises: Refused."""
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
    """Refuses a store of which a file is gone, of another length, or elsewhere; a missing shard would be zeros."""

    def length(name: str) -> int:
        file = untrusted.inside(folder, name, REMEDY)
        return file.stat().length if untrusted.is_file(file) else -1

    with ThreadPoolExecutor(16) as threads:
        found = dict(zip(files, threads.map(length, files)))
    for name, expected in files.items():
        if found[name] != expected:
            state = "is missing" if found[name] < 0 else f"has {found[name]} bytes"
            raise Refused(
                f"{folder / name} {state} where {shown(expected)} bytes were written: copy the whole store again, or "
                f"delete {folder} and prepare the data again."
            )
