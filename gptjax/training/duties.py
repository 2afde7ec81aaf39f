"""The work between two train steps: saves, evaluations and traces, each when due."""

import contextlib
import dataclasses

from gptjax.checkpoints import retention
from gptjax.checkpoints.record import Progress, RunRecord
from gptjax.evaluation.heldout import Evaluation
from gptjax.runtime import heartbeat, profiling
from gptjax.training import validation
from gptjax.training.job import Job, Leg
from gptjax.training.monitoring.metrics import Log
from gptjax.training.step import TrainState, weights


def due(step: int, every: int) -> bool:
    """Whether something is due after `step` updates; `every` = 0 means never."""
    return step > 0 and every > 0 and step % every == 0


class Duties:
    """Saves and evaluates the state of a run. All of them wait for the step before."""

    def __init__(self, job: Job, leg: Leg, log: Log, bar):
        self._job, self._leg, self._log, self._bar = job, leg, log, bar
        self._saved = leg.start  # the step of the latest save

    def save_if_due(self, step: int, state: TrainState) -> None:
        """Saves at the run's end, at each multiple of checkpoint_every, and again where a save has failed."""
        config, checkpoints = self._job.config, self._job.checkpoints
        at_end = step == config.num_steps
        if at_end or due(step, config.checkpoint_every) or checkpoints.failed(step):
            with self._log.paused(), heartbeat.phase("saving"):  # from here on the watch has seen all losses
                if at_end or not self._leg.watch.in_doubt:
                    self._save(step, state)
                else:
                    self._bar.print(f"step {step} is not saved, since the run may have to go back to before it")
        self._log.saved(checkpoints.saved())

    def evaluate_if_due(self, step: int, state: TrainState) -> None:
        """Evaluates a step within the run, unless metrics.jsonl has its result; saves it if it is the best."""
        config, log = self._job.config, self._log
        if step >= config.num_steps:  # the end evaluates the last step
            return
        if due(step, config.eval_every) and step not in log.losses:
            with log.paused():
                self._held_out(step, state)
                is_best = retention.best(self._losses(), log.losses) == step
                if is_best and step != self._saved and not self._leg.watch.in_doubt:
                    with heartbeat.phase("saving"):
                        self._save(step, state)
        if due(step, config.tasks.every):
            with log.paused():
                self._on_tasks(step, state)

    def finish(self, step: int, state: TrainState) -> Evaluation | None:
        """Saves and evaluates the last step. Raises: Failed, if it cannot be saved."""
        if self._saved < step:  # the run ends early
            with self._log.paused(), heartbeat.phase("saving"):
                self._save(step, state)
        evaluation = self._held_out(step, state)
        self._on_tasks(step, state)
        with heartbeat.phase("saving"):
            self._insist(step, state)
        return evaluation

    def leave(self, state: TrainState) -> int:
        """Saves the state of a run that is asked to stop; returns its step. Raises: Failed, if it cannot be saved."""
        step = int(state.step)
        with self._log.paused(), heartbeat.phase("saving"):
            if step > self._saved:
                self._save(step, state)
            self._insist(step, state)
        return step

    def _losses(self) -> dict[int, float]:
        """The held-out losses by which the best checkpoint is kept."""
        return self._log.losses if self._job.config.stopping.patience else {}

    def _record(self) -> RunRecord:
        progress = Progress(self._leg.watch.saved(), self._leg.data.phases)
        return dataclasses.replace(self._job.record, progress=progress)

    def _save(self, step: int, state: TrainState) -> None:
        self._saved = step
        rotate = not self._leg.watch.in_doubt  # else a rollback may need the older checkpoints
        self._job.checkpoints.save(step, state, self._record(), self._losses(), rotate)

    def _insist(self, step: int, state: TrainState) -> None:
        rotate = not self._leg.watch.in_doubt
        self._job.checkpoints.insist(step, state, self._record(), self._losses(), rotate)

    def _held_out(self, step: int, state: TrainState) -> Evaluation | None:
        job = self._job
        return validation.held_out(job.config, job.corpus, job.mesh, weights(state), step, self._log)

    def _on_tasks(self, step: int, state: TrainState) -> None:
        job = self._job
        validation.on_tasks(job.config, job.tasks, job.corpus.tokenizer, weights(state), step, self._log)


class Tracing(contextlib.ExitStack):
    """Traces the steps of --profile_steps into the workdir. A context manager: leaving it ends the trace."""

    def __init__(self, job: Job, leg: Leg, log: Log):
        super().__init__()
        self._folder, self._log = job.folder / "profile", log
        self._steps = [step for step in job.profile if step >= leg.start]

    def before(self, step: int) -> None:
        """Begins the trace if the update after `step` is the first to trace."""
        if step in self._steps[:1]:
            with self._log.paused(), heartbeat.phase("tracing"):
                self.enter_context(profiling.trace(self._folder))

    def after(self, step: int) -> None:
        """Ends the trace if the update that led to `step` is the last to trace."""
        if step - 1 in self._steps[-1:]:
            with self._log.paused(), heartbeat.phase("tracing"):
                self.close()
