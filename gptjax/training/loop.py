"""The loop."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import jax
from etils import epath
from jax.stages import Compiled

from gptjax.checkpoints import retention
from gptjax.checkpoints.manager import Checkpoints
from gptjax.data.stream import curriculum, stream
from gptjax.data.stream.mixture import Corpus
from gptjax.errors import Failed, Preempted, Refused
from gptjax.parallel import hardware
from gptjax.parallel.batches import BatchLayout, local_rows, place
from gptjax.parallel.mesh import make_mesh
from gptjax.runtime import distributed, heartbeat, preemption, profiling, progress
from gptjax.training import corpus as corpus_
from gptjax.training import init_from, run_report, validation, workdir
from gptjax.training.config.schema import Config
from gptjax.training.corpus import check_same_data, prepare
from gptjax.training.monitoring import (
    early_stopping,
    metrics,
    rollback,
    sdc,
    skipped_batches,
    trackers,
)
from gptjax.training.step import TrainState, abstract_state, compile_step, init_state, weights


class Job(NamedTuple):
    """What of a run stays the same, however often it goes back."""

    config: Config
    folder: epath.Path
    mesh: jax.sharding.Mesh
    corpus: Corpus
    run: dict  # what a checkpoint says of the run it is of
    checkpoints: Checkpoints
    tasks: dict  # that it is measured by
    profile: range
    tracker: Callable | None  # begins to track the run


def train(config: Config, folder: epath.Path, profile: range = range(0), fresh: bool = False) -> None:
    """Runs a config in a workdir: from its newest checkpoint that verifies, or from the beginning of a new run.

    Args:
      profile: the steps to trace, by the number of updates before each. fresh: whether it has to be a new run.

    Raises:
      Refused: before anything is computed, for a config, workdir, corpus or mesh that can't be used.
      Failed: for numbers with which it can't, or by the config's recovery must not, go on, or a state that can't be saved.
      Preempted: after a save, when the run was asked to stop.
    """
    began = time.perf_counter()
    mesh = make_mesh(config.mesh, jax.devices())
    with distributed.together():
        if fresh and distributed.first():
            workdir.check_empty(folder)
    with distributed.together():
        workdir.check(config, folder, mesh)
        tracker = trackers.find(config.tracker) if distributed.first() else None
    init_from.check(config, folder)
    tasks = validation.load_tasks(config)
    track = tracker and functools.partial(tracker, dataclasses.asdict(config), str(folder))
    with distributed.owned(folder):
        heartbeat.publish(folder, jax.process_count())
        with heartbeat.phase("preparing data"):
            corpus = prepare(config, folder, mesh)
        with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
            identity = corpus_.identity(config, corpus)
            run(Job(config, folder, mesh, corpus, identity, checkpoints, tasks, profile, track), began)


def run(job: Job, began: float) -> None:
    """What `train` does in a workdir that is its own. began: when this process did, by `time.perf_counter`."""
    config, folder, checkpoints, vocab_size = job.config, job.folder, job.checkpoints, job.corpus.tokenizer.vocab_size
    newest = checkpoints.newest()
    stopped = newest < config.num_steps and config.stopping.patience > 0
    stopped = stopped and early_stopping.over(config.stopping, workdir.losses(folder, newest))
    if (stopped or newest >= config.num_steps) and distributed.shared((folder / "samples.txt").exists):
        key, value = ("num_steps", newest) if not stopped else ("stopping.patience", config.stopping.patience)
        early = f", where {early_stopping.reason(config.stopping)}" if stopped else f" of num_steps={config.num_steps}"
        print(
            f"The run in {folder} is complete at step {newest}{early}. To go on, raise it: --config.{key}={2 * value}",
            flush=True,
        )
        return
    start, state, data, watch = begin(job, newest)
    if distributed.first():
        workdir.write_config(config, folder)
    facts = run_report.model_and_mesh(config, vocab_size, job.mesh)
    run_report.packing(config, data)
    with heartbeat.phase("compiling"), profiling.compiling() as compiling:
        steps = compile_steps(job, start, state, data, watch.ledger, {})
    started = began, facts | compiling | run_report.compilation(steps, job.mesh, **compiling)
    while True:
        try:
            with heartbeat.phase("training"):
                model, evaluation, log = go_on(job, steps, start, state, data, watch, started)
            break
        except rollback.GoBack as trouble:
            checkpoints.wait()
            good, there = checkpoints.verified(), checkpoints.steps()
            if there and not good:  # storage that is lost for a while, most likely
                raise Failed(
                    f"The run has to go back, because {trouble.reason}, but none of the {len(there)} checkpoints in "
                    f"{checkpoints.folder} can be read, so nothing is removed: see gptjax checkpoint verify, and run "
                    "the same command again once they can."
                ) from trouble
            ledger = rollback.skipping(trouble, good, config.recovery.max_returns)
            newest = ledger[-1]["step"]
            removed = checkpoints.remove_after(newest)
            print(rollback.way_back(trouble, ledger[-1], removed), flush=True)
        start, state, data, watch = begin(job, newest, ledger)  # by now the state that is left is gone from memory
        with heartbeat.phase("compiling"):
            steps = compile_steps(job, start, state, data, watch.ledger, steps)
        started = None
    if config.stopping.patience and (best := retention.best(log.losses, checkpoints.steps())):
        print(
            f"the best held-out loss, {log.losses[best]:.4f} nats a token, is of step {best}: --step=best", flush=True
        )
    last = data.phase(skipped_batches.batch_index(watch.ledger, max(start, config.num_steps - 1)))
    run_report.held_against(steps[last.shape], log.floor_seconds, log.step_seconds)
    with heartbeat.phase("sampling"):
        run_report.report(config, folder, job.corpus, model, evaluation)


def compile_steps(
    job: Job, start: int, state: TrainState, data: stream.Stream, ledger: list[dict], steps: dict
) -> dict[tuple[int, int], Compiled]:
    """The train step compiled for each shape, (batch_size, seq_len), that steps `start` to `num_steps` have, as far as it
    is not among `steps`, and these. What comes after a run's end is not compiled."""
    batch, vocab_size = skipped_batches.batch_index(ledger, start), job.corpus.tokenizer.vocab_size
    stop = batch + max(1, job.config.num_steps - start)
    phases = {phase.shape: phase for phase, *_ in curriculum.parts(data.phases, batch, stop)}
    new = {shape: phase for shape, phase in phases.items() if shape not in steps}
    return steps | {shape: compile_step(job.config.at(its), vocab_size, state, job.mesh) for shape, its in new.items()}


