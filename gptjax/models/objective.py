"""Sums over the tokens of a batch that losses and metrics are made of."""

from gptjax.data.batch import Batch
from gptjax.models.loss import LossConfig, Sums, next_token_sums
from gptjax.models.transformer import Transformer


def batch_sums(model: Transformer, batch: Batch, dropout_key, *, vocab_size: int, loss: LossConfig) -> Sums:
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
