"""Merges the pieces that tasks wrote into a token store."""

import functools
import hashlib
import lzma
import zlib

import numpy as np
from etils import epath

from gptjax.data.preparation import tasks
from gptjax.data.store.store import SPLITS, SplitWriter
from gptjax.runtime import heartbeat, progress

# Bytes of a piece in memory at a time.
READ_BYTES = 32 << 20


def merge(results: list[dict], folder: epath.Path, dtype: type[np.integer], prompts: bool) -> dict:
    """Writes FOLDER/store without its manifest from the pieces, in their order; returns that part of the manifest.

    Args:
      results: the result of each `Tokenize` task.
      folder: the folder of the preparation.
      dtype: of the tokens.
      prompts: whether documents have prompts.
    """
    made = folder / "store"
    if made.exists():
        made.rmtree()
    writers = {split: SplitWriter(made / split, dtype, prompts) for split in SPLITS}
    compressed, text_hash = _Compressed(), hashlib.sha256()
    total = sum(result["splits"][split]["tokens"] for result in results for split in SPLITS)
    with progress.progress("writing tokens", total) as bar:
        for task, result in enumerate(results):
            piece = functools.partial(tasks.path, folder / "pieces", task)
            for split, writer in writers.items():
                if result["splits"][split]["documents"]:
                    lengths, prompt_lengths = (
                        np.frombuffer(piece(f"{split}.{kind}").read_bytes(), np.int64)
                        for kind in ("lengths", "prompts")
                    )
                    names = piece(f"{split}.names").read_text()
                    writer.begin(lengths, names, result["splits"][split]["bytes"], prompt_lengths)
                    with piece(f"{split}.tokens").open("rb") as tokens:
                        while read := tokens.read(READ_BYTES):
                            writer.extend(np.frombuffer(read, dtype))
                            heartbeat.moved()
            compressed.add(piece("heldout").read_bytes())
            text_hash.update(piece("hashes").read_bytes())
            bar.update(sum(writer.tokens for writer in writers.values()))
    splits = {split: writer.close() for split, writer in writers.items()}
    return {"splits": splits, "text_hash": text_hash.hexdigest()} | compressed.sizes()


class _Compressed:
    """Sizes of the held-out text under gzip -9 and xz -9, for comparison with a model's bits per byte."""

    def __init__(self):
        self._compressors = {
            "gzip_bytes": zlib.compressobj(level=9, wbits=31),  # 31: with gzip's header
            "xz_bytes": lzma.LZMACompressor(preset=9),
        }
        self._sizes = {"compressed_heldout_bytes": 0} | dict.fromkeys(self._compressors, 0)

    def add(self, text: bytes):
        text = text[: tasks.COMPRESSED_BYTES - self._sizes["compressed_heldout_bytes"]]
        self._sizes["compressed_heldout_bytes"] += len(text)
        for name, compressor in self._compressors.items():
            self._sizes[name] += len(compressor.compress(text))

    def sizes(self) -> dict[str, int]:
        """gzip_bytes and xz_bytes of the first compressed_heldout_bytes of the held-out text."""
        for name, compressor in self._compressors.items():
            self._sizes[name] += len(compressor.flush())
        return self._sizes
