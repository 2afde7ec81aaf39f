"""gptjax's train step against the same model written as plain JAX functions, with no framework.

    python -m benchmarks.plain_jax [--shape=W1|W2] [--rounds=20] [--steps=3]

The plain model below keeps its layers as a Python list, unrolls them in a Python loop and lets XLA differentiate a
cross entropy over whole logits. What is counted, and how it is timed: see peer.py.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import optax

from benchmarks import ours, peer


def build(shape: peer.Shape):
    """(parameters, step) of a GPT-2 in plain JAX: pre-norm, learned positions, tanh GELU, tied embedding, biases."""
    layers, heads, width, length, _, vocab = shape
    padded = -(-vocab // 128) * 128
    keys = iter(jax.random.split(jax.random.key(0), 6 * layers + 2))

    def normal(*shape):
        return 0.02 * jax.random.normal(next(keys), shape)

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
    adamw = optax.adamw(peer.RATE, b1=peer.BETA1, b2=peer.BETA2, weight_decay=peer.DECAY, mask=mask)
    optimizer = optax.chain(optax.clip_by_global_norm(peer.CLIP), adamw)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, data):
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, data)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    state, data = (params, optimizer.init(params)), jax.device_put(ours.batch(shape))

    def step():
        nonlocal state
        state, value = update(state, data)
        return value

    return sum(leaf.size for leaf in jax.tree.leaves(params)), step


def main():
    args = peer.arguments(__doc__).parse_args()
    if args.serve:
        peer.serve(lambda: build(peer.SHAPES[args.shape]))
    else:
        peer.compare(args, {"plain JAX": [sys.executable, "-m", "benchmarks.plain_jax"]}, biases=True)


if __name__ == "__main__":
    main()
