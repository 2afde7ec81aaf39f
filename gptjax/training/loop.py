"""The training loop, and the preflight that leads to it."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from etils import epath
from jax.stages import Compiled

from gptjax.checkpoints import retention
from gptjax.checkpoints.manager import Checkpoints
from gptjax.data.batch import Batch
from gptjax.data.stream import curriculum, stream
from gptjax.errors import Failed, Preempted, Refused
from gptjax.evaluation.heldout import Evaluation
from gptjax.models.interface import LanguageModel
from gptjax.parallel import hardware
from gptjax.parallel.batches import BatchLayout, local_rows, place
from gptjax.parallel.mesh import devices, make_mesh
from gptjax.runtime import distributed, heartbeat, preemption, profiling, progress
from gptjax.training import corpus as corpus_
from gptjax.training import init_from, resume_point, run_report, validation, workdir
from gptjax.training.config.schema import Config
from gptjax.training.duties import Duties, Tracing, due
from gptjax.training.job import Job, Leg
from gptjax.training.monitoring import early_stopping, records, rollback, sdc, skipped_batches, trackers
from gptjax.training.monitoring.metrics import Log
from gptjax.training.monitoring.work import Work
from gptjax.training.monitoring.writers import Writers
from gptjax.training.resume_point import ResumePoint
from gptjax.training.step import TrainState, abstract_state, compile_step, init_state, weights


def train(config: Config, folder: epath.Path, profile: range = range(0), fresh: bool = False) -> None:
    """Runs a config in a workdir: from its newest checkpoint that verifies, or from the beginning of a new run.

    Args:
      config: the config of the run.
      folder: the workdir.
      profile: the steps to trace, by the number of updates before each.
      fresh: whether the run must be new.

    Raises:
      Refused: before anything is computed, for an unusable config, workdir, corpus or mesh.
      Failed: for numbers that the run cannot survive, or by recovery.* must not, or a state that cannot be saved.
      Preempted: after a save, when the run was asked to stop.
    """
    started = time.perf_counter()
    mesh = make_mesh(config.mesh, devices())
    tracker, tasks = check(config, folder, mesh, fresh)
    with distributed.together():
        config = workdir.as_begun(config, folder)
    with distributed.owned(folder):
        heartbeat.publish(folder, jax.process_count())
        with heartbeat.phase("preparing data"):
            corpus = corpus_.prepare(config, folder, mesh)
        with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
            record = corpus_.record_of(config, corpus)
            run(Job(config, folder, mesh, corpus, record, checkpoints, tasks, profile, tracker), started)


def check(config: Config, folder: epath.Path, mesh: jax.sharding.Mesh, fresh: bool) -> tuple[Callable | None, dict]:
    """Checks all that can be checked without a write. Returns the tracker and the lm-eval tasks. Raises: Refused."""
    with distributed.together():
        if fresh and distributed.first():
            workdir.check_empty(folder)
    with distributed.together():
        workdir.check(config, folder, mesh)
        tracker = trackers.find(config.tracker) if distributed.first() else None
    init_from.check(config, folder)
    if tracker:
        tracker = functools.partial(tracker, dataclasses.asdict(config), str(folder))
    return tracker, validation.load_tasks(config)


def run(job: Job, started: float) -> None:
    """Trains once the workdir lock is held. started: time.perf_counter() at process start."""
    config, folder, checkpoints = job.config, job.folder, job.checkpoints
    newest = checkpoints.newest()
    rows = None
    if newest == 0 or config.stopping.patience > 0:  # otherwise an unreadable log is a warning, not a refusal
        with distributed.together():
            rows = workdir.read_rows(folder) if distributed.first() else []
    if ended := complete(job, newest, rows):
        print(ended, flush=True)
        return
    with distributed.together():
        if newest == 0:
            workdir.check_never_saved(rows or [], folder)
    point = resume_point.read(config, job.corpus, checkpoints, newest)
    state = first_state(job, point.step)
    leg = leg_from(job, point, rows)
    if distributed.first():
        workdir.write_config(config, folder)
    facts = run_report.model_and_mesh(config, job.vocab_size, job.mesh)
    run_report.extent(config, job.corpus, leg.data, job.vocab_size)
    run_report.packing(config, leg.data)
    print("compiling the train step …", flush=True)
    with heartbeat.phase("compiling"), profiling.compiling() as compiling:
        leg = compiled(job, leg, state, {})
    start = started, facts | compiling | run_report.compilation(leg.compiled, job.mesh, **compiling)
    while True:
        try:
            with heartbeat.phase("training"):
                model, evaluation, log = train_steps(job, leg, state, start)
            break
        except rollback.GoBack as trouble:
            ledger = roll_back(job, trouble)
        # Outside of the handler, since the exception holds the state that is left.
        point = resume_point.read(config, job.corpus, checkpoints, ledger[-1]["step"])
        point = dataclasses.replace(point, recovery=dataclasses.replace(point.recovery, ledger=ledger))
        state = first_state(job, point.step)
        steps, leg, start = leg.compiled, leg_from(job, point, None), None
        with heartbeat.phase("compiling"):
            leg = compiled(job, leg, state, steps)
    report(job, leg, model, evaluation, log)


def complete(job: Job, newest: int, rows: list[dict] | None) -> str:
    """Says that the run is complete, and how to go on; empty if steps or samples are missing."""
    config, folder = job.config, job.folder
    stopped = False
    if newest < config.num_steps and config.stopping.patience > 0:
        before = [*records.evaluations(row for row in rows or [] if row["step"] <= newest).items()]
        stopped = early_stopping.over(config.stopping, dict(distributed.exchange(before)[0]))
    if not (stopped or newest >= config.num_steps) or not distributed.shared((folder / "samples.txt").exists):
        return ""
    key, value = ("num_steps", newest) if not stopped else ("stopping.patience", config.stopping.patience)
    early = f", where {early_stopping.reason(config.stopping)}" if stopped else f" of num_steps={config.num_steps}"
    return f"The run in {folder} is complete at step {newest}{early}. To go on, raise it: --config.{key}={2 * value}"


def first_state(job: Job, step: int) -> TrainState:
    """The state of a step from its checkpoint; for step 0 a new one, with the weights of `init_from` if set."""
    config = job.config
    heartbeat.reached(step)
    if step:
        with heartbeat.phase("restoring"):
            state = job.checkpoints.restore(step, abstract_state(config, job.vocab_size, job.mesh))
        print(f"going on from the checkpoint of step {step}", flush=True)
        return state
    if config.init_from:
        with heartbeat.phase("restoring"):
            return init_from.begin(config, job.vocab_size, job.mesh)
    with heartbeat.phase("compiling"):
        return jax.jit(functools.partial(init_state, config, job.vocab_size))()


def leg_from(job: Job, point: ResumePoint, rows: list[dict] | None) -> Leg:
    """The leg that begins at a resume point; its train step is still to be compiled. Raises: Refused."""
    data = resume_point.stream(job.config, job.corpus, point)
    watch = rollback.Watch(job.config.recovery, job.folder, data.documents, point.step, point.recovery)
    return Leg(point.step, data, watch, rows, {})


def compiled(job: Job, leg: Leg, state: TrainState, steps: dict[tuple[int, int], Compiled]) -> Leg:
    """The leg with the train step compiled for each shape, (batch_size, seq_len), that it reaches.

    Args:
      job: the run.
      leg: the leg to compile for.
      state: the state at its start.
      steps: the steps that are compiled already.
    """
    batch = skipped_batches.batch_index(leg.watch.ledger, leg.start)
    stop = batch + max(1, job.config.num_steps - leg.start)
    phases = {phase.shape: phase for phase, *_ in curriculum.parts(leg.data.phases, batch, stop)}
    new = {
        shape: compile_step(job.config.at(phase), job.vocab_size, state, job.mesh)
        for shape, phase in phases.items()
        if shape not in steps
    }
    return dataclasses.replace(leg, compiled=steps | new)


def train_steps(
    job: Job, leg: Leg, state: TrainState, start: tuple[float, dict] | None
) -> tuple[LanguageModel, Evaluation | None, Log]:
    """The loop: trains from the leg's start to the end of the run. Returns the model, its evaluation, and the log.

    Args:
      job: the run.
      leg: the leg to train.
      state: the state at its start.
      start: time.perf_counter() at process start and facts for the row of the start; None after a rollback.

    Raises:
      rollback.GoBack: where the run has to return to an earlier step.
      Failed: where the run has to end.
      Preempted: where the run was asked to stop; its state is saved.
    """
    config, step = job.config, leg.start
    batches = train_batches(config, leg.data, job.mesh, step, leg.watch.ledger)
    with (
        progress.progress("training", config.num_steps, step, plain_seconds=0) as bar,
        log_of(job, leg, bar) as log,
        Tracing(job, leg, log) as tracing,
    ):
        duties = Duties(job, leg, log, bar)
        if start:
            log.starting(*start)
        try:
            duties.evaluate_if_due(step, state)  # a kill between a save and its evaluation left this undone
            while step < config.num_steps and not stops_early(config, step, log):
                tracing.before(step)
                train_step = leg.compiled[leg.phase(step).shape]
                if due(step + 1, config.recovery.sdc_check_every):
                    train_step = functools.partial(sdc.twice, train_step)
                # A hidden transfer would wait for the device at each step.
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1), jax.transfer_guard("disallow"):
                    batch = next(batches)
                    preemption.tick()
                    with heartbeat.waiting():
                        state, metrics = train_step(state, batch)
                step += 1
                log.push(step, metrics)  # fetches the metrics of the step before
                tracing.after(step)
                duties.save_if_due(step, state)
                heartbeat.reached(step)
                duties.evaluate_if_due(step, state)
            if step < config.num_steps:
                bar.print(f"step {step}: {early_stopping.reason(config.stopping)}; the run ends")
            evaluation = duties.finish(step, state)
            preemption.tick()  # before the samples, when everything is saved
        except Preempted as stop:
            saved = duties.leave(state)
            reached = f"step {saved} is saved" if saved else "no step was done"
            raise Preempted(f"{stop}: {reached}, and the same command goes on from there") from None
        finally:
            log.saved(job.checkpoints.saved())
    return weights(state), evaluation, log


def log_of(job: Job, leg: Leg, bar) -> Log:
    """Opens the log of a leg."""
    config = job.config
    peak = hardware.peak_flops(job.mesh.devices.ravel(), config.model.dtype)
    work = Work(config.model, job.vocab_size, leg.data.phases, leg.watch.ledger, peak)
    writers = Writers(job.folder, leg.start, bar, job.tracker, leg.rows) if distributed.first() else None
    return Log(writers, bar, leg.start, leg.watch, config.log_every, work)


def stops_early(config: Config, step: int, log: Log) -> bool:
    """Whether the evaluation of this step ends the run."""
    return step in log.losses and early_stopping.over(config.stopping, log.losses)


def roll_back(job: Job, trouble: rollback.GoBack) -> list[dict]:
    """Removes the checkpoints after the step to return to. Returns the ledger, whose last row has that step."""
    checkpoints = job.checkpoints
    checkpoints.wait()
    good, there = checkpoints.verified(), checkpoints.steps()
    if there and not good:  # most likely, storage is lost for a while
        raise Failed(
            f"The run has to go back, because {trouble.reason}, but none of the {len(there)} checkpoints in "
            f"{checkpoints.folder} can be read, so nothing is removed: see gptjax checkpoint verify, and run "
            "the same command again once they can."
        ) from trouble
    ledger = rollback.skipping(trouble, good, job.config.recovery.max_returns)
    removed = checkpoints.remove_after(ledger[-1]["step"])
    print(rollback.way_back(trouble, ledger[-1], removed), flush=True)
    return ledger


def report(job: Job, leg: Leg, model: LanguageModel, evaluation: Evaluation | None, log: Log) -> None:
    """Prints the end of the run: its best checkpoint, what was expected and measured, and samples."""
    config = job.config
    if config.stopping.patience and (best := retention.best(log.losses, job.checkpoints.steps())):
        print(
            f"the best held-out loss, {log.losses[best]:.4f} nats a token, is of step {best}: --step=best", flush=True
        )
    last = leg.phase(max(leg.start, config.num_steps - 1))
    run_report.held_against(leg.compiled[last.shape], log.floor_seconds, log.step_seconds)
    with heartbeat.phase("sampling"):
        run_report.report(config, job.folder, job.corpus, model, evaluation)


def profiled(text: str, num_steps: int) -> range:
    """The steps of --profile_steps=A:B by the updates before each; none for an empty text. Raises: Refused."""
    if not text:
        return range(0)
    found = re.fullmatch("([0-9]{1,10}):([0-9]{1,10})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not first < last <= num_steps:
        raise Refused(
            f"--profile_steps={text} must be A:B with A < B ≤ num_steps={num_steps}, for example "
            f"{max(num_steps - 3, 0)}:{num_steps}."
        )
    return range(first, last)


def train_batches(
    config: Config, data: stream.Stream, mesh: jax.sharding.Mesh, start: int, ledger: Sequence[dict] = ()
) -> Iterator[Batch]:
    """The batches of steps `start` to `num_steps` on the mesh, read ahead in threads; `ledger` lies before them."""
    index = skipped_batches.batch_index(ledger, start)
    for phase, first, stop in curriculum.parts(data.phases, index, index + config.num_steps - start):
        layout = BatchLayout(mesh, phase.batch_size, config.grad_accum_steps)
        rows = local_rows(layout)
        for batch in stream.iterate(functools.partial(data.batch, rows=rows), first, stop):
            yield place(batch, rows, layout)
