"""`gptjax bench`: measures a config's train step on synthetic data, on the devices of this machine."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data.batch import Batch
from gptjax.errors import Refused
from gptjax.models import build
from gptjax.models.objective import batch_sums
from gptjax.parallel import batches, hardware
from gptjax.parallel.mesh import devices, make_mesh, sizes
from gptjax.parallel.xla import analysis
from gptjax.runtime import profiling
from gptjax.tokenizers import tokenizer
from gptjax.training.config import schema
from gptjax.training.config.schema import Config
from gptjax.training.step import compile_step, init_state, optimize, weights

WARMUP = 2


def bench(config: Config, steps: int) -> dict:
    """Measures `steps` train steps after two warm-up steps. Raises: Refused.

    For a curriculum, this is the largest phase. The breakdown comes from separate programs: the loss alone gives the
    forward pass, and the optimizer runs on zeros. The rest of the step counts as the backward pass, which includes the
    compiler's gain from one program.
    """
    if steps < 1:
        raise Refused(f"--steps={steps} must be at least 1.")
    tokenizer.check(config.tokenizer)
    config = config.largest
    mesh = make_mesh(config.mesh, devices())
    schema.check_batch(config, mesh)
    vocab_size = tokenizer.expected_vocab_size(config.tokenizer)
    build.check_divides(config.model, vocab_size, config.seq_len, mesh)

    @jax.jit
    def loss(model, batch):
        def add(total, micro):
            sums = batch_sums(model, micro, None, vocab_size=vocab_size, loss=config.loss)
            return total + sums.objective, None

        return jax.lax.scan(add, jnp.zeros(()), batch, unroll=config.grad_accum_steps == 1)[0]

    @jax.jit
    def optimizer(gradient, finite, state):
        return optimize(gradient, finite, state, config)

    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config, vocab_size))()
        batch = synthetic(config, vocab_size, mesh)
        with profiling.compiling() as facts:
            step = compile_step(config, vocab_size, state, mesh)
        times = []
        for _ in range(WARMUP + steps):
            started = time.perf_counter()
            state, step_metrics = step(state, batch)
            jax.block_until_ready(step_metrics)
            times.append(time.perf_counter() - started)
        measured = profiling.measured_bytes()  # before the separate programs, which hold more at once
        forward = seconds(loss, weights(state), batch, steps=steps)
        zeros = jax.tree.map(lambda weight: jnp.zeros_like(weight, jnp.float32), state.model)
        optimizer_seconds = seconds(optimizer, zeros, jnp.array(True), state, steps=steps)
    whole = statistics.median(times[WARMUP:])
    tokens = config.batch_size * config.seq_len
    flops = config.model.flops_per_token(vocab_size, config.seq_len) * tokens
    peak = hardware.peak_flops(mesh.devices.ravel(), config.model.dtype)
    return {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "mesh": sizes(mesh),
        "parameters": config.model.num_parameters(vocab_size, config.seq_len).total,
        "steps": steps,
        "step_seconds": whole,
        "fastest_step_seconds": min(times[WARMUP:]),
        "tokens_per_second": tokens / whole,
        "flops_per_step": flops,
        "mfu": flops / whole / peak if peak else None,
        "forward_seconds": forward,
        "backward_seconds": whole - forward - optimizer_seconds,
        "optimizer_seconds": optimizer_seconds,
        "hbm_bytes": analysis.memory(step).peak,
        "measured_peak_bytes": measured,
        "loss": float(step_metrics["loss"]),
    } | facts


def synthetic(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> Batch:
    """Makes one batch of random tokens, each row one document."""
    layout = batches.BatchLayout(mesh, config.batch_size, config.grad_accum_steps)
    rows = batches.local_rows(layout)
    shape = len(rows), config.seq_len
    tokens = np.random.default_rng(0).integers(0, vocab_size, (len(rows), config.seq_len + 1), np.int32)
    positions = np.broadcast_to(np.arange(config.seq_len, dtype=np.int32), shape)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones(shape, np.int32), np.ones(shape, np.float32))
    return batches.place(batch, rows, layout)


def seconds(function, *arguments, steps: int) -> float:
    """Returns the median seconds of `steps` calls, after the calls that compile and warm up."""
    times = []
    for _ in range(WARMUP + steps):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARMUP:])


def text(result: dict) -> str:
    """Formats a result for a terminal."""
    mfu = "unknown" if result["mfu"] is None else f"{result['mfu']:.1%}"
    measured = result["measured_peak_bytes"]
    parts = {name: result[f"{name}_seconds"] for name in ("forward", "backward", "optimizer")}
    shares = ", ".join(f"{name} {part / result['step_seconds']:.0%}" for name, part in parts.items())
    return "\n".join(
        (
            f"{result['parameters'] / 1e6:.2f}M parameters on {result['devices']} × {result['device']}",
            f"step        {result['step_seconds'] * 1e3:,.2f} ms, median of {result['steps']} "
            f"(fastest {result['fastest_step_seconds'] * 1e3:,.2f} ms)",
            f"speed       {result['tokens_per_second']:,.0f} tokens/s · MFU {mfu}",
            f"breakdown   {shares}; by separate programs",
            f"memory      {result['hbm_bytes'] / 1e6:,.1f} MB a device as compiled, "
            f"{'not measured here' if measured is None else f'{measured / 1e6:,.1f} MB at most as measured'}",
            f"compiled in {result['compile_seconds']:.1f} s (cache: {result['compilation_cache']})",
        )
    )
