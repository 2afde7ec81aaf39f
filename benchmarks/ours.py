"""gptjax's own train step as a side of `peer.compare`."""

import functools

import jax
import numpy as np

from benchmarks import peer
from gptjax.data.batch import Batch
from gptjax.models.config import ModelConfig
from gptjax.models.loss import LossConfig
from gptjax.parallel import batches
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.training import step as train_step
from gptjax.training.config.schema import Config, resolve
from gptjax.training.optim.config import OptimizerConfig


def batch(shape: peer.Shape) -> Batch:
    tokens = peer.tokens(shape)
    positions = np.tile(np.arange(shape.length, dtype=np.int32), (shape.batch, 1))
    weights = np.ones(positions.shape, np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones_like(positions), weights)


def build(shape: peer.Shape, biases: bool):
    """(parameters, step) of a GPT-2: learned positions, LayerNorm, tanh GELU, tied embedding."""
    config = resolve(Config(
        batch_size=shape.batch, seq_len=shape.length,
        model=ModelConfig(
            num_layers=shape.layers, num_heads=shape.heads, embed_dim=shape.width, scan_unroll=shape.layers,
            biases=biases,
        ),
        loss=LossConfig(num_chunks=2),  # each more adds to the gradient of the whole table once more
        optimizer=OptimizerConfig(
            peak_learning_rate=peer.RATE, schedule="constant", warmup_steps=0, beta1=peer.BETA1, beta2=peer.BETA2,
            weight_decay=peer.DECAY, clip_norm=peer.CLIP,
        ),
    ))  # fmt: skip
    mesh = make_mesh(MeshConfig(), jax.devices())
    jax.set_mesh(mesh)
    state = jax.jit(functools.partial(train_step.init_state, config, shape.vocab))()
    data = batches.place(batch(shape), np.arange(shape.batch), batches.BatchLayout(mesh, shape.batch))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.model))

    def step():
        nonlocal state
        state, metrics = train_step.train_step(state, data, config=config, vocab_size=shape.vocab)
        return metrics["loss"]

    return parameters, step


def main():
    args = peer.arguments(__doc__)
    args.add_argument("--biases", action="store_true")
    args = args.parse_args()
    peer.serve(lambda: build(peer.SHAPES[args.shape], args.biases))


if __name__ == "__main__":
    main()
