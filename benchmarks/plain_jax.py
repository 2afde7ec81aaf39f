"""The spine's train step against the same model written as plain JAX functions, with no framework.

    python -m benchmarks.plain_jax [--shape=W1|W2] [--rounds=20]

Same shapes, float32, AdamW, no dropout, one device. The plain model below keeps its layers as a Python list, unrolls
them in a Python loop and lets XLA differentiate a cross entropy over whole logits. The two are timed in turn, a few
steps each a round; what is printed is the median of the rounds' ratios.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax import sharding, train
from gptjax.config import Config, resolve
from gptjax.data.stream import Batch
from gptjax.models.transformer import ModelConfig
from gptjax.optimizer import OptimizerConfig
from gptjax.tokenizer import TokenizerConfig

SHAPES = {  # layers, heads, width, length, batch, vocabulary
    "W1": (6, 6, 384, 256, 8, 65),
    "W2": (12, 12, 768, 512, 2, 50304),
}
STEPS = 100


def plain(layers, heads, width, length, batch, vocab):
    """(state, step) of a GPT-2 in plain JAX: pre-norm, learned positions, tanh GELU, tied embedding, biases."""
    padded = -(-vocab // 128) * 128
    keys = iter(jax.random.split(jax.random.key(0), 6 * layers + 2))
    normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
    head = width // heads
    params = {
        "wte": normal(padded, width), "wpe": normal(length, width), "g": jnp.ones(width), "b": jnp.zeros(width),
        "blocks": [
            {
                "g1": jnp.ones(width), "b1": jnp.zeros(width), "g2": jnp.ones(width), "b2": jnp.zeros(width),
                "q": normal(width, heads, head), "k": normal(width, heads, head), "v": normal(width, heads, head),
                "o": normal(heads, head, width), "up": normal(width, 4 * width), "down": normal(4 * width, width),
                "qb": jnp.zeros((heads, head)), "kb": jnp.zeros((heads, head)), "vb": jnp.zeros((heads, head)),
                "ob": jnp.zeros(width), "ub": jnp.zeros(4 * width), "db": jnp.zeros(width),
            }
            for _ in range(layers)
        ],
    }  # fmt: skip

    def norm(x, g, b):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * g + b

    def attend(q, k, v, segments):
        outputs = []
        for start in range(0, length, 64):
            end = start + 64
            mask = jnp.arange(start, end)[:, None] >= jnp.arange(end)
            mask = mask & (segments[:, start:end, None] == segments[:, None, :end])
            scores = jnp.einsum("bthd,bshd->bhts", q[:, start:end] * head**-0.5, k[:, :end])
            weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30))
            outputs.append(jnp.einsum("bhts,bshd->bthd", weights, v[:, :end]))
        return jnp.concatenate(outputs, 1)

    def loss(params, data):
        x = params["wte"][data.inputs] + params["wpe"][data.positions]
        for p in params["blocks"]:
            h = norm(x, p["g1"], p["b1"])
            q, k, v = (jnp.einsum("btd,dhe->bthe", h, p[n]) + p[n + "b"] for n in "qkv")
            x = x + jnp.einsum("bthe,hed->btd", attend(q, k, v, data.segments), p["o"]) + p["ob"]
            h = norm(x, p["g2"], p["b2"])
            x = x + jax.nn.gelu(h @ p["up"] + p["ub"]) @ p["down"] + p["db"]
        logits = norm(x, params["g"], params["b"]) @ params["wte"].T
        logits = jnp.where(jnp.arange(padded) < vocab, logits, -jnp.inf)
        target = jnp.take_along_axis(logits, data.targets[..., None], -1)[..., 0]
        return ((jax.nn.logsumexp(logits, -1) - target) * data.weights).sum() / data.weights.sum()

    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    schedule = optax.warmup_cosine_decay_schedule(0, 1e-3, 10, STEPS, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=mask))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, data):
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, data)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return (params, optimizer.init(params)), step


def spine(layers, heads, width, length, batch, vocab):
    """(state, step) of the spine's own train step on the same shape."""
    config = resolve(Config(
        num_steps=STEPS, batch_size=batch, seq_len=length,
        model=ModelConfig(num_layers=layers, num_heads=heads, embed_dim=width, scan_unroll=layers),
        optimizer=OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=10),
        tokenizer=TokenizerConfig(kind="byte"),
    ))  # fmt: skip
    state = jax.jit(functools.partial(train.init_state, config, vocab))()
    return state, functools.partial(train.train_step, config=config, vocab_size=vocab)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--shape", choices=SHAPES, default="W1")
    args.add_argument("--rounds", type=int, default=20)
    args.add_argument("--steps", type=int, default=4, help="of each, a round")
    args = args.parse_args()
    layers, heads, width, length, batch, vocab = SHAPES[args.shape]
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab, (batch, length + 1), dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    data = Batch(
        tokens[:, :-1], tokens[:, 1:], positions, np.ones_like(positions), np.ones((batch, length), np.float32)
    )

    mesh = jax.make_mesh((1, 1, 1), sharding.AXES)
    plain_state, plain_step = plain(*SHAPES[args.shape])
    plain_data = jax.device_put(data)
    with jax.set_mesh(mesh):
        state, step = spine(*SHAPES[args.shape])
        spine_data = sharding.place(data, np.arange(batch), mesh, batch, 1)
        times = {"plain": [], "spine": []}
        for round in range(args.rounds + 1):
            for name in ("plain", "spine") if round % 2 else ("spine", "plain"):
                began = time.perf_counter()
                for _ in range(args.steps):
                    if name == "plain":
                        plain_state, out = plain_step(plain_state, plain_data)
                    else:
                        state, out = step(state, spine_data)
                jax.block_until_ready(out)
                if round:  # the first one compiles
                    times[name].append((time.perf_counter() - began) / args.steps)
    tokens = batch * length
    for name, seconds in times.items():
        print(f"{name}: {tokens / statistics.median(seconds):,.0f} tokens/s (median of {args.rounds} rounds)")
    ratios = [p / s for p, s in zip(times["plain"], times["spine"])]
    print(
        f"speed of the spine over plain JAX on {args.shape}: {statistics.median(ratios):.3f} "
        f"(quartiles {', '.join(f'{q:.3f}' for q in statistics.quantiles(ratios, n=4))})"
    )


if __name__ == "__main__":
    main()
