"""The work of `prepare`, task by task: count, sample, tokenize. Nothing here imports JAX, directly or through others.

A task is a few parts of a source (`sources.py`), in their order. A step writes FOLDER/TASK.json when the rest of a
task's result is complete; a task with that file is done.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from etils import epath

from gptjax.data.preparation.executor import Report
from gptjax.data.sources import sources
from gptjax.data.sources.documents import Damages, DataConfig, Document, Part
from gptjax.data.sources.formats import lines
from gptjax.data.store.store import SIZES, SPLITS, named, token_dtype
from gptjax.runtime.files import write_whole
from gptjax.tokenizers.tokenizer import Tokenizer, load, prompted

# Text that is tokenized, and held in memory, at a time: enough to occupy the cores.
BATCH_BYTES = 4 << 20
# The files of a task's documents in a split.
KINDS = "tokens", "lengths", "prompts", "names"
LOWEST = 1024  # hashes of a task that are kept with sizes, to hold out the asked share of a small corpus
# At most this much of the held-out text is compressed by gzip and xz.
COMPRESSED_BYTES = 16 << 20


@dataclass(frozen=True)
class Corpus:
    """The tasks of a corpus, and how to read their documents."""

    data: DataConfig
    tasks: epath.Path  # TASK.json lists the parts of a task

    def documents(self, task: int, damages: Damages) -> Iterator[Document]:
        for part in result(self.tasks, task):
            yield from sources.read(Part(*part), self.data, damages)


@dataclass(frozen=True)
class Extract:
    """Writes the documents of each task as TASK.documents, for sources that are slow to read again.

    Result: documents, bytes, and the keys of `lost`.
    """

    corpus: Corpus
    folder: epath.Path

    def __call__(self, task: int, report: Report):
        if done(self.folder, task):
            return
        damages, count, num_bytes = Damages(self.corpus.data.damaged), 0, 0
        with path(self.folder, task, "documents").open("wb") as texts:
            for document in self.corpus.documents(task, damages):
                size = len(document.text.encode())
                texts.write(lines.line_of(document))
                count, num_bytes = count + 1, num_bytes + size
                report(1, size, 0)
        finish(self.folder, task, {"documents": count, "bytes": num_bytes} | lost(damages))


@dataclass(frozen=True)
class Survey:
    """Counts the documents of each task, and finds the smallest and the largest hash.

    Result: documents, bytes, digest (of the text), smallest, largest (hashes), lowest (pairs of a hash and
    the bytes of its documents, for the lowest hashes), and the keys of `lost`.
    """

    corpus: Corpus
    folder: epath.Path

    def __call__(self, task: int, report: Report):
        if done(self.folder, task):
            return
        damages, digest = Damages(self.corpus.data.damaged), hashlib.sha256()
        count, num_bytes, smallest, largest = 0, 0, 1 << 64, -1
        lowest: dict[int, int] = {}  # bytes of the documents with the lowest hashes
        for texts in batches(document.text.encode() for document in self.corpus.documents(task, damages)):
            hashes = [hash_of(text) for text in texts]
            digest.update(_packed(hashes))
            size = sum(map(len, texts))
            count, num_bytes = count + len(texts), num_bytes + size
            smallest, largest = min(smallest, *hashes), max(largest, *hashes)
            for hash, text in zip(hashes, texts, strict=True):
                lowest[hash] = lowest.get(hash, 0) + len(text)
            if len(lowest) > 2 * LOWEST:
                lowest = dict(sorted(lowest.items())[:LOWEST])
            report(len(texts), size, 0)
        result = {"documents": count, "bytes": num_bytes, "digest": digest.hexdigest(), "smallest": smallest}
        rows = sorted(lowest.items())[:LOWEST]
        finish(self.folder, task, result | {"largest": largest, "lowest": rows} | lost(damages))


@dataclass(frozen=True)
class Sample:
    """Writes the text that a tokenizer is trained on: training documents, each `every`-th of the corpus.

    firsts: for each task, the number in the corpus of its first document.
    cut: documents with a smaller hash are held out.
    """

    corpus: Corpus
    folder: epath.Path
    every: int
    cut: int
    firsts: tuple[int, ...]

    def __call__(self, task: int, report: Report):
        if done(self.folder, task):
            return
        with path(self.folder, task, "texts").open("w") as file:
            documents = self.corpus.documents(task, Damages("skip"))
            for number, document in enumerate(documents, self.firsts[task]):
                if number % self.every == 0 and hash_of(document.text.encode()) >= self.cut:
                    file.write(json.dumps(document.text) + "\n")
                report(1, 0, 0)
        finish(self.folder, task, {})

    def texts(self) -> Iterator[str]:
        """All texts that were written, in order."""
        for task in range(len(self.firsts)):
            with path(self.folder, task, "texts").open() as file:
                yield from map(json.loads, file)


@dataclass(frozen=True)
class Tokenize:
    """Writes the tokens of each task in the store's dtype, and the other inputs of a `SplitWriter`.

    Files of a task, for each split:
      TASK.SPLIT.tokens
      TASK.SPLIT.lengths: int64, tokens of each document
      TASK.SPLIT.prompts: int64, how many of these belong to the prompt
      TASK.SPLIT.names: the lines of documents.jsonl
    TASK.heldout has at most COMPRESSED_BYTES of held-out text without prompts; TASK.hashes has all documents' hashes.
    Result: documents, bytes and digest as in `Survey`, and `splits`: tokens, documents and bytes of each split.
    """

    corpus: Corpus
    folder: epath.Path
    tokenizer: epath.Path
    cut: int
    threads: bool  # whether this process may use all cores

    def __call__(self, task: int, report: Report):
        if done(self.folder, task):
            return
        tokenizer = _tokenizer(self.tokenizer)
        splits = {name: _Piece(self.folder, task, name, tokenizer) for name in SPLITS}
        digest, kept = hashlib.sha256(), 0
        with (
            path(self.folder, task, "hashes").open("wb") as all_hashes,
            path(self.folder, task, "heldout").open("wb") as heldout,
        ):
            for batch in batches(self.corpus.documents(task, Damages("skip"))):
                texts = [document.text.encode() for document in batch]
                hashes = [hash_of(text) for text in texts]
                digest.update(_packed(hashes))
                all_hashes.write(_packed(hashes))
                tokens = _encoded(tokenizer, batch, self.threads)
                for document, text, hash, ids in zip(batch, texts, hashes, tokens, strict=True):
                    if hash < self.cut:
                        response = text[len(document.text[: document.prompt].encode()) :]
                        kept += heldout.write(response[: COMPRESSED_BYTES - kept])
                    splits["heldout" if hash < self.cut else "train"].append(document, len(text), *ids)
                for piece in splits.values():
                    piece.write()
                report(len(batch), sum(map(len, texts)), sum(1 + len(prompt) + len(text) for prompt, text in tokens))
        sizes = {name: piece.close() for name, piece in splits.items()}
        total = {key: sum(size[key] for size in sizes.values()) for key in ("documents", "bytes")}
        finish(self.folder, task, total | {"digest": digest.hexdigest(), "splits": sizes})


class _Piece:
    """The files of a task's documents in one split."""

    def __init__(self, folder: epath.Path, task: int, split: str, tokenizer: Tokenizer):
        self._dtype, self._end_of_text = token_dtype(tokenizer.vocab_size), tokenizer.end_of_text
        self._files = [path(folder, task, f"{split}.{kind}").open("wb") for kind in KINDS]
        self._tokens, self._lengths, self._prompts, self._names = [], [], [], []
        self.size = dict.fromkeys(SIZES, 0)

    def append(self, document: Document, num_bytes: int, prompt: np.ndarray, text: np.ndarray):
        """Adds a document: the bytes of its text, the tokens of its prompt, and its other tokens."""
        length = 1 + len(prompt) + len(text)
        self._tokens += [[self._end_of_text], prompt, text]
        self._lengths.append(length)
        self._prompts.append(len(prompt))
        self._names.append(named(document.name, document.offset))
        for key, more in (("tokens", length), ("documents", 1), ("bytes", num_bytes)):
            self.size[key] += more

    def write(self):
        """Writes the documents that were added, and frees their memory."""
        if self._lengths:
            tokens, lengths, prompts, names = self._files
            tokens.write(np.concatenate(self._tokens).astype(self._dtype).tobytes())
            lengths.write(np.array(self._lengths, np.int64).tobytes())
            prompts.write(np.array(self._prompts, np.int64).tobytes())
            names.write("".join(self._names).encode())
        self._tokens, self._lengths, self._prompts, self._names = [], [], [], []

    def close(self) -> dict[str, int]:
        for file in self._files:
            file.close()
        return self.size


