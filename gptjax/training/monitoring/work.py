"""The work that a run's steps do, in tokens and FLOPs."""

import dataclasses

from gptjax.data.stream import curriculum
from gptjax.data.stream.curriculum import Phase
from gptjax.models.interface import Architecture
from gptjax.training.monitoring import skipped_batches


@dataclasses.dataclass(frozen=True)
class Work:
    """Counts tokens and model FLOPs.

    Args:
      model: the model's config.
      vocab_size: the vocabulary size.
      phases: the phases of the run.
      ledger: the batches that rollbacks skipped.
      peak: FLOPs per second that the devices can reach; None if unknown.
    """

    model: Architecture
    vocab_size: int
    phases: list[Phase]
    ledger: list[dict]
    peak: float | None

    def done(self, step: int) -> tuple[int, int]:
        """The tokens and the model FLOPs of all steps up to `step`."""
        tokens = flops = 0
        for phase, first, stop in curriculum.parts(self.phases, 0, skipped_batches.batch_index(self.ledger, step)):
            steps = skipped_batches.steps_within(self.ledger, step, first, stop)
            number = steps * phase.batch_size * phase.seq_len
            tokens, flops = (
                tokens + number,
                flops + number * self.model.flops_per_token(self.vocab_size, phase.seq_len),
            )
        return tokens, flops