def begin(job: Job, start: int, ledger: list[dict] | None = None):
    """The step `start`, its state from its checkpoint, or a new one for step 0, and from there on the data and the watch
    over the losses.

    Args:
      ledger: what to skip from there, where it is more than the checkpoint says.
    """
    config, folder, checkpoints, vocab_size = job.config, job.folder, job.checkpoints, job.corpus.tokenizer.vocab_size
    seen, history = skipped_batches.NOTHING, []
    heartbeat.reached(start)
    if start:
        saved = checkpoints.run(start)
        with distributed.together():
            workdir.check_same_run(config, saved["config"], checkpoints.folder)
            check_same_data(job.corpus, saved, checkpoints.folder)
            skipped_batches.check_saved(saved, start, checkpoints.folder)
            history = curriculum.read_saved(saved, config.seq_len, checkpoints.folder)
        with heartbeat.phase("restoring"):
            state = checkpoints.restore(start, abstract_state(config, vocab_size, job.mesh))
        seen = saved["recovery"]
        print(f"going on from the checkpoint of step {start}", flush=True)
    else:
        with distributed.together():
            workdir.check_never_saved(folder)
        if config.init_from:
            with heartbeat.phase("restoring"):
                state = init_from.begin(config, vocab_size, job.mesh)
        else:
            with heartbeat.phase("compiling"):
                state = jax.jit(functools.partial(init_state, config, vocab_size))()
    phases = curriculum.going_on(history, config.phases, skipped_batches.batch_index(seen["ledger"], start))
    data = stream.Stream(job.corpus, phases, config.seq_len, config.seed, config.packing, config.augment)
    seen = seen if ledger is None else seen | {"ledger": ledger}
    return start, state, data, rollback.Watch(config.recovery, folder, data.documents, start, seen)