def lost(damages: Damages) -> dict:
    """Counts of what could not be read of a task's source."""
    return {"damaged": damages.count, "places": damages.places, "left_out": damages.left_out}


def path(folder: epath.Path, task: int, kind: str) -> epath.Path:
    """The path of one file of a task."""
    return folder / f"{task:05}.{kind}"


def done(folder: epath.Path, task: int) -> bool:
    """Whether a task has its result."""
    return path(folder, task, "json").exists()


def finish(folder: epath.Path, task: int, result: dict | list) -> None:
    """Writes the result of a task; call this after everything else of the task is written."""
    write_whole(path(folder, task, "json"), json.dumps(result).encode(), suffix=str(os.getpid()))


def result(folder: epath.Path, task: int):
    """The result of a task; in the folder `tasks`, the parts of the task."""
    return json.loads(path(folder, task, "json").read_text())


def hash_of(text: bytes) -> int:
    """A 64-bit hash that decides whether a document is held out, so that equal documents are on the same side."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def _packed(hashes: list[int]) -> bytes:
    return np.array(hashes, ">u8").tobytes()


def batches(documents: Iterable) -> Iterator[list]:
    """Groups documents or texts into lists; a list ends with the item that takes its size to BATCH_BYTES."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text if isinstance(document, Document) else document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.cache
def _tokenizer(folder: epath.Path) -> Tokenizer:
    """Loads the tokenizer once in each process."""
    return load(folder)


def _encoded(tokenizer: Tokenizer, documents: list[Document], threads: bool) -> list[list[np.ndarray]]:
    """The tokens of each document's prompt and of the rest of its text.

    Prompt and rest are encoded separately, the prompt as `generate` encodes prompts, so that no token spans both.

    Args:
      threads: whether to use all cores; False where other workers use them.
    """
    texts = []
    for document in documents:
        texts += [prompted(tokenizer, document.text[: document.prompt]), document.text[document.prompt :]]
    ids = tokenizer.encode_batch(texts, -1 if threads else 1)
    return [ids[at : at + 2] for at in range(0, len(ids), 2)]
