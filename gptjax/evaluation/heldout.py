"""Held-out loss, bits per byte and accuracy."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np

from gptjax.data.batch import Batch, padding
from gptjax.data.stream import stream
from gptjax.data.stream.mixture import Corpus
from gptjax.errors import Failed
from gptjax.models.interface import LanguageModel
from gptjax.models.loss import LossConfig
from gptjax.models.objective import batch_sums
from gptjax.parallel import sharding, trees
from gptjax.parallel.batches import BatchLayout, local_rows, place, row_shards
from gptjax.runtime import distributed, heartbeat, preemption


class Unreadable(Exception):
    """Held-out tokens could not be read."""


@dataclasses.dataclass(frozen=True)
class _Windows:
    """The held-out windows to evaluate, and the rows of each batch that this process reads."""

    layout: BatchLayout
    rows: np.ndarray
    seq_len: int
    most: int  # windows of each store; 0 is all


class Evaluation(NamedTuple):
    """Measurements over all evaluated tokens."""

    loss: float  # nats per token
    bits_per_byte: float  # bytes of UTF-8; the tokens that end documents cost bits and count no bytes
    accuracy: float  # share of tokens that the model ranked first
    tokens: int
    sources: Mapping[str, "Evaluation"] = MappingProxyType({})  # each store of a mixture by name

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@functools.partial(jax.jit, static_argnames=("vocab_size", "loss"))
def eval_step(model: LanguageModel, batch: Batch, token_bytes: jax.Array, *, vocab_size: int, loss: LossConfig):
    """Returns sums over a batch of shape [1, rows, seq_len]: nll, correct, tokens, bytes."""
    batch = jax.tree.map(lambda array: array[0], batch)
    sums = batch_sums(model, batch, None, vocab_size=vocab_size, loss=loss)
    size_BT = token_bytes.at[batch.targets].get(out_sharding=sharding.spec("act_batch", "act_seq"))
    return sums.nll, sums.correct, batch.weights.sum(), (batch.weights * size_BT).sum()


def evaluate(
    model: LanguageModel,
    *,
    corpus: Corpus,
    mesh: jax.sharding.Mesh,
    seq_len: int,
    batch_size: int,
    max_windows: int,
    loss: LossConfig,
) -> Evaluation:
    """Evaluates a model on the held-out windows of each store. In the total, every token has equal weight.

    Args:
      batch_size: rows at a time, rounded up to a multiple of the mesh's row shards.
      max_windows: windows of each store, the first ones; 0 is all.

    Raises:
      Preempted: the run is asked to stop meanwhile.
      Failed: the windows hold prompts only, no tokens with a loss.
      Unreadable: on all processes, if one process could not read rows.
    """
    shards = row_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    layout = BatchLayout(mesh, batch_size)
    rows = local_rows(layout)
    batches, failure = {}, ""
    try:
        for name, store in corpus.stores.items():
            batches[name] = stream.heldout_batches(store, seq_len=seq_len, batch_size=batch_size, rows=rows)
    except Exception as error:  # a damaged index; the other processes would wait for this one in the first step
        failure = f"{type(error).__name__}: {error}"
    _raise_on_all(failure)
    sums, failure = _sums(model, corpus, batches, _Windows(layout, rows, seq_len, max_windows), loss)
    _raise_on_all(failure)
    with heartbeat.phase("evaluating"), heartbeat.waiting():
        found = {name: np.sum(jax.device_get(each), axis=0, dtype=np.float64) for name, each in sums.items()}
    if min(each[2] for each in found.values()) == 0:
        raise Failed("The held-out rows that are read have 0 tokens with a loss; raise eval_batches.")
    sources = {name: _evaluation(*each) for name, each in found.items() if name}
    return _evaluation(*np.sum(list(found.values()), axis=0))._replace(sources=sources)


def _raise_on_all(failure: str) -> None:
    """Raises: Unreadable, on all processes, if any process has a failure."""
    for process, reason in enumerate(distributed.exchange(failure)):
        if reason:
            raise Unreadable(f"the held-out rows of process {process} of {jax.process_count()}: {reason}")


def _evaluation(nll: float, correct: float, tokens: float, size: float) -> Evaluation:
    return Evaluation(float(nll / tokens), float(nll / math.log(2) / size), float(correct / tokens), int(tokens))


def _sums(
    model: LanguageModel,
    corpus: Corpus,
    batches: Mapping[str, Sequence[Batch]],
    windows: _Windows,
    loss: LossConfig,
) -> tuple[dict[str, list], str]:
    """Returns the results of `eval_step` by store, and why a batch could not be read, or an empty string."""
    layout, rows, batch_size = windows.layout, windows.rows, windows.layout.batch_size
    token_bytes = trees.put(corpus.tokenizer.token_bytes, jax.NamedSharding(layout.mesh, jax.P()))
    vocab_size = corpus.tokenizer.vocab_size
    most = {name: windows.most or len(stored) * batch_size for name, stored in batches.items()}
    number = {name: min(len(stored), -(-most[name] // batch_size)) for name, stored in batches.items()}
    todo = [(name, index) for name in batches for index in range(number[name])]
    sums, failure, before = {name: [] for name in batches}, "", None
    # The first call compiles, which may take long; the later calls come at a steady pace.
    for steady, part in enumerate((todo[:1], todo[1:])):
        with heartbeat.phase("evaluating" if steady else "compiling the evaluation"):
            for name, index in part:
                try:
                    batch = batches[name][index]
                except Exception as error:  # TensorStore raises many kinds; other processes wait for these rows
                    failure, batch = f"{type(error).__name__}: {error}", padding(len(rows), windows.seq_len)
                # Weights of 0 beyond `most` keep the set of windows independent of the batch size.
                counted = (index * batch_size + rows < most[name]).astype(np.float32)
                batch = batch._replace(weights=batch.weights * counted[:, None])
                batch = place(batch, rows, layout)
                preemption.tick()
                with heartbeat.waiting():
                    found = eval_step(model, batch, token_bytes, vocab_size=vocab_size, loss=loss)
                    jax.block_until_ready(before)  # at most two steps are in flight
                sums[name].append(before := found)
    return sums, failure
