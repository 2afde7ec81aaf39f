"""The step from which a run continues. Training and `gptjax data show` both read it here."""

import dataclasses

from gptjax.checkpoints.manager import Checkpoints
from gptjax.checkpoints.record import REMEDY, Recovery, RunRecord
from gptjax.data.stream import curriculum
from gptjax.data.stream.curriculum import Phase
from gptjax.data.stream.mixture import Corpus
from gptjax.data.stream.stream import Stream
from gptjax.errors import Refused, shown
from gptjax.runtime import distributed
from gptjax.training.config import resume
from gptjax.training.config.schema import Config
from gptjax.training.monitoring import skipped_batches


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """The place in a run from which its next step is computed.

    Args:
      step: completed updates; 0 for a new run.
      recovery: the memory of rollbacks.
      phases: the phases that were read, then those that the config plans.
    """

    step: int
    recovery: Recovery
    phases: list[Phase]

    @property
    def batch(self) -> int:
        """The index of the next batch."""
        return skipped_batches.batch_index(self.recovery.ledger, self.step)


def read(config: Config, corpus: Corpus, checkpoints: Checkpoints | None, step: int) -> ResumePoint:
    """Reads the resume point from the checkpoint of `step`; step 0 is a new run, which needs none.

    Raises: Refused, if the checkpoint belongs to another run or other data.
    """
    recovery, history = Recovery(), []
    if step:
        record = checkpoints.record(step)
        with distributed.together():
            check_same_run(config, record.config, checkpoints.folder)
            check_same_data(corpus, record, checkpoints.folder)
            if record.progress is None:
                raise Refused(f"{checkpoints.folder} is damaged (recovery and phases are missing): {REMEDY}.")
        recovery, history = record.progress.recovery, record.progress.phases
    batch = skipped_batches.batch_index(recovery.ledger, step)
    return ResumePoint(step, recovery, curriculum.going_on(history, config.phases, batch))


def stream(config: Config, corpus: Corpus, point: ResumePoint) -> Stream:
    """The training data of a run with the phases of its resume point. Raises: Refused."""
    return Stream(corpus, point.phases, config.seq_len, config.seed, config.packing, config.augment)


def check_same_run(config: Config, saved: dict, where) -> None:
    """Compares a config with the saved config of a run. Raises: Refused, naming the keys that differ."""
    differing = resume.differences(saved, config)
    if differing:
        raise Refused(
            f"{where} belongs to a run of another config: {', '.join(differing)}. Use the old values, or "
            "another --workdir."
        )


def check_same_data(corpus: Corpus, record: RunRecord, where) -> None:
    """Compares the stores with those of a checkpoint's run; further stores may have come. Raises: Refused."""
    known = record.text_hashes
    if not known:
        raise Refused(f"{where} is damaged (text_hashes is missing): begin anew in another --workdir.")
    for name, store in corpus.stores.items():
        text = store.manifest["text_hash"]
        hashes = {
            "tokenizer_hash": (store.tokenizer.hash, record.tokenizer_hash),
            "text_hash": (text, known.get(name, text)),
        }
        for key, (here, there) in hashes.items():
            if here != there:
                raise Refused(
                    f"{store.folder} has {key} {here[:12]}, but {where} was trained on {there[:12]}: put back the "
                    "store of that run, or begin anew in another --workdir."
                )
        others = [other for other in known if known[other] == text and name not in known]
        if others == [""]:  # the order of a store's rows depends on its name, and this store had none
            raise Refused(
                f"mixture.stores calls {store.folder} {name}, but the run of {where} began with this store alone and "
                f"without a name: go on with data.store={store.folder} and no mixture, or begin anew in another "
                f"--workdir, with mixture.weights={name} 1 at first."
            )
        if others and not name:
            raise Refused(
                f"{store.folder} is {shown(others[0])} in the mixture of {where}: go on with "
                f"mixture.stores='{others[0]}={store.folder}' and mixture.weights='{others[0]} 1'."
            )
        if others:
            raise Refused(
                f"mixture.stores calls {store.folder} {name}, but {where} knows this text as {shown(others[0])}: keep "
                "the name, which finds the run's place in the store, or begin anew in another --workdir."
            )
