"""Trains a tokenizer for use by path, and compares tokenizers on the held-out text."""

import contextlib
import time

import numpy as np
from etils import epath

from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.preparation import prepare, tasks
from gptjax.data.preparation.prepare import DataConfig
from gptjax.data.sources.documents import Document
from gptjax.errors import Failed, Refused
from gptjax.runtime.files import contents
from gptjax.tokenizers.tokenizer import Tokenizer, TokenizerConfig, check, existing
from gptjax.tokenizers.tokenizer import train as train_tokenizer

# Tokenizers are compared on at most this much held-out text, read in batches of tasks.BATCH_BYTES.
COMPARED_BYTES = 64 << 20


def train(data: DataConfig, clean: CleanConfig, tokenizer: TokenizerConfig, target: epath.Path, workers: int) -> None:
    """Trains the tokenizer of a config on its training documents, and writes it to a folder for `tokenizer.path`.

    workers: number of processes that read the corpus.

    Raises: Refused, Failed.
    """
    check(tokenizer)
    if not tokenizer.trained:
        raise Refused(
            f'tokenizer.kind={tokenizer.kind} with tokenizer.path="{tokenizer.path}" leaves nothing to '
            "train: set tokenizer.kind=sentencepiece and no path."
        )
    if target.exists() and (not target.is_dir() or contents(target)):
        raise Refused(f"--target={target} must be a new or empty folder: give another.")
    try:
        made = train_tokenizer(tokenizer, prepare.training_texts(data, clean, workers), target)
    except OSError as error:  # a partly written folder would not be empty for the next call
        with contextlib.suppress(OSError):
            target.rmtree()
        raise Failed(
            f"--target={target} can't be written ({error.strerror or error}): make room, or give another folder."
        ) from error
    print(f"{target}: {made.vocab_size} ids, hash {made.hash[:12]}; use it by --config.tokenizer.path={target}")


def compare(data: DataConfig, clean: CleanConfig, tokenizer: TokenizerConfig, paths: list[str], workers: int) -> dict:
    """Compares tokenizers on the held-out text of a config's data.

    The tokenizers take turns on each part of the text, so that other load on the machine affects all alike.

    Args:
      paths: tokenizers as `tokenizer.existing` takes them; if empty, the config's own, which must not need training.
      workers: number of processes that read the corpus.
    """
    if not paths and tokenizer.trained:
        raise Refused(
            'tokenizer.path is "" and --tokenizers is not given, so there is nothing to compare: give folders that '
            "gptjax tokenizer train wrote, or the tokenizer folder of a run."
        )
    check(tokenizer)
    paths = paths or [tokenizer.path or "byte"]
    rows = [_Row(path, existing(path)) for path in paths]
    documents, num_bytes = 0, 0
    for batch in tasks.batches(prepare.heldout_documents(data, clean, workers)):
        documents, num_bytes = documents + len(batch), num_bytes + sum(len(d.text.encode()) for d in batch)
        for row in rows:
            row.add(batch)
        if num_bytes >= COMPARED_BYTES:
            break
    results = [row.result(documents, num_bytes) for row in rows]
    return {"documents": documents, "bytes": num_bytes, "tokenizers": results}


class _Row:
    """The results of one tokenizer so far."""

    def __init__(self, path: str, tokenizer: Tokenizer):
        self._path, self._tokenizer = path, tokenizer
        self._seen = np.zeros(tokenizer.vocab_size, bool)
        self._tokens, self._seconds, self._changed = 0, 0.0, []

    def add(self, batch: list[Document]):
        started = time.perf_counter()
        try:
            encoded = self._tokenizer.encode_batch([document.text for document in batch])
        except Refused:  # one of the texts was refused: encode each alone
            encoded = [self._encoded(document) for document in batch]
        self._seconds += time.perf_counter() - started
        for document, ids in zip(batch, encoded, strict=True):
            self._seen[ids] = True
            self._tokens += len(ids)
            if self._tokenizer.decode(ids) != document.text:
                self._changed.append(document.name)

    def _encoded(self, document: Document) -> np.ndarray:
        try:
            return self._tokenizer.encode(document.text)
        except Refused:
            return np.zeros(0, np.int32)

    def result(self, documents: int, num_bytes: int) -> dict:
        return {
            "tokenizer": self._path,
            "vocab_size": self._tokenizer.vocab_size,
            "vocab_used": float(self._seen.mean()),
            "bytes_per_token": num_bytes / max(1, self._tokens),
            "megabytes_per_second": num_bytes / 1e6 / self._seconds,
            "exact_documents": documents - len(self._changed),
            "changed": self._changed[:5],
        }


def table(found: dict) -> str:
    """Formats the result of `compare` as text."""
    width = max(len(row["tokenizer"]) for row in found["tokenizers"])
    lines = [
        f"{found['documents']:,} held-out documents, {found['bytes'] / 1e6:,.2f} MB",
        f"{'tokenizer':<{width}}  {'ids':>7}  {'used':>6}  {'bytes/token':>11}  {'MB/s':>7}  exact",
    ]
    for row in found["tokenizers"]:
        exact = f"{row['exact_documents']:,} of {found['documents']:,}"
        lines.append(
            f"{row['tokenizer']:<{width}}  {row['vocab_size']:>7}  {row['vocab_used']:>6.1%}  "
            f"{row['bytes_per_token']:>11.3f}  {row['megabytes_per_second']:>7.1f}  {exact}"
            f"{', not ' + ', '.join(row['changed']) if row['changed'] else ''}"
        )
    return "\n".join(lines)
