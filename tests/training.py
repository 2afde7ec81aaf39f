"""Runs of the real train step on a chosen mesh, for the tests that compare losses."""

import jax

from gptjax import sharding, train
from gptjax.config import Config, resolve
from gptjax.models.transformer import ModelConfig
from gptjax.optimizer import OptimizerConfig
from gptjax.tokenizer import TokenizerConfig

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


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    data, fsdp, tensor = shape
    return sharding.make_mesh(sharding.MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def run(config: Config, store, mesh: jax.sharding.Mesh, steps: int, state=None, start: int = 0):
    """(state, losses) of steps start … start + steps - 1, by the loop's own functions."""
    vocab_size = store.tokenizer.vocab_size
    with jax.set_mesh(mesh):
        if state is None:
            state = jax.jit(lambda: train.init_state(config, vocab_size))()
        losses = []
        batches = train.train_batches(config, store, mesh, start)
        for _ in range(steps):
            state, metrics = train.train_step(state, next(batches), config=config, vocab_size=vocab_size)
            losses.append(float(metrics["loss"]))
    return state, losses
