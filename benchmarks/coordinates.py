"""The coordinate check of the maximal-update parametrization: the size of activations over widths, as training begins.

    python -m benchmarks.coordinates [--widths=128,256,512,1024,2048] [--picture=docs/images/coordinates.png]

In the standard parametrization what blocks put into the stream, and how far an update moves the logits, grow with the
width at one learning rate; in the maximal-update one they don't (Yang et al. 2022, "Tensor Programs V", appendix D.1).
"""

import argparse
import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gptjax.data.batch import Batch
from gptjax.models.attention import attention
from gptjax.models.config import ModelConfig
from gptjax.models.transformer import Transformer
from gptjax.parallel import batches, mesh
from gptjax.training import step as train_step
from gptjax.training.config import schema
from gptjax.training.config.schema import Config
from gptjax.training.optim.config import OptimizerConfig

BASE, HEAD_DIM, VOCAB, STEPS = 64, 32, 128, 4
PLACES = ("embedding", "attention_out", "mlp_out", "stream", "logits_change")
MODEL = ModelConfig(num_layers=2, norm="rmsnorm", positions="rope", biases=False)


def config_of(width: int, mup: bool, model: ModelConfig = MODEL, more_heads: bool = True, **optimizer) -> Config:
    """A model of a width, which has more heads or larger ones than that of the base width."""
    heads = width // HEAD_DIM if more_heads else BASE // HEAD_DIM
    model = dataclasses.replace(model, embed_dim=width, num_heads=heads)
    if model.num_kv_heads:
        model = dataclasses.replace(model, num_kv_heads=heads // 2)
    if mup:
        model = dataclasses.replace(model, mup_base_width=BASE, mup_base_head_dim=HEAD_DIM)
    rate = OptimizerConfig(**{"peak_learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0} | optimizer)
    return schema.resolve(Config(num_steps=STEPS, batch_size=8, seq_len=32, model=model, optimizer=rate))


def batch_of(config: Config) -> Batch:
    """Random text, the same at every step: the model learns it by heart."""
    shape = 1, config.batch_size, config.seq_len
    ids = np.random.default_rng(0).integers(0, VOCAB, (shape[1], shape[2] + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape)

    def place(array):
        return jax.device_put(array, batches.batch_sharding(jax.sharding.get_mesh()))

    whole = ids[None, :, :-1], positions, np.zeros(shape, np.int32), ids[None, :, 1:], np.ones(shape, np.float32)
    return Batch(
        **{
            name: place(array)
            for name, array in zip(("inputs", "positions", "segments", "targets", "weights"), whole, strict=False)
        }
    )


@jax.jit
def activations(model: Transformer, batch: Batch) -> dict[str, jax.Array]:
    """Returns the activations of the last block and the logits of all positions, by the model's own functions."""
    c, (inputs, positions, segments) = model.config, (batch.inputs[0], batch.positions[0], batch.segments[0])

    def attend(q, k, v):
        return attention(q, k, v, segments, c.sliding_window)

    rotation = model.rotation(positions)
    found = {"embedding": (x := model.embed(inputs, positions, "act_stream"))}
    for index in range(c.num_layers):
        block = jax.tree.map(operator.itemgetter(index), model.blocks)
        silent = jax.tree.map(lambda weight: weight, block)  # a copy, whose MLP adds nothing
        silent.down = jax.tree.map(jnp.zeros_like, block.down)
        silent.down_bias = jax.tree.map(jnp.zeros_like, block.down_bias)
        half, _ = silent(x, rotation, None, attend, "act_stream")
        found["attention_out"], before = half - x, half
        x, _ = block(x, rotation, None, attend, "act_stream")
        found["mlp_out"] = x - before
    found["stream"] = x
    found["logits_change"] = jnp.einsum("BTD,VD->BTV", model.last(x), model.output().table[...])
    return found


def sizes(config: Config) -> np.ndarray:
    """Root mean squares, [steps + 1, places], before the first update and after each."""
    with jax.set_mesh(mesh.make_mesh(mesh.MeshConfig(), jax.devices()[:1])):
        batch = batch_of(config)
        state = jax.jit(lambda: train_step.init_state(config, VOCAB))()
        rows, first = [], None
        for step in range(STEPS + 1):
            found = activations(state.model, batch)
            first = found["logits_change"] if first is None else first
            found["logits_change"] -= first
            rows.append([float(jnp.sqrt(jnp.square(found[place]).mean())) for place in PLACES])
            if step < STEPS:
                state, _ = train_step.train_step(state, batch, config=config, vocab_size=VOCAB)
    return np.array(rows)


def slopes(widths, found: np.ndarray) -> dict[str, float]:
    """Fits the slope of log size over log width by place, after the last step. found: [widths, steps + 1, places]."""
    line = np.polyfit(np.log(widths), np.log(found[:, -1]), 1)[0]
    return dict(zip(PLACES, line.round(3).tolist(), strict=False))


def draw(widths, by_name: dict[str, np.ndarray], path: str) -> None:
    figure = Figure(figsize=(13, 5.2), dpi=90, facecolor="white", layout="constrained")
    panels = figure.subplots(len(by_name), len(PLACES), sharex=True)
    for row, (name, found) in zip(panels, by_name.items(), strict=False):
        for panel, place, values in zip(row, PLACES, np.moveaxis(found, 2, 0), strict=False):
            for step in range(1 if place == "logits_change" else 0, STEPS + 1):
                panel.loglog(widths, values[:, step], "o-", ms=3, color=(0.2, 0.75 - 0.15 * step, 0.85 - 0.1 * step))
            shown = np.moveaxis(np.stack(list(by_name.values())), 3, 0)[PLACES.index(place)]
            shown = shown[shown > 0]
            panel.set_ylim(shown.min() / 1.5, shown.max() * 1.5)  # the same above and below
            slope = np.polyfit(np.log(widths), np.log(values[:, -1]), 1)[0]
            panel.set_title(f"{place.replace('_', ' ')}: slope {slope:+.2f}", fontsize=10, loc="left")
            panel.set_xticks(widths, [str(width) for width in widths])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(name)
    figure.suptitle(
        f"Root mean squares over widths, at the start (lightest) and after 1 to {STEPS} updates", x=0.01, ha="left"
    )
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", default="128,256,512,1024,2048")
    parser.add_argument("--picture", default="")
    args = parser.parse_args()
    widths = [int(width) for width in args.widths.split(",")]
    by_name = {}
    for name, mup in (("standard", False), ("maximal update", True)):
        by_name[name] = np.stack([sizes(config_of(width, mup)) for width in widths])
        print(name, slopes(widths, by_name[name]), flush=True)
    if args.picture:
        draw(widths, by_name, args.picture)


if __name__ == "__main__":
    main()
