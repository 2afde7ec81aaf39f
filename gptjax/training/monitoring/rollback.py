"""Bad numbers: what a run does when losses or gradients are not finite, or a loss jumps and stays up.

The compiled step leaves the state as it was where a number is not finite. What more is done is decided here, from the
losses alone, which are the same on all processes: stop, or go back to a checkpoint from before the first bad step and
skip all batches from there to the last bad one. So the makers of PaLM did by hand (Chowdhery et al. 2022, section 5.1):
they went back some 100 steps before a spike, past 200 to 500 batches, and it did not come again. Step N then reads
batch N plus what the ledger skipped by then.

A checkpoint holds the ledger and the losses that the rules look at. So a run that was killed, whenever it was, comes to
the very same decisions again.
"""

import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence

from etils import epath

from gptjax.checkpoints.record import Recovery
from gptjax.errors import Failed, Refused
from gptjax.runtime import distributed, untrusted
from gptjax.runtime.files import write_whole
from gptjax.training.monitoring.skipped_batches import batch_index

POLICIES = ("skip", "stop", "off")


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """When a run goes back and skips (`skip`), or ends (`stop`); `off` is neither.

    A spike is a loss above median + max(spike_deviations × 1.4826 × median absolute deviation, spike_floor), of the
    spike_window losses before the last spike_steps, that many times in a row; 1.4826 makes it standard deviations where
    losses are normally distributed. By the defaults no healthy run has one: bad batches and short spikes, which mend
    themselves, end before 16 steps, and 16 losses in a row both 12 deviations and half a nat above are no chance.
    """

    on_nonfinite: str = "skip"
    nonfinite_steps: int = 3  # in a row, of which the loss or the gradient's norm is not finite
    on_spike: str = "skip"
    spike_steps: int = 16
    spike_window: int = 256  # steps; there are no spikes before it is full
    spike_deviations: float = 12.0
    spike_floor: float = 0.5  # nats a token
    max_returns: int = 3  # to one checkpoint; then the run stops
    sdc_check_every: int = 0  # each so many steps one is computed twice and compared, which holds two states; 0 is off


def check(config: RecoveryConfig) -> None:
    """Raises: Refused, for an unknown word or a number out of range."""
    for key in ("on_nonfinite", "on_spike"):
        if getattr(config, key) not in POLICIES:
            raise Refused(f'recovery.{key}="{getattr(config, key)}" is unknown: choose one of {", ".join(POLICIES)}.')
    for key in ("nonfinite_steps", "spike_steps", "spike_window", "max_returns"):
        if getattr(config, key) < 1:
            raise Refused(f"recovery.{key}={getattr(config, key)} must be at least 1.")
    for key in ("spike_deviations", "spike_floor", "sdc_check_every"):
        if getattr(config, key) < 0:
            raise Refused(f"recovery.{key}={getattr(config, key)} must not be negative.")


class GoBack(Exception):
    """Steps `first` to `last` were bad: the run has to go on from before them, best from before step `since`."""

    def __init__(self, since: int, first: int, last: int, reason: str, named: str, ledger: list[dict]):
        super().__init__(f"{reason}; {named}")
        self.since, self.first, self.last, self.reason, self.ledger = since, first, last, reason, ledger


def skipping(trouble: GoBack, saved_steps: list[int], max_returns: int) -> list[dict]:
    """The ledger with which the run goes on from its last row's step: the newest checkpoint from before the trouble.

    Raises: Failed, where it went back there too often, or no checkpoint is from before; without any it begins anew.
    """
    before = [step for step in saved_steps if step < trouble.since]
    before = before or [step for step in saved_steps if step < trouble.first]
    if saved_steps and not before:
        raise Failed(
            f"The run can't go back: {trouble.reason}, and the oldest checkpoint is that of step {saved_steps[0]}. To "
            "go on from the newest, set recovery.on_nonfinite and recovery.on_spike to off; or begin anew with a "
            "larger checkpoint.keep."
        )
    start = before[-1] if before else 0
    ledger = [row for row in trouble.ledger if row["step"] <= start]
    if sum(row["step"] == start for row in ledger) == max_returns:
        raise Failed(
            f"The run stops, because {trouble.reason}, although it went back to step {start} "
            f"recovery.max_returns={max_returns} times, and past other batches each time: lower "
            "optimizer.peak_learning_rate, or raise optimizer.warmup_steps."
        )
    first = batch_index(ledger, start)
    number = batch_index(trouble.ledger, trouble.last - 1) + 1 - first
    return ledger + [{"step": start, "first_batch": first, "num_batches": number, "reason": trouble.reason}]


def way_back(trouble: GoBack, row: dict, removed: list[int]) -> str:
    """What is told of going back, by the new row of the ledger and the steps whose checkpoints were removed."""
    last = row["first_batch"] + row["num_batches"] - 1
    gone = f"; the checkpoints of the way that is left are removed: {', '.join(map(str, removed))}" if removed else ""
    return f"going back to step {row['step']}, past batches {row['first_batch']} to {last}, because {trouble}{gone}"


