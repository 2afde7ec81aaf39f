"""Held-out loss against wall time: the quickstart's recipe beside a GPT-2-style one with AdamW.

    pip install matplotlib
    python -m benchmarks.time_to_loss [--seconds=150] [--picture=docs/images/time_to_loss.png]

Both train on the quickstart's data with the same batches, in one process, a block of steps of one and then of the
other, so that other load falls on both; the clock of each runs in its own blocks alone, and neither compilation nor
evaluation is on it. First the time of a step is measured, for each recipe to plan its schedule for the same
`--seconds`. Then the AdamW recipe's peak learning rate is chosen: of PEAKS the one that ends lowest after a fifth of
the steps. What is printed is when the quickstart's recipe passes the loss at which the other ends, as a share of the
other's whole time. About ten minutes on two cores; `--seconds=20` for a look. A JSON file with the curves is written
beside the picture.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import matplotlib
from etils import epath

from gptjax.data.preparation.prepare import prepare
from gptjax.data.stream import stream
from gptjax.data.stream.mixture import Corpus
from gptjax.evaluation.heldout import evaluate
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.training import loop, step
from gptjax.training.config import files

matplotlib.use("Agg")
from matplotlib import pyplot as plt

QUICKSTART = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "quickstart.py")
# GPT-2 (Radford et al. 2019) with GPT-3's cosine to 10 % (Brown et al. 2020, appendix B), at the quickstart's size: the
# narrower MLP makes up for the table of positions.
GPT2 = {
    "model.norm": "layernorm", "model.positions": "learned", "model.activation": "gelu", "model.biases": "true",
    "model.qk_norm": "false", "model.mlp_dim": "480",
    "optimizer.name": "adamw", "optimizer.schedule": "cosine", "optimizer.final_fraction": "0.1",
}  # fmt: skip
PEAKS = ("0.002", "0.004", "0.008", "0.016")
BLOCKS = 25  # turns of each, and evaluations
WINDOWS = 256  # held-out sequences in an evaluation


class Run:
    """A recipe in training, with a clock of its own."""

    def __init__(self, overrides: dict[str, str], num_steps: int, store, mesh):
        overrides = {"num_steps": str(num_steps), **overrides}
        if "optimizer.schedule" in overrides:
            overrides["optimizer.warmup_steps"] = str(num_steps // 20)
        self.config = files.load(QUICKSTART, overrides)
        self.corpus, self.mesh, self.vocab_size = Corpus({"": store}), mesh, store.tokenizer.vocab_size
        self.parameters = self.config.model.num_parameters(self.vocab_size, self.config.seq_len).total
        self.state = jax.jit(functools.partial(step.init_state, self.config, self.vocab_size))()
        self.step = step.compile_step(self.config, self.vocab_size, self.state, mesh)
        data = stream.Stream(self.corpus, self.config.phases, self.config.seq_len, self.config.seed)
        self.batches = loop.train_batches(self.config, data, mesh, 0)
        self.seconds, self.steps, self.curve = 0.0, 0, []

    def train(self, steps: int) -> float:
        """Trains more steps; returns the seconds they took."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, next(self.batches))
        jax.block_until_ready(metrics)
        took = time.perf_counter() - began
        self.seconds, self.steps = self.seconds + took, self.steps + steps
        return took

    def evaluate(self) -> float:
        """Appends the held-out bits per byte to the curve and returns them."""
        held_out = evaluate(
            self.state.model,
            corpus=self.corpus,
            mesh=self.mesh,
            seq_len=self.config.seq_len,
            batch_size=self.config.batch_size,
            max_windows=WINDOWS,
            loss=self.config.loss,
        )
        self.curve.append((self.seconds, held_out.bits_per_byte))
        return held_out.bits_per_byte


def reached(curve: list[tuple[float, float]], target: float) -> float:
    """Returns when a curve of (seconds, bits) first falls to the target, by linear interpolation."""
    for (t0, y0), (t1, y1) in itertools.pairwise(curve):
        if y1 <= target:
            return t0 + (t1 - t0) * (y0 - target) / (y0 - y1)
    return float("inf")


