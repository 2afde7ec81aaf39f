"""Held-out loss, bits per byte and accuracy."""

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
    """Held-out tokens that could not be read."""


class Evaluation(NamedTuple):
    """Over all tokens that were evaluated."""

    loss: float  # nats a token
    bits_per_byte: float  # of UTF-8; the tokens that end documents cost bits and count no bytes
    accuracy: float  # share of tokens that were the most likely one
    tokens: int
    sources: Mapping[str, "Evaluation"] = MappingProxyType({})  # the same of each store of a mixture by name

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@functools.partial(jax.jit, static_argnames=("vocab_size", "loss"))
def eval_step(model: LanguageModel, batch: Batch, token_bytes: jax.Array, *, vocab_size: int, loss: LossConfig):
    """Sums over a batch of [1, rows, seq_len]: nll, correct, tokens, bytes."""
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
    """Of a model on the held-out windows of each store, in order; over all of them each token counts the same.

    Args:
      batch_size: rows at a time, rounded up to what divides over the mesh. max_windows: how many of each; 0 is all.

    Raises:
      Preempted: where the run is asked to stop meanwhile.
      Failed: where they have no tokens with a loss, but only prompts.
      Unreadable: on all processes, where one of them could not read its rows.
    """
    shards = row_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    rows = local_rows(BatchLayout(mesh, batch_size))
    batches, failure = {}, ""
    try:
        for name, store in corpus.stores.items():
            batches[name] = stream.heldout_batches(store, seq_len=seq_len, batch_size=batch_size, rows=rows)
    except Exception as error:  # an index that is damaged; the others would wait for this process in the first step
        failure = f"{type(error).__name__}: {error}"
    _raise_on_all(failure)
    sums, failure = _sums(model, corpus, batches, rows, mesh, seq_len, batch_size, max_windows, loss)
    _raise_on_all(failure)
    with heartbeat.phase("evaluating"), heartbeat.waiting():
        found = {name: np.sum(jax.device_get(each), axis=0, dtype=np.float64) for name, each in sums.items()}
    if min(each[2] for each in found.values()) == 0:
        raise Failed("The held-out rows that are read have 0 tokens with a loss: read more, by eval_batches.")
    sources = {name: _evaluation(*each) for name, each in found.items() if name}
    return _evaluation(*np.sum(list(found.values()), axis=0))._replace(sources=sources)


def _raise_on_all(failure: str) -> None:
    """Raises: Unreadable, on all processes, where this or another one has a failure."""
    for process, failure in enumerate(distributed.exchange(failure)):
        if failure:
            raise Unreadable(f"the held-out rows of process {process} of {jax.process_count()}: {failure}")


def _evaluation(nll: float, correct: float, tokens: float, size: float) -> Evaluation:
    return Evaluation(float(nll / tokens), float(nll / math.log(2) / size), float(correct / tokens), int(tokens))


def _sums(
    model: LanguageModel,
    corpus: Corpus,
    batches: Mapping[str, Sequence[Batch]],
    rows: np.ndarray,
    mesh: jax.sharding.Mesh,
    seq_len: int,
    batch_size: int,
    max_windows: int,
    loss: LossConfig,
) -> tuple[dict[str, list], str]:
    """`eval_step` of each batch by store, and why one could not be read, or an empty string."""
    token_bytes = trees.put(corpus.tokenizer.token_bytes, jax.NamedSharding(mesh, jax.P()))
    vocab_size = corpus.tokenizer.vocab_size
    windows = {name: max_windows or len(its) * batch_size for name, its in batches.items()}
    number = {name: min(len(its), -(-windows[name] // batch_size)) for name, its in batches.items()}
    todo = [(name, index) for name in batches for index in range(number[name])]
    sums, failure, before = {name: [] for name in batches}, "", None
    # The first call compiles, which may take long; from then on they come at a steady pace.
    for steady, part in enumerate((todo[:1], todo[1:])):
        with heartbeat.phase("evaluating" if steady else "compiling the evaluation"):
            for name, index in part:
                try:
                    batch = batches[name][index]
                except Exception as error:  # TensorStore raises many kinds; the others wait for these rows in the sums
                    failure, batch = f"{type(error).__name__}: {error}", padding(len(rows), seq_len)
                # The same windows are read however many fit into a batch.
                counted = (index * batch_size + rows < windows[name]).astype(np.float32)
                batch = batch._replace(weights=batch.weights * counted[:, None])
                batch = place(batch, rows, BatchLayout(mesh, batch_size))
                preemption.tick()
                with heartbeat.waiting():
                    its = eval_step(model, batch, token_bytes, vocab_size=vocab_size, loss=loss)
                    jax.block_until_ready(before)  # so that two are in flight at most
                sums[name].append(before := its)
    return sums, failure
