"""Held-out loss, bits per byte and accuracy."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from gptjax import hosts, sharding
from gptjax.data import stream
from gptjax.loss import LossConfig, Sums, next_token_sums
from gptjax.models.transformer import Transformer


class Evaluation(NamedTuple):
    """Over all tokens that were evaluated."""

    loss: float  # nats a token
    bits_per_byte: float  # of UTF-8; the tokens that end documents cost bits and count no bytes
    accuracy: float  # share of tokens that were the most likely one
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def batch_sums(model: Transformer, batch: stream.Batch, dropout_key, *, vocab_size: int, loss: LossConfig) -> Sums:
    """A model's loss on a batch of [rows, seq_len], as sums over its tokens; without dropout for a key of None."""
    x_BTD = model(batch.inputs, batch.positions, batch.segments, dropout_key)
    return next_token_sums(
        x_BTD,
        model.unembedding,
        batch.targets,
        batch.weights,
        vocab_size=vocab_size,
        softcap=model.config.logits_softcap,
        config=loss,
    )


@functools.partial(jax.jit, static_argnames=("vocab_size", "loss"))
def eval_step(model: Transformer, batch: stream.Batch, token_bytes: jax.Array, *, vocab_size: int, loss: LossConfig):
    """Sums over a batch of [1, rows, seq_len]: nll, correct, tokens, bytes."""
    batch = jax.tree.map(lambda array: array[0], batch)
    sums = batch_sums(model, batch, None, vocab_size=vocab_size, loss=loss)
    size_BT = token_bytes.at[batch.targets].get(out_sharding=sharding.spec("act_batch", "act_seq"))
    return sums.nll, sums.correct, batch.weights.sum(), (batch.weights * size_BT).sum()


def evaluate(
    model: Transformer,
    *,
    store,
    mesh: jax.sharding.Mesh,
    seq_len: int,
    batch_size: int,
    max_windows: int,
    loss: LossConfig,
) -> Evaluation:
    """Of a model on a store's held-out windows, in order.

    Args:
      batch_size: rows at a time, rounded up to what divides over the mesh. max_windows: how many; 0 is all.
    """
    shards = sharding.row_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    rows = sharding.local_rows(mesh, batch_size, 1)
    batches = stream.heldout_batches(store, seq_len=seq_len, batch_size=batch_size, rows=rows)
    token_bytes = hosts.put(store.tokenizer.token_bytes, jax.NamedSharding(mesh, jax.P()))
    vocab_size = store.tokenizer.vocab_size
    windows = max_windows or len(batches) * batch_size
    sums = []
    for index in range(min(len(batches), -(-windows // batch_size))):
        batch = batches[index]
        # The same windows are read however many fit into a batch.
        counted = (index * batch_size + rows < windows).astype(np.float32)
        batch = batch._replace(weights=batch.weights * counted[:, None])
        batch = sharding.place(batch, rows, mesh, batch_size, 1)
        sums.append(eval_step(model, batch, token_bytes, vocab_size=vocab_size, loss=loss))
    nll, correct, tokens, size = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
    return Evaluation(float(nll / tokens), float(nll / math.log(2) / size), float(correct / tokens), int(tokens))