def draw(ours: Run, other: Run, seconds: float, picture: pathlib.Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run, color, label in (
        (other, "#9db8d9", f"GPT-2-style, AdamW ({other.parameters / 1e6:.2f}M parameters)"),
        (ours, "#1f4e8c", f"quickstart ({ours.parameters / 1e6:.2f}M parameters)"),
    ):
        axes.plot(*zip(*run.curve, strict=False), "o-", color=color, lw=2, ms=4, label=label)
    end, target = other.curve[-1]
    axes.hlines(target, min(seconds, end), end, color="#a0522d", ls="--", lw=1)
    if seconds < end:
        axes.annotate(
            f"the same loss in {seconds / end:.2f} of the time",
            (seconds, target),
            xytext=(12, 5),
            textcoords="offset points",
            color="#a0522d",
        )
    axes.set(xlabel="seconds of training", ylabel="held-out bits per byte", xlim=(0, None))
    axes.set_ylim(top=other.curve[BLOCKS // 8][1], bottom=min(y for _, y in ours.curve + other.curve) - 0.05)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--seconds", type=float, default=150.0, help="that each recipe trains")
    args.add_argument("--picture", type=pathlib.Path, default=pathlib.Path("docs/images/time_to_loss.png"))
    args = args.parse_args()
    quickstart = files.load(QUICKSTART, {})
    store = prepare(quickstart.data, quickstart.tokenizer, epath.Path(tempfile.mkdtemp()) / "store")
    mesh = make_mesh(MeshConfig(), jax.devices())
    with jax.set_mesh(mesh):
        start = functools.partial(Run, store=store, mesh=mesh)

        trials = start({}, 1000), start(GPT2 | {"optimizer.peak_learning_rate": PEAKS[0]}, 1000)
        sizes = [trial.parameters for trial in trials]
        if abs(sizes[0] / sizes[1] - 1) > 0.02:
            sys.exit(f"The recipes have {sizes[0]:,} and {sizes[1]:,} parameters: more than 2 % apart.")
        rounds = [[trial.train(5) / 5 for trial in trials] for _ in range(9)][1:]
        step_seconds = [statistics.median(column) for column in zip(*rounds, strict=False)]
        num_steps = [BLOCKS * max(2, round(args.seconds / each / BLOCKS)) for each in step_seconds]
        print(f"parameters {sizes[0]:,} and {sizes[1]:,}; a step {step_seconds[0]:.3f} and {step_seconds[1]:.3f} s; "
              f"steps {num_steps[0]} and {num_steps[1]}", flush=True)  # fmt: skip

        tried = {}
        for peak in PEAKS:
            trial = start(GPT2 | {"optimizer.peak_learning_rate": peak}, max(20, num_steps[1] // 5))
            trial.train(trial.config.num_steps)
            tried[peak] = trial.evaluate()
            print(f"AdamW at {peak}: {tried[peak]:.3f} bits a byte after {trial.config.num_steps} steps", flush=True)
        peak = min(tried, key=tried.get)

        ours, other = start({}, num_steps[0]), start(GPT2 | {"optimizer.peak_learning_rate": peak}, num_steps[1])
        for run in (ours, other):
            run.evaluate()
        for block in range(BLOCKS):
            for run in (ours, other) if block % 2 else (other, ours):
                run.train(run.config.num_steps // BLOCKS)
                run.evaluate()
            print(" · ".join(f"{name} {run.seconds:.0f} s {run.curve[-1][1]:.3f}"
                             for name, run in (("quickstart", ours), ("AdamW", other))), flush=True)  # fmt: skip

    (end, target), seconds = other.curve[-1], reached(ours.curve, other.curve[-1][1])
    print(f"AdamW (peak {peak}) ends at {target:.3f} bits a byte after {end:.0f} s; the quickstart's recipe passes "
          f"that after {seconds:.0f} s, {seconds / end:.2f} of the time, and ends at {ours.curve[-1][1]:.3f} after "
          f"{ours.seconds:.0f} s")  # fmt: skip
    result = {"share": seconds / end, "step_seconds": step_seconds, "steps": num_steps, "parameters": sizes,
              "adamw_peaks": tried, "quickstart": ours.curve, "adamw": other.curve, "jax": jax.__version__}  # fmt: skip
    args.picture.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(ours, other, seconds, args.picture)


if __name__ == "__main__":
    main()
