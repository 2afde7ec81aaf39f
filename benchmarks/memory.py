"""Compares the compiler's memory of a train step with the memory that the process then takes, on a CPU.

    python -m benchmarks.memory [REMAT …]

Six layers of width 384, 32 sequences of 256, vocabulary 4,096, float32; each setting of `model.remat` in a process of
its own. Measured: the most that the process has in memory in three steps, less what it has before there is a state.
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from benchmarks import ours, peer
from gptjax.models.config import ModelConfig
from gptjax.parallel import batches
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.xla import analysis
from gptjax.training import step as train_step
from gptjax.training.config.schema import Config, resolve

SHAPE = peer.Shape(layers=6, heads=6, width=384, length=256, batch=32, vocab=4096)


def resident(process: int, what: str = "VmRSS") -> float:
    """Megabytes of a process in memory: `VmRSS` now, `VmHWM` at the most since that was reset (proc(5))."""
    status = pathlib.Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return 1.024e-3 * int(status.partition(f"{what}:")[2].split()[0])


def measure(remat: str) -> tuple[float, float]:
    """Megabytes of a train step, (as compiled, as measured)."""
    model = ModelConfig(num_layers=SHAPE.layers, num_heads=SHAPE.heads, embed_dim=SHAPE.width, remat=remat)
    config = resolve(Config(batch_size=SHAPE.batch, seq_len=SHAPE.length, model=model))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        init = jax.jit(functools.partial(train_step.init_state, config, SHAPE.vocab)).lower().compile()
        step = train_step.compile_step(config, SHAPE.vocab, train_step.abstract_state(config, SHAPE.vocab, mesh), mesh)
        batch = batches.place(ours.batch(SHAPE), np.arange(SHAPE.batch), batches.BatchLayout(mesh, SHAPE.batch))
        before = resident(os.getpid())
        state = init()
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        for _ in range(3):
            state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()
        return analysis.memory(step).peak / 1e6, resident(os.getpid(), "VmHWM") - before


def main():
    if sys.argv[1:2] == ["--measure"]:
        print(*measure(sys.argv[2]))
        return
    print(f"{'model.remat':32}{'compiled, MB':>14}{'measured, MB':>14}{'ratio':>8}")
    for remat in sys.argv[1:] or ["none", "dots", "full", "full,context=save"]:
        command = [sys.executable, "-m", "benchmarks.memory", "--measure", remat]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        predicted, measured = map(float, said.split())
        print(f"{remat:32}{predicted:14,.0f}{measured:14,.0f}{measured / predicted:8.2f}", flush=True)


if __name__ == "__main__":
    main()
