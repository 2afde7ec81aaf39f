"""Draws the loss curve of a run beside what gzip and xz reach, from its workdir alone.

pip install matplotlib
python -m benchmarks.loss_curve runs/quickstart loss.png
"""

import json
import math
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(workdir: str, picture: str) -> None:
    folder = pathlib.Path(workdir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / "store" / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    bits = train["tokens"] / train["bytes"] / math.log(2)  # of nats a token → bits a byte, on the training text
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        [r["step"] for r in steps], [r["loss"] * bits for r in steps], color="#9db8d9", lw=1, label="training batches"
    )
    axes.plot(
        [r["step"] for r in held_out],
        [r["eval_bits_per_byte"] for r in held_out],
        "o-",
        color="#1f4e8c",
        lw=2,
        label="held-out files",
    )
    for name, color in (("gzip", "#b8860b"), ("xz", "#a0522d")):
        value = 8 * manifest[f"{name}_bytes"] / manifest["compressed_heldout_bytes"]
        axes.axhline(value, color=color, ls="--", lw=1)
        axes.text(steps[-1]["step"], value, f"{name} -9: {value:.2f} ", color=color, ha="right", va="bottom")
    last = held_out[-1]
    axes.annotate(
        f"{last['eval_bits_per_byte']:.2f}",
        (last["step"], last["eval_bits_per_byte"]),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
        color="#1f4e8c",
        weight="bold",
    )
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 3), xlim=(0, steps[-1]["step"] * 1.01))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False, bbox_to_anchor=(1, 0.98))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