class Watch:
    """Sees the losses of a run's steps in order, from a start on."""

    def __init__(self, config: RecoveryConfig, folder: epath.Path, documents: Callable, start: int, saved: Recovery):
        """Rows of skipped.jsonl from after `start` that are of no skipped batch go: the run writes them again.

        Args:
          documents: those that a batch has tokens of, as `stream.documents` tells them, by the batch's index.
          saved: what `saved` returned when the checkpoint of `start` was made; empty for a new run.
        """
        self._config, self._documents, self._path = config, documents, folder / "skipped.jsonl"
        self.ledger, self._losses = saved.ledger, saved.losses  # a loss is None where a number was not finite
        self.in_doubt = False  # whether the last loss may be the first of those for which the run will go back
        if distributed.first():
            self._drop_rows_after(start)

    def saved(self) -> Recovery:
        """The memory that a checkpoint has to hold."""
        return Recovery(self.ledger, self._losses)

    def see(self, step: int, loss: float, grad_norm: float) -> str:
        """Takes the numbers of a step. Returns what there is to tell of it: mostly nothing.

        Raises:
          GoBack, Failed: as the rules and the config have it.
        """
        config, finite = self._config, math.isfinite(loss) and math.isfinite(grad_norm)
        kept = max(config.spike_window + config.spike_steps, config.nonfinite_steps)
        self._losses = [*self._losses, loss if finite else None][-kept:]
        self.in_doubt, limit = False, self._limit()
        if not finite:
            told = f"the loss was {loss:.4g} and the gradient's norm {grad_norm:.4g}"
            named = self._name([step], told)
            if self._in_a_row(config.on_nonfinite, config.nonfinite_steps, lambda loss: loss is None):
                self._act("on_nonfinite", range(step - config.nonfinite_steps + 1, step + 1), told, named)
            return f"step {step}: {told}, so its update was left out; {named}"
        if loss > limit:
            told = f"the loss was above {limit:.4f}"
            if self._in_a_row(config.on_spike, config.spike_steps, lambda loss: loss is None or loss > limit):
                steps = range(step - config.spike_steps + 1, step + 1)
                self._act("on_spike", steps, told, self._name(steps, told))
        return ""

    def _limit(self) -> float:
        """The loss above which a step is one of a spike."""
        config = self._config
        before = self._losses[: -config.spike_steps][-config.spike_window :]
        finite = [loss for loss in before if loss is not None]
        if config.on_spike == "off" or len(before) < config.spike_window or not finite:
            return math.inf
        median = statistics.median(finite)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in finite)
        return median + max(config.spike_deviations * deviation, config.spike_floor)

    def _in_a_row(self, policy: str, length: int, bad: Callable) -> bool:
        recent = self._losses[-length:]
        self.in_doubt = policy == "skip"
        return policy != "off" and len(recent) == length and all(map(bad, recent))

    def _act(self, key: str, steps: range, told: str, named: str):
        reason = f"from step {steps[0]} to {steps[-1]} {told}"
        if getattr(self._config, key) == "skip":
            # A high loss tells of the weights before its step, which an earlier batch may have spoilt.
            since = steps[0] - (len(steps) if key == "on_spike" else 0)
            raise GoBack(since, steps[0], steps[-1], reason, named, self.ledger)
        raise Failed(
            f"The run stops, because {reason}; {named}. The checkpoints from before are kept: lower "
            "optimizer.peak_learning_rate, raise optimizer.warmup_steps, or have the run go on past these batches by "
            f"recovery.{key}=skip."
        )

    def _name(self, steps: Sequence[int], reason: str) -> str:
        """Writes a row for the batch of each of these last steps; returns a few of the documents, in words."""
        if not distributed.first():
            return ""
        rows = []
        try:
            for step in steps:
                batch, loss = batch_index(self.ledger, step - 1), self._losses[step - steps[-1] - 1]
                row = {"step": step, "batch": batch, "reason": reason, "loss": loss}
                rows.append(row | {"documents": self._documents(batch)})
            with self._path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except Exception as error:  # of whatever kind: it is no reason to end the run
            return f"its documents can't be told ({type(error).__name__}: {error})"
        batches = " to ".join(str(row["batch"]) for row in rows[:: max(1, len(rows) - 1)])
        documents = [f"{found['name']} from {found['offset']}" for row in rows for found in row["documents"]]
        more = f" and {len(documents) - 3} more" if len(documents) > 3 else ""
        return f"batch {batches} has tokens of {', '.join(documents[:3])}{more}: {self._path} names all"

    def _drop_rows_after(self, start: int) -> None:
        skipped = [range(row["first_batch"], row["first_batch"] + row["num_batches"]) for row in self.ledger]
        kept = []
        try:
            lines = self._path.read_bytes().splitlines(keepends=True) if untrusted.is_file(self._path) else ()
            for line in lines:
                with contextlib.suppress(KeyError, TypeError, Refused):  # a line that a kill cut short
                    row = untrusted.json_object(line, self._path, "it is dropped")
                    if row["step"] <= start or any(row["batch"] in batches for batches in skipped):
                        kept.append(line)
            if self._path.exists():
                write_whole(self._path, b"".join(kept))
        except Exception as error:  # of whatever file system
            print(f"warning: {self._path} can't be brought up to date ({error})", flush=True)
