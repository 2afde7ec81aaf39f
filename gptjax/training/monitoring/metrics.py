"""Logs a run: throughput, utilization, and one row per logged step and evaluation."""

import contextlib
import math
import time

import jax

from gptjax.runtime import distributed, heartbeat
from gptjax.training.monitoring import records
from gptjax.training.monitoring.rollback import Watch
from gptjax.training.monitoring.work import Work
from gptjax.training.monitoring.writers import Writers


def of_model(metrics: dict) -> dict:
    """The sums of the model in a row; for experts also the largest and smallest load, as multiples of an even load."""
    known = {"loss", "learning_rate", "grad_norm", "skipped", "expert_tokens"}
    row = {name: value.item() for name, value in metrics.items() if name not in known}
    if "expert_tokens" in metrics:
        tokens_LE = metrics["expert_tokens"]
        load_LE = tokens_LE / tokens_LE.mean(-1, keepdims=True)
        row |= {"expert_load_max": load_LE.max().item(), "expert_load_min": load_LE.min().item()}
        row |= {"expert_tokens": tokens_LE.sum(0).tolist()}
    return row


def _of_task(key: str) -> bool:
    return key.startswith("task/")


class Log:
    """Writes one row per logged step, one step late, so that the device always has the next step to compute.

    The log is a context manager: leaving the block without an exception writes the pending row.
    """

    def __init__(self, writers: Writers | None, bar, start: int, watch: Watch, log_every: int, work: Work):
        """Opens the log of the steps after `start`.

        Args:
          writers: the writers of the rows; None on all processes but the first.
          bar: shows the progress and prints messages.
          start: completed updates.
          watch: sees the loss and the gradient's norm of each step before anything else is done with them.
          log_every: steps from one row to the next.
          work: counts the tokens and FLOPs of the steps.
        """
        self._writers, self._bar, self._watch, self._log_every = writers, bar, watch, log_every
        self._work = work
        self._pending = None
        self._began, self._steps = time.perf_counter(), 0
        self._start, self._starting = start, None
        self._flops = 0  # of the last logged step
        self.step_seconds = []  # of the logged steps of as many FLOPs, which a curriculum changes
        self.floor_seconds = None  # of each of them, by its FLOPs at the peak, where that is known
        rows = writers.rows if writers else []
        self.losses = dict(distributed.exchange([*records.evaluations(rows).items()])[0])  # on held-out text, by step
        self.scored = set(distributed.exchange([row["step"] for row in rows if any(map(_of_task, row))])[0])  # on tasks

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        if kind is None:
            self._flush()
        if distributed.first():
            self._writers.close()

    def starting(self, began: float, facts: dict) -> None:
        """Schedules the row of this start: after the first step it gets `facts` and the seconds since `began`."""
        self._starting = began, facts

    def push(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a dispatched step; waits for the previous step and writes that step's row if due."""
        self._flush()
        self._pending = step, metrics

    @contextlib.contextmanager
    def paused(self):
        """Context manager for work that is not training: finishes the last step first, and stops the step clock."""
        self._flush()
        before = time.perf_counter()
        if distributed.first():
            self._writers.flush()
        yield
        self._began += time.perf_counter() - before

    def _flush(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        with heartbeat.waiting():
            loss, grad_norm = jax.device_get((metrics["loss"], metrics["grad_norm"]))  # waits for the step
        if message := self._watch.see(step, float(loss), float(grad_norm)):
            self._bar.print(message)
        if self._starting and distributed.first():
            began, facts = self._starting
            seconds = time.perf_counter() - began
            self._writers.write({"step": self._start} | facts | {"first_step_seconds": seconds})
            self._bar.print(f"the first step was done {seconds:.1f} s after the start")
        self._starting = None
        self._steps += 1
        if step % self._log_every == 0 and distributed.first():
            self._step(step, jax.device_get(metrics))

    def _step(self, step: int, metrics: dict) -> None:
        now = time.perf_counter()
        seconds, steps = (now - self._began) / self._steps, self._steps
        self._began, self._steps = now, 0
        tokens, flops = self._work.done(step)
        before = self._work.done(step - steps)
        speed = (tokens - before[0]) / (seconds * steps)
        each = (flops - before[1]) / steps
        if each != self._flops:
            self._flops, self.step_seconds = each, []
        self.step_seconds.append(seconds)
        self.floor_seconds = self._work.peak and each / self._work.peak
        mfu = self._work.peak and self.floor_seconds / seconds
        numbers = {name: float(metrics[name]) for name in ("loss", "learning_rate", "grad_norm")}
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        row |= {"skipped_updates": int(metrics["skipped"])} | of_model(metrics)
        row |= {"tokens_seen": tokens, "tokens_per_second": speed, "step_seconds": seconds}
        self._writers.write(row | {"mfu": mfu})
        shown = "" if mfu is None else f" · MFU {mfu:.1%}"
        self._bar.update(step, f"loss {numbers['loss']:.4f} · {speed:,.0f} tokens/s{shown}")

    def evaluation(self, step: int, result) -> None:
        """Writes the row of an `evaluate.Evaluation`."""
        self.losses[step] = result.loss
        row = {"eval_loss": result.loss, "eval_bits_per_byte": result.bits_per_byte, "eval_accuracy": result.accuracy}
        for name, source in result.sources.items():
            row |= {f"eval_loss/{name}": source.loss, f"eval_bits_per_byte/{name}": source.bits_per_byte}
            row |= {f"eval_accuracy/{name}": source.accuracy}
        each = "".join(
            f"; {name} {source.loss:.4f}, {source.bits_per_byte:.4f} bits a byte"
            for name, source in result.sources.items()
        )
        self._evaluation(
            step,
            row,
            f"step {step}: held-out loss {result.loss:.4f} nats a token, {result.bits_per_byte:.4f} "
            f"bits a byte, accuracy {result.accuracy:.1%}{each}",
        )

    def scores(self, step: int, results: dict[str, dict[str, float]]) -> None:
        """Writes a row with the metrics of each task, by task name."""
        self.scored.add(step)
        row = {f"task/{name}/{metric}": value for name, task in results.items() for metric, value in task.items()}
        each = (
            f"{name} " + ", ".join(f"{metric} {value:.4g}" for metric, value in task.items() if metric != "samples")
            for name, task in results.items()
        )
        self._evaluation(step, row, f"step {step}: {'; '.join(each)}")

    def failed_evaluation(self, step: int, error: Exception) -> None:
        """Writes a row with the reason why an evaluation failed."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        message = f"warning: step {step} could not be evaluated ({reason}); the run goes on"
        self._evaluation(step, {"eval_error": reason}, message)

    def _evaluation(self, step: int, row: dict, message: str) -> None:
        if distributed.first():
            self._writers.write({"step": step} | row)
            self._bar.print(message)

    def saved(self, saves: list) -> None:
        """Writes one row for each `async_save.Save`."""
        for save in saves if distributed.first() else ():
            row = {"step": save.step, "save_blocked_seconds": save.blocked_seconds, "save_seconds": save.seconds}
            self._writers.write(row)
