"""From a source to a token store: hold out documents, train the tokenizer, tokenize, write."""

import hashlib
import lzma
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from etils import epath

from gptjax import terminal
from gptjax import tokenizer as tokenizers
from gptjax.data import store as stores
from gptjax.data.sources import Document, documents
from gptjax.errors import Refused
from gptjax.tokenizer import TokenizerConfig

# SentencePiece keeps its training text in memory, and more of it than this changes few pieces.
TRAINING_BYTES = 64 << 20
# How much text is tokenized at a time: enough to occupy the cores, and what is held in memory.
BATCH_BYTES = 4 << 20
# gzip and xz are told on no more held-out text than this.
COMPRESSED_BYTES = 16 << 20


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    source: `stdlib` (the source code of Python's standard library) or `text` (files of UTF-8).
    path: for `text`, a file or a glob, local or gs://.
    store: folder of the token store; empty means `store` inside the workdir.
    heldout_fraction: about which part of the documents is kept for evaluation, more than 0 and less than 1.
    """

    source: str = "stdlib"
    path: str = ""
    store: str = ""
    heldout_fraction: float = 0.02


def prepare(data: DataConfig, tokenizer: TokenizerConfig, folder: epath.PathLike) -> stores.Store:
    """The token store in `folder`: opened if it was made from the same settings, else made.

    It is made in a folder beside and renamed when it is whole. Only one process of a run may call this before the
    store is there. Refuses a store made from other settings, and a corpus that can't be split in two.
    """
    folder = epath.Path(folder)
    settings = _settings(data, tokenizer)
    if stores.is_whole(folder):
        return _reuse(folder, settings)
    if folder.is_file() or folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} exists and has no manifest.json, so it is no token store: give another in data.store.")
    tokenizers.check(tokenizer)
    if not 0 < data.heldout_fraction < 1:
        raise Refused(
            f"data.heldout_fraction is {data.heldout_fraction}, which is not between 0 and 1: use for example 0.02."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f"{folder.name}.partial-{os.getpid()}"
    try:
        if partial.exists():  # a killed process had our number
            partial.rmtree()
        _build(data, tokenizer, partial, settings)
        if stores.is_whole(folder):  # another run made it meanwhile
            partial.rmtree()
            return _reuse(folder, settings)
        if folder.exists():
            folder.rmdir()  # empty, as seen above; a rename has to make it
        partial.rename(folder)
    except BaseException:
        if partial.exists():
            partial.rmtree()
        raise
    return stores.Store.open(folder)


def _settings(data: DataConfig, tokenizer: TokenizerConfig) -> dict:
    """Whatever the tokens depend on, as config keys."""
    settings = {"data": asdict(data), "tokenizer": asdict(tokenizer)}
    del settings["data"]["store"]
    if tokenizer.kind == "byte" or tokenizer.path:
        del settings["tokenizer"]["vocab_size"]
    return {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}


def _reuse(folder: epath.Path, settings: dict) -> stores.Store:
    store = stores.Store.open(folder)
    made = store.manifest["settings"]
    differing = [
        f"{key} ({made.get(key, 'not set')} there, {settings.get(key, 'not set')} now)"
        for key in sorted(made.keys() | settings.keys())
        if made.get(key) != settings.get(key)
    ]
    if differing:
        raise Refused(
            f"{folder} holds a token store made from other settings, {', '.join(differing)}: give another folder in "
            "data.store, or the old settings."
        )
    print(f"using the token store in {folder}: {store.split('train').tokens:,} tokens to train on", flush=True)
    return store


class _Survey(NamedTuple):
    """What a first reading finds. cut: documents with a smaller hash are held out."""

    documents: int
    bytes: int
    cut: int


def _build(data: DataConfig, config: TokenizerConfig, folder: epath.Path, settings: dict):
    survey = _survey(data)
    tokenizer = tokenizers.train(config, _training_texts(data, survey), folder / "tokenizer")
    dtype = stores.token_dtype(tokenizer.vocab_size)
    writers = {split: stores.SplitWriter(folder / split, dtype) for split in stores.SPLITS}
    compressed, text_hash = _Compressed(), hashlib.sha256()
    began, done, num_bytes, num_tokens = time.monotonic(), 0, 0, 0
    with terminal.progress("tokenizing documents", survey.documents) as bar:
        for batch in _batches(documents(data.source, data.path)):
            for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch])):
                text = document.text.encode()
                text_hash.update(text)
                split = "heldout" if _hash(text) < survey.cut else "train"
                if split == "heldout":
                    compressed.add(text)
                tokens = np.concatenate([[tokenizer.end_of_text], ids])
                writers[split].append(document.name, document.offset, tokens, len(text))
                done, num_bytes, num_tokens = done + 1, num_bytes + len(text), num_tokens + len(tokens)
            speed = num_bytes / 1e6 / (time.monotonic() - began)
            bar.update(done, f"{speed:.1f} MB/s · {num_tokens / 1e6:.1f}M tokens")
    splits = {split: writer.close() for split, writer in writers.items()}
    if (done, num_bytes) != survey[:2]:
        raise Refused(
            f"The files of data.source={data.source} changed while they were read: {survey.documents} documents of "
            f"{survey.bytes} bytes at first, then {done} of {num_bytes}: prepare again when they are still."
        )
    manifest = {"settings": settings, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    manifest["text_hash"] = text_hash.hexdigest()
    stores.write_manifest(folder, manifest | {"splits": splits} | compressed.sizes())


def _survey(data: DataConfig) -> _Survey:
    """Reads the corpus once, to count it and to draw the line between training and held-out documents.

    A document is held out by a hash of its content, so that equal ones are on the same side. The fraction draws the
    line, moved if need be to hold out the smallest hash and to train on the largest.
    """
    count, num_bytes, smallest, largest = 0, 0, 1 << 64, -1
    with terminal.progress("reading documents", None) as bar:
        for document in documents(data.source, data.path):
            text = document.text.encode()
            count, num_bytes, hash = count + 1, num_bytes + len(text), _hash(text)
            smallest, largest = min(smallest, hash), max(largest, hash)
            bar.update(count, f"{num_bytes / 1e6:.1f} MB")
    if smallest >= largest:
        raise Refused(
            f"data.source={data.source} has {count} documents and {min(count, 1)} different ones, and at least 2 are "
            "needed to hold one out: add text (a file of more than 64 KiB is several documents)."
        )
    return _Survey(count, num_bytes, min(max(int(data.heldout_fraction * (1 << 64)), smallest + 1), largest))


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def _training_texts(data: DataConfig, survey: _Survey) -> Iterator[str]:
    """What the tokenizer learns from: training documents, each k-th of the corpus if it is larger than the sample."""
    every = -(-survey.bytes // TRAINING_BYTES)
    with terminal.progress("training the tokenizer: reading documents", survey.documents) as bar:
        for index, document in enumerate(documents(data.source, data.path)):
            if index % every == 0 and _hash(document.text.encode()) >= survey.cut:
                yield document.text
            bar.update(index + 1, "" if every == 1 else f"1 in {every}")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents, each closed by the one that takes it over BATCH_BYTES."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Compressed:
    """How small gzip -9 and xz -9 make the held-out text, for comparison with a model's bits per byte."""

    def __init__(self):
        self._compressors = {
            "gzip_bytes": zlib.compressobj(level=9, wbits=31),  # 31: with gzip's header
            "xz_bytes": lzma.LZMACompressor(preset=9),
        }
        self._sizes = {"compressed_heldout_bytes": 0} | dict.fromkeys(self._compressors, 0)

    def add(self, text: bytes):
        text = text[: COMPRESSED_BYTES - self._sizes["compressed_heldout_bytes"]]
        self._sizes["compressed_heldout_bytes"] += len(text)
        for name, compressor in self._compressors.items():
            self._sizes[name] += len(compressor.compress(text))

    def sizes(self) -> dict[str, int]:
        """gzip_bytes and xz_bytes of the first compressed_heldout_bytes of the held-out text."""
        for name, compressor in self._compressors.items():
            self._sizes[name] += len(compressor.flush())
        return self._sizes
