"""What a run tells: throughput, utilization, and where the numbers go (terminal, metrics.jsonl, TensorBoard)."""

import contextlib
import json
import math
import time

import jax
from etils import epath
from tensorboardX import SummaryWriter

# Dense bfloat16 FLOP/s of one device as JAX counts devices, by `device_kind`. TPUs: Google Cloud's "System
# architecture" page of each version; NVIDIA: the data sheet of each card, without sparsity.
PEAK_BF16_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(devices, dtype: str) -> float | None:
    """FLOP/s of all the devices together; None where it is not known, and for other dtypes than bfloat16."""
    peak = PEAK_BF16_FLOPS.get(devices[0].device_kind) if dtype == "bfloat16" else None
    return peak and peak * len(devices)


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
        self._main = jax.process_index() == 0
        path = workdir / "metrics.jsonl"
        rows = rows_until(path, start)
        self.evaluated = {row["step"] for row in rows if "eval_loss" in row}
        if self._main:
            beside = workdir / "metrics.jsonl.partial"
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
            beside.replace(path)
            self._rows = path.open("a")
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def push(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a step just dispatched; waits for the step before it, and writes its row if due."""
        self._flush()
        self._pending = step, metrics

    @contextlib.contextmanager
    def paused(self):
        """Around what is not training: the last step is finished first, and the time does not count as a step's."""
        self._flush()
        before = time.perf_counter()
        if self._main:
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
        self._steps += 1
        if step % self._log_every == 0 and self._main:
            self._step(step, jax.device_get(metrics))

    def _step(self, step: int, metrics: dict) -> None:
        now = time.perf_counter()
        seconds = (now - self._began) / self._steps
        self._began, self._steps = now, 0
        speed = self._tokens_per_step / seconds
        mfu = speed * self._flops_per_token / self._peak if self._peak else None
        row = {"step": step} | {name: float(metrics[name]) for name in ("loss", "learning_rate", "grad_norm")}
        row |= {"tokens_seen": step * self._tokens_per_step, "tokens_per_second": speed, "step_seconds": seconds}
        self._write(row | {"mfu": mfu})
        shown = "unknown" if mfu is None else f"{mfu:.1%}"
        self._bar.update(step, f"loss {row['loss']:.4f} · {speed:,.0f} tokens/s · MFU {shown}")

    def evaluation(self, step: int, result) -> None:
        """Writes the row of an `evaluate.Evaluation`."""
        if self._main:
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
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._flush()
        if self._main:
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
