"""Tokens a second of the training stream without a model, beside a bare NumPy memory map and the quickstart's model.

    python -m benchmarks.input_pipeline

The memory map draws random windows and stacks inputs and targets, as nanoGPT does (int64); the stream also shuffles
without repeats, and makes positions, segments and weights. Both make each batch when it is asked for; `read ahead` is
the stream as training has it, made by threads, whose hand-over costs where nothing else is to be done meanwhile. All
make the same number of tokens in turns, so that other load falls on all; medians. The files are in the page cache, and
the stream has compared them with their checksums.
"""

import functools
import math
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from gptjax.data.store import store as stores
from gptjax.data.stream import curriculum, mixture, stream
from gptjax.planning import benchmark
from gptjax.tokenizers import tokenizer as tokenizers
from gptjax.tokenizers.tokenizer import TokenizerConfig
from gptjax.training.config import files

QUICKSTART = str(pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py")
TOKENS = 50_000_000
TOKENS_A_TURN = 4_000_000
TURNS = 7
SHAPES = (32, 256), (64, 1024), (16, 4096)


def write_corpus(folder: str) -> stores.Store:
    """A store of random documents of about a thousand tokens, and the same tokens in a file beside it."""
    folder = stores.epath.Path(folder)
    rng = np.random.default_rng(0)
    tokenizer = tokenizers.train(TokenizerConfig(kind="byte"), [], folder / "store" / "tokenizer")
    splits = {}
    with open(folder / "tokens.bin", "wb") as raw:
        for name in stores.SPLITS:
            writer = stores.SplitWriter(folder / "store" / name, np.uint16)
            while writer.tokens < (TOKENS if name == "train" else 1000):
                tokens = rng.integers(0, 256, rng.integers(1, 2000)).astype(np.uint16)
                tokens[0] = tokenizer.end_of_text
                writer.append(str(writer.documents), 0, tokens, len(tokens) - 1)
                if name == "train":
                    raw.write(tokens.tobytes())
            splits[name] = writer.close()
    manifest = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "text_hash": "", "settings": {}}
    manifest |= {"splits": splits} | dict.fromkeys(("compressed_heldout_bytes", "gzip_bytes", "xz_bytes"), 1)
    stores.write_manifest(folder / "store", manifest)
    return stores.Store.open(folder / "store")


def memory_map(tokens: np.ndarray, batch_size: int, seq_len: int, steps: range):
    rng = np.random.default_rng(steps.start)
    for _ in steps:
        starts = rng.integers(0, len(tokens) - seq_len, batch_size)
        inputs = np.stack([tokens[start : start + seq_len] for start in starts]).astype(np.int64)
        targets = np.stack([tokens[start + 1 : start + 1 + seq_len] for start in starts]).astype(np.int64)
        yield inputs, targets


def speed(batches, steps: range, batch_size: int, seq_len: int) -> float:
    began = time.perf_counter()
    for _ in batches:
        pass
    return len(steps) * batch_size * seq_len / (time.perf_counter() - began)


def main():
    slowest = math.inf
    with tempfile.TemporaryDirectory() as folder:
        store = write_corpus(folder)
        tokens = np.memmap(os.path.join(folder, "tokens.bin"), np.uint16, "r")
        print("batch × length: million tokens a second: memory map; stream, / memory map; read ahead, / memory map")
        for batch_size, seq_len in SHAPES:
            phase = curriculum.Phase(0, seq_len, batch_size, {"": mixture.PERIOD})
            data = stream.Stream(mixture.Corpus({"": store}), [phase], seq_len, seed=0)
            read = functools.partial(data.batch, rows=np.arange(batch_size))
            size = max(TOKENS_A_TURN // (batch_size * seq_len), 1)
            speeds = {"memory map": [], "stream": [], "read ahead": []}
            for turn in range(TURNS):
                steps = range(turn * size, (turn + 1) * size)
                shape = steps, batch_size, seq_len
                speeds["memory map"].append(speed(memory_map(tokens, batch_size, seq_len, steps), *shape))
                speeds["stream"].append(speed(map(read, steps), *shape))
                speeds["read ahead"].append(speed(stream.iterate(read, steps.start, steps.stop), *shape))
            bare, ours, ahead = (statistics.median(values) / 1e6 for values in speeds.values())
            print(
                f"{batch_size} × {seq_len}: {bare:.1f}; {ours:.1f}, {ours / bare:.3f}; {ahead:.1f}, {ahead / bare:.3f}",
                flush=True,
            )
            slowest = min(slowest, ahead)
    consumed = benchmark.bench(files.load(QUICKSTART, {}), steps=20)["tokens_per_second"]
    print(
        f"the quickstart's model: {consumed:,.0f} tokens a second; "
        f"the slowest stream / model {1e6 * slowest / consumed:,.0f}"
    )


if __name__ == "__main__":
    main()
