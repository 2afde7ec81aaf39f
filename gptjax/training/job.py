"""The parts of a run, as its steps and their duties share them."""

import dataclasses
from collections.abc import Callable

import jax
from etils import epath
from jax.stages import Compiled

from gptjax.checkpoints.manager import Checkpoints
from gptjax.checkpoints.record import RunRecord
from gptjax.data.stream.curriculum import Phase
from gptjax.data.stream.mixture import Corpus
from gptjax.data.stream.stream import Stream
from gptjax.training.config.schema import Config
from gptjax.training.monitoring import skipped_batches
from gptjax.training.monitoring.rollback import Watch


@dataclasses.dataclass(frozen=True)
class Job:
    """The parts of a run that survive a rollback."""

    config: Config
    folder: epath.Path
    mesh: jax.sharding.Mesh
    corpus: Corpus
    record: RunRecord  # for the checkpoints, without progress
    checkpoints: Checkpoints
    tasks: dict  # lm-eval tasks scored during training
    profile: range  # steps to trace
    tracker: Callable | None  # starts the tracker; None on all processes but the first

    @property
    def vocab_size(self) -> int:
        return self.corpus.tokenizer.vocab_size


@dataclasses.dataclass(frozen=True)
class Leg:
    """The parts of a run that a rollback replaces."""

    start: int  # completed updates when the leg begins
    data: Stream
    watch: Watch
    rows: list[dict] | None  # metrics.jsonl as read by the preflight; None: read by the log
    compiled: dict[tuple[int, int], Compiled]  # the train step for each (batch_size, seq_len)

    def phase(self, step: int) -> Phase:
        """The phase whose batch the next update after `step` reads."""
        return self.data.phase(skipped_batches.batch_index(self.watch.ledger, step))
