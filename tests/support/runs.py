"""Runs of the real train step on a chosen mesh, for the tests that compare losses."""

import hashlib

import jax
import numpy as np

from gptjax.data.sources.documents import DataConfig
from gptjax.data.stream.mixture import Corpus
from gptjax.data.stream.stream import Stream
from gptjax.models.config import ModelConfig
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.tokenizers.tokenizer import TokenizerConfig
from gptjax.training import loop
from gptjax.training import step as update
from gptjax.training.config.schema import Config, resolve
from gptjax.training.optim.config import OptimizerConfig

GPT2 = ModelConfig(num_layers=2, num_heads=8, embed_dim=64, dropout=0.1)
LLAMA = ModelConfig(
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    embed_dim=64,
    mlp_dim=128,
    norm="rmsnorm",
    positions="rope",
    activation="swiglu",
    biases=False,
    tied_embeddings=False,
    qk_norm=True,
    logits_softcap=15.0,
)


def tiny(model: ModelConfig = GPT2, **changes) -> Config:
    values = dict(
        num_steps=20,
        batch_size=8,
        seq_len=32,
        model=model,
        tokenizer=TokenizerConfig(kind="byte"),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=4),
    )
    return resolve(Config(**(values | changes)))


def small(corpus, **changes) -> Config:
    """A run of six steps on the mesh (2, 2, 2) with two saves and two evaluations."""
    values = dict(
        num_steps=6,
        log_every=2,
        eval_every=3,
        eval_batches=2,
        checkpoint_every=2,
        num_samples=2,
        data=DataConfig(source="text", path=str(corpus), heldout_fraction=0.3),
        mesh=MeshConfig(2, 2, 2),
        model=ModelConfig(num_layers=2, num_heads=4, embed_dim=32),
    )
    return tiny(**(values | changes))


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    data, fsdp, tensor = shape
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def data_of(config: Config, store) -> Stream:
    """What a run of a config reads from one store."""
    return Stream(Corpus({"": store}), config.phases, config.seq_len, config.seed, config.packing, config.augment)


def run(config: Config, store, mesh: jax.sharding.Mesh, steps: int, state=None, start: int = 0, ledger=()):
    """(state, losses) of steps start … start + steps - 1, by the loop's own functions."""
    vocab_size = store.tokenizer.vocab_size
    with jax.set_mesh(mesh):
        if state is None:
            state = jax.jit(lambda: update.init_state(config, vocab_size))()
        losses = []
        batches = loop.train_batches(config, data_of(config, store), mesh, start, ledger)
        for _ in range(steps):
            state, metrics = update.train_step(state, next(batches), config=config, vocab_size=vocab_size)
            losses.append(float(metrics["loss"]))
    return state, losses


def row_hashes(batch) -> dict[int, str]:
    """Of a step's batch as it lies on this process's devices: {row of the global batch: hash of all its tokens}."""
    found = {}
    row_of = np.arange(np.prod(batch.inputs.shape[:2])).reshape(batch.inputs.shape[:2])
    for shards in zip(*(array.addressable_shards for array in batch), strict=True):
        fields = jax.device_get([shard.data for shard in shards])
        for place, row in np.ndenumerate(row_of[shards[0].index[:2]]):
            row_hash = hashlib.sha256(b"".join(field[place].tobytes() for field in fields)).hexdigest()
            assert found.setdefault(int(row), row_hash) == row_hash, f"row {row} differs between devices"
    return found


def recorded(function, record):
    """`train.train_batches` that also calls `record` with the step and the `row_hashes` of every batch."""

    def train_batches(config, data, mesh, start, ledger):
        for step, batch in enumerate(function(config, data, mesh, start, ledger), start):
            record(step, row_hashes(batch))
            yield batch

    return train_batches
