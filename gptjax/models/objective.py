"""Sums over the tokens of a batch, from which losses and metrics are made."""

from gptjax.data.batch import Batch
from gptjax.models.interface import Inputs, LanguageModel
from gptjax.models.loss import LossConfig, Sums, next_token_sums


def batch_sums(model: LanguageModel, batch: Batch, dropout_key, *, vocab_size: int, loss: LossConfig) -> Sums:
    """A model's loss on a batch of [rows, seq_len], as sums over tokens. A dropout_key of None turns dropout off."""
    hidden = model.hidden(Inputs(batch.inputs, batch.positions, batch.segments), dropout_key)
    sums = next_token_sums(
        hidden.x_BTD, model.output(), batch.targets, batch.weights, vocab_size=vocab_size, config=loss
    )
    if hidden.objective is None:
        return sums
    # The auxiliary losses are sums over positions. By position they weigh the same whatever share of them has a target.
    share = batch.weights.sum() / batch.weights.size
    return sums._replace(objective=sums.objective + share * hidden.objective, auxiliary=hidden.sums)