def go_on(job: Job, steps: dict, start: int, state: TrainState, data: stream.Stream, watch: rollback.Watch, started):
    """The loop, from `start` to the end of the run. Returns the model, its evaluation, and the log.

    Args:
      steps: as of `compile_steps`. started: when this process began, and facts for the row of its start; None where it only went back.

    Raises:
      recovery.GoBack: where it has to be left for an earlier step.
      Failed: where the run has to end.
      Preempted: where it was asked to stop, and its state is saved.
    """
    config, folder, checkpoints = job.config, job.folder, job.checkpoints
    vocab_size, saved, last = job.corpus.tokenizer.vocab_size, start, max(start, config.num_steps)
    peak = hardware.peak_flops(job.mesh.devices.ravel(), config.model.dtype)
    batches = train_batches(config, data, job.mesh, start, watch.ledger)
    traced = [step for step in job.profile if step >= start]
    due = lambda step, every: every and step % every == 0
    losses = lambda: log.losses if config.stopping.patience else {}  # by which the best checkpoint stays
    said = lambda: {
        "run": job.run | {"recovery": watch.saved(), "phases": curriculum.saved(data.phases)},
        "losses": losses(),
        "rotate": not watch.in_doubt,  # it may have to go back to one of those that are there
    }
    held_out = lambda step: validation.held_out(config, job.corpus, job.mesh, weights(state), step, log)
    on_tasks = lambda step: validation.on_tasks(config, job.tasks, job.corpus.tokenizer, weights(state), step, log)

    def done(step: int) -> tuple[int, int]:
        """The tokens, and the FLOPs of the model, in the steps up to this one."""
        tokens = flops = 0
        for phase, first, stop in curriculum.parts(data.phases, 0, skipped_batches.batch_index(watch.ledger, step)):
            number = skipped_batches.steps_within(watch.ledger, step, first, stop) * phase.batch_size * phase.seq_len
            tokens, flops = tokens + number, flops + number * config.model.flops_per_token(vocab_size, phase.seq_len)
        return tokens, flops

    with (
        progress.progress("training", config.num_steps, start, plain_seconds=0) as bar,
        metrics.Log(folder, bar, start, watch, config.log_every, done, peak, job.tracker) as log,
        ExitStack() as trace,
    ):
        if started:
            log.starting(*started)
        try:
            # What is due after a step comes before the next one, so that a run killed in between makes up for it:
            # first the save, then the evaluation.
            for step in range(start, config.num_steps):
                heartbeat.reached(step)
                if step and due(step, config.eval_every) and step not in log.losses:
                    with log.paused():
                        held_out(step)
                        if retention.best(losses(), log.losses) == step != saved and not watch.in_doubt:
                            with heartbeat.phase("saving"):
                                checkpoints.save(saved := step, state, **said())
                if step and due(step, config.tasks.every):
                    with log.paused():
                        on_tasks(step)
                if step in log.losses and early_stopping.over(config.stopping, log.losses):
                    bar.print(f"step {step}: {early_stopping.reason(config.stopping)}; the run ends")
                    last = step
                    break
                if step in traced[:1]:
                    with log.paused(), heartbeat.phase("tracing"):
                        trace.enter_context(profiling.trace(folder / "profile"))
                step_fn = steps[data.phase(skipped_batches.batch_index(watch.ledger, step)).shape]
                checked = due(step + 1, config.recovery.sdc_check_every)
                advance = functools.partial(sdc.twice, step_fn) if checked else step_fn
                # A hidden transfer would wait for the device at each step.
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1), jax.transfer_guard("disallow"):
                    batch = next(batches)
                    preemption.tick()
                    with heartbeat.waiting():
                        state, step_metrics = advance(state, batch)
                log.push(step + 1, step_metrics)
                if step in traced[-1:]:
                    with log.paused(), heartbeat.phase("tracing"):
                        trace.close()
                if step + 1 == last or due(step + 1, config.checkpoint_every) or checkpoints.failed(step + 1):
                    with log.paused(), heartbeat.phase("saving"):  # from here on the watch has seen all losses
                        if step + 1 == last or not watch.in_doubt:
                            checkpoints.save(saved := step + 1, state, **said())
                        else:
                            bar.print(f"step {step + 1} is not saved, since the run may have to go back to before it")
                log.saved(checkpoints.saved())
            if saved < last:  # it ends early
                with log.paused(), heartbeat.phase("saving"):
                    checkpoints.save(saved := last, state, **said())
            evaluation = held_out(last)
            on_tasks(last)
            with heartbeat.phase("saving"):
                checkpoints.insist(last, state, **said())
            preemption.tick()  # before the samples, when everything is saved
        except Preempted as stop:
            done = int(state.step)
            with log.paused(), heartbeat.phase("saving"):
                if done > saved:
                    checkpoints.save(done, state, **said())
                checkpoints.insist(done, state, **said())
            reached = f"step {done} is saved" if done else "no step was done"
            raise Preempted(f"{stop}: {reached}, and the same command goes on from there") from None
        finally:
            log.saved(checkpoints.saved())
    return weights(state), evaluation, log


def profiled(text: str, num_steps: int) -> range:
    """The steps of --profile_steps=A:B by the updates before each; of an empty text none. Raises: Refused."""
    if not text:
        return range(0)
    found = re.fullmatch("([0-9]{1,10}):([0-9]{1,10})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not first < last <= num_steps:
        raise Refused(
            f"--profile_steps={text} is no A:B with A below B and B at most num_steps={num_steps}: write for example "
            f"{max(num_steps - 3, 0)}:{num_steps}."
        )
    return range(first, last)


def train_batches(
    config: Config, data: stream.Stream, mesh: jax.sharding.Mesh, start: int, ledger: Sequence[dict] = ()
):
    """The batches of steps `start` to `num_steps`, read ahead in threads, on the mesh; all of `ledger` is before."""
    index = skipped_batches.batch_index(ledger, start)
    for phase, first, stop in curriculum.parts(data.phases, index, index + config.num_steps - start):
        layout = BatchLayout(mesh, phase.batch_size, config.grad_accum_steps)
        rows = local_rows(layout)
        for batch in stream.iterate(functools.partial(data.batch, rows=rows), first, stop):
            yield place(batch, rows, layout)
