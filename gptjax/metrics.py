"""What a run tells: throughput, utilization, and where the numbers go (terminal, metrics.jsonl, TensorBoard)."""

import collections
import contextlib
import json
import math
import pathlib
import tempfile
import time

import jax
from etils import epath
from tensorboardX import SummaryWriter

from gptjax import hosts

# Dense bfloat16 FLOP/s of one device as JAX counts devices, by `device_kind`. TPUs: Google Cloud's "System
# architecture" page of each version (a TPU7x chip of 2307 TFLOP/s is two devices); NVIDIA: the data sheet of each card,
# which gives twice these figures, with sparsity.
PEAK_BF16_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_flops(devices, dtype: str) -> float | None:
    """FLOP/s of all the devices together; None where it is not known, and for other dtypes than bfloat16."""
    peak = PEAK_BF16_FLOPS.get(devices[0].device_kind) if dtype == "bfloat16" else None
    return peak and peak * len(devices)


@contextlib.contextmanager
def compiling():
    """Around a compilation. Yields a dict that has compile_seconds and compilation_cache at the end of the block.

    The cache is JAX's persistent one: `hit`, `miss`, or `off`.
    """
    events, facts, began = collections.Counter(), {}, time.perf_counter()
    count = lambda event, **_: events.update([event.rpartition("/")[2]])
    jax.monitoring.register_event_listener(count)
    try:
        yield facts
    finally:
        jax.monitoring.unregister_event_listener(count)
    asked, hits = events["compile_requests_use_cache"], events["cache_hits"]
    facts["compile_seconds"] = time.perf_counter() - began
    used = asked and jax.config.jax_compilation_cache_dir
    facts["compilation_cache"] = "off" if not used else "hit" if hits == asked else "miss"


def measured_bytes() -> int | None:
    """The most that has been in use on one of this process's devices; None where the platform does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)


@contextlib.contextmanager
def trace(folder: epath.Path):
    """Records what process 0 and its devices do in the block, for XProf or TensorBoard, into `folder`."""
    if not hosts.first():
        yield
        return
    with tempfile.TemporaryDirectory() as local:  # the profiler knows no gs://
        with jax.profiler.trace(local):
            yield
        for file in filter(pathlib.Path.is_file, pathlib.Path(local).rglob("*")):
            target = folder / file.relative_to(local)
            target.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(file).copy(target)


class Log:
    """One row a logged step, written one step late, so that the device always has the next step to do."""

    def __init__(
        self,
        workdir: epath.Path,
        bar,
        start: int,
        log_every: int,
        tokens_per_step: int,
        flops_per_token: int,
        peak: float | None,
    ):
        self._bar, self._log_every = bar, log_every
        self._tokens_per_step, self._flops_per_token, self._peak = tokens_per_step, flops_per_token, peak
        self._pending = None
        self._began, self._steps = time.perf_counter(), 0
        self._start, self._starting = start, None
        self.step_seconds = []  # of the logged steps
        path = workdir / "metrics.jsonl"
        rows = rows_until(path, start) if hosts.first() else []
        self.evaluated = set(hosts.exchange([row["step"] for row in rows if "eval_loss" in row])[0])
        if hosts.first():
            beside = workdir / "metrics.jsonl.partial"
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
            beside.replace(path)
            self._rows = path.open("a")
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def starting(self, began: float, facts: dict) -> None:
        """Has the row of this start written once its first step is done: `facts`, and the seconds since `began`."""
        self._starting = began, facts

    def push(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a step just dispatched; waits for the step before it, and writes its row if due."""
        self._flush()
        self._pending = step, metrics

    @contextlib.contextmanager
    def paused(self):
        """Around what is not training: the last step is finished first, and the time does not count as a step's."""
        self._flush()
        before = time.perf_counter()
        if hosts.first():
            self._board.flush()
        yield
        self._began += time.perf_counter() - before

    def _flush(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        loss = float(jax.device_get(metrics["loss"]))  # waits for the step
        if not math.isfinite(loss):  # before a save can replace a good checkpoint
            raise FloatingPointError(
                f"The loss of step {step} is {loss}: the checkpoints before it are kept; lower "
                "optimizer.peak_learning_rate, or raise optimizer.warmup_steps."
            )
        if self._starting and hosts.first():
            began, facts = self._starting
            seconds = time.perf_counter() - began
            self._write({"step": self._start} | facts | {"first_step_seconds": seconds})
            self._bar.print(f"the first step was done {seconds:.1f} s after the start")
        self._starting = None
        self._steps += 1
        if step % self._log_every == 0 and hosts.first():
            self._step(step, jax.device_get(metrics))

    def _step(self, step: int, metrics: dict) -> None:
        now = time.perf_counter()
        seconds = (now - self._began) / self._steps
        self._began, self._steps = now, 0
        self.step_seconds.append(seconds)
        speed = self._tokens_per_step / seconds
        mfu = speed * self._flops_per_token / self._peak if self._peak else None
        row = {"step": step} | {name: float(metrics[name]) for name in ("loss", "learning_rate", "grad_norm")}
        row |= {"tokens_seen": step * self._tokens_per_step, "tokens_per_second": speed, "step_seconds": seconds}
        self._write(row | {"mfu": mfu})
        shown = "unknown" if mfu is None else f"{mfu:.1%}"
        self._bar.update(step, f"loss {row['loss']:.4f} · {speed:,.0f} tokens/s · MFU {shown}")

    def evaluation(self, step: int, result) -> None:
        """Writes the row of an `evaluate.Evaluation`."""
        if hosts.first():
            self._write(
                {
                    "step": step,
                    "eval_loss": result.loss,
                    "eval_bits_per_byte": result.bits_per_byte,
                    "eval_accuracy": result.accuracy,
                }
            )
            self._bar.print(
                f"step {step}: held-out loss {result.loss:.4f} nats a token, {result.bits_per_byte:.4f} "
                f"bits a byte, accuracy {result.accuracy:.1%}"
            )

    def _write(self, row: dict) -> None:
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._flush()
        if hosts.first():
            self._rows.close()
            self._board.close()


def rows_until(path: epath.Path, start: int) -> list[dict]:
    """The rows of metrics.jsonl up to step `start`: a run that goes on from there writes the later ones again.

    A last line that a kill cut short is dropped with them.
    """
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if row["step"] <= start]
