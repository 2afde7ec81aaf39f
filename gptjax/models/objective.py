"""Sums over the tokens of a batch, from which losses and metrics are made."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from gptjax.data.batch import Batch
from gptjax.models.interface import Inputs, LanguageModel
from gptjax.models.loss import LossConfig, next_token_sums


class BatchSums(NamedTuple):
    """The `Sums` of the loss, and those of the model. Only the objective has a gradient."""

    objective: jax.Array  # that of the loss, and the auxiliary losses of the model
    nll: jax.Array
    z: jax.Array
    correct: jax.Array
    auxiliary: Mapping[str, jax.Array]  # `Hidden.sums`


def batch_sums(model: LanguageModel, batch: Batch, dropout_key, *, vocab_size: int, loss: LossConfig) -> BatchSums:
    """A model's loss on a batch of [rows, seq_len], as sums over tokens. A dropout_key of None turns dropout off."""
    hidden = model.hidden(Inputs(batch.inputs, batch.positions, batch.segments), dropout_key)
    sums = next_token_sums(
        hidden.x_BTD, model.output(), batch.targets, batch.weights, vocab_size=vocab_size, config=loss
    )
    objective = sums.objective
    if hidden.objective is not None:
        # The auxiliary losses are sums over positions. By position they weigh the same whatever share has a target.
        objective += batch.weights.sum() / batch.weights.size * hidden.objective
    return BatchSums(objective, sums.nll, sums.z, sums.correct, dict(hidden.sums))
