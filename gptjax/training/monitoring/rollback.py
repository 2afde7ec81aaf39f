"""Rollback: the response to losses or gradients that are not finite, or to a loss that jumps and stays up.

The compiled step leaves the state unchanged if a number is not finite. This module decides what else happens: stop, or
roll back to a checkpoint from before the first bad step and skip all batches from there to the last bad step's batch.
The decision uses the losses alone, which are the same on all processes. The authors of PaLM did the same by hand
(Chowdhery et al. 2022, section 5.1): they restarted some 100 steps before a spike and skipped 200 to 500 batches, and
the spike did not recur. After a rollback, step N reads batch N plus the number of batches skipped so far.

A checkpoint holds the ledger and the losses that the rules use. A killed run therefore repeats the same decisions.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Sequence

from etils import epath

from gptjax.checkpoints.record import Recovery
from gptjax.errors import Failed, Refused
from gptjax.runtime import distributed, untrusted
from gptjax.runtime.files import write_whole
from gptjax.training.monitoring.config import RecoveryConfig
from gptjax.training.monitoring.skipped_batches import batch_index


class GoBack(Exception):
    """Steps `first` to `last` were bad: the run must roll back to before `first`, preferably to before step `since`."""

    def __init__(self, since: int, first: int, last: int, reason: str, named: str, ledger: list[dict]):
        super().__init__(f"{reason}; {named}")
        self.since, self.first, self.last, self.reason, self.ledger = since, first, last, reason, ledger


def skipping(trouble: GoBack, saved_steps: list[int], max_returns: int) -> list[dict]:
    """Returns the ledger with a new last row, whose step is that of the newest checkpoint before the trouble.

    Without any checkpoint that step is 0.

    Raises: Failed, if the run rolled back to that checkpoint too often, or if all checkpoints are too late.
    """
    before = [step for step in saved_steps if step < trouble.since]
    before = before or [step for step in saved_steps if step < trouble.first]
    if saved_steps and not before:
        raise Failed(
            f"The run can't roll back: {trouble.reason}, and the oldest checkpoint is that of step {saved_steps[0]}. "
            "To resume from the newest, set recovery.on_nonfinite and recovery.on_spike to off; or start over with a "
            "larger checkpoint.keep."
        )
    start = before[-1] if before else 0
    ledger = [row for row in trouble.ledger if row["step"] <= start]
    if sum(row["step"] == start for row in ledger) == max_returns:
        raise Failed(
            f"The run stops, because {trouble.reason}, although it rolled back to step {start} "
            f"recovery.max_returns={max_returns} times and skipped other batches each time: lower "
            "optimizer.peak_learning_rate, or raise optimizer.warmup_steps."
        )
    first = batch_index(ledger, start)
    number = batch_index(trouble.ledger, trouble.last - 1) + 1 - first
    return ledger + [{"step": start, "first_batch": first, "num_batches": number, "reason": trouble.reason}]


def way_back(trouble: GoBack, row: dict, removed: list[int]) -> str:
    """Describes a rollback, from the new row of the ledger and the steps whose checkpoints were removed."""
    last = row["first_batch"] + row["num_batches"] - 1
    gone = f"; removed the later checkpoints: {', '.join(map(str, removed))}" if removed else ""
    return f"going back to step {row['step']}, past batches {row['first_batch']} to {last}, because {trouble}{gone}"


class Watch:
    """Checks the losses of a run's steps in order, from a start on."""

    def __init__(self, config: RecoveryConfig, folder: epath.Path, documents: Callable, start: int, saved: Recovery):
        """Deletes rows of skipped.jsonl after `start` unless the ledger skipped their batch; the run rewrites them.

        Args:
          config: the rules.
          folder: the workdir.
          documents: maps a batch's index to the documents in the batch, as `stream.documents` does.
          start: completed updates at the start.
          saved: the value of `saved()` from the checkpoint of `start`; empty for a new run.
        """
        self._config, self._documents, self._path = config, documents, folder / "skipped.jsonl"
        self.ledger, self._losses = saved.ledger, saved.losses  # a loss is None where a number was not finite
        self.in_doubt = False  # whether the last loss may be the first in a series that leads to a rollback
        if distributed.first():
            self._drop_rows_after(start)

    def saved(self) -> Recovery:
        """The memory that a checkpoint has to hold."""
        return Recovery(self.ledger, self._losses)

    def see(self, step: int, loss: float, grad_norm: float) -> str:
        """Takes the numbers of a step. Returns a message for the user, mostly an empty one.

        Raises:
          GoBack: if the rules and the config ask for a rollback.
          Failed: if they ask for a stop.
        """
        config, finite = self._config, math.isfinite(loss) and math.isfinite(grad_norm)
        kept = max(config.spike_window + config.spike_steps, config.nonfinite_steps)
        self._losses = [*self._losses, loss if finite else None][-kept:]
        self.in_doubt, limit = False, self._limit()
        if not finite:
            reason = f"the loss was {loss:.4g} and the gradient's norm {grad_norm:.4g}"
            named = self._name([step], reason)
            if self._in_a_row(config.on_nonfinite, config.nonfinite_steps, lambda loss: loss is None):
                self._act("on_nonfinite", range(step - config.nonfinite_steps + 1, step + 1), reason, named)
            return f"step {step}: {reason}, so its update was left out; {named}"
        if loss > limit:
            reason = f"the loss was above {limit:.4f}"
            if self._in_a_row(config.on_spike, config.spike_steps, lambda loss: loss is None or loss > limit):
                steps = range(step - config.spike_steps + 1, step + 1)
                self._act("on_spike", steps, reason, self._name(steps, reason))
        return ""

    def _limit(self) -> float:
        """Returns the loss above which a step counts towards a spike."""
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

    def _act(self, key: str, steps: range, reason: str, named: str):
        reason = f"from step {steps[0]} to {steps[-1]} {reason}"
        if getattr(self._config, key) == "skip":
            # A high loss reflects the weights before that step, which an earlier batch may have damaged.
            since = steps[0] - (len(steps) if key == "on_spike" else 0)
            raise GoBack(since, steps[0], steps[-1], reason, named, self.ledger)
        raise Failed(
            f"The run stops, because {reason}; {named}. The earlier checkpoints are kept: lower "
            "optimizer.peak_learning_rate, raise optimizer.warmup_steps, or skip these batches with "
            f"recovery.{key}=skip."
        )

    def _name(self, steps: Sequence[int], reason: str) -> str:
        """Writes a row for the batch of each of these last steps; returns words that name some of the documents."""
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
        except Exception as error:  # no failure here is worth ending the run
            return f"its documents can't be named ({type(error).__name__}: {error})"
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
        except Exception as error:  # each file system raises errors of its own
            print(f"warning: {self._path} can't be updated ({error})", flush=True)
