"""gptjax's train step against nanodo's, in JAX and Flax Linen.

    git clone https://github.com/google-deepmind/nanodo DIR
    python -m venv ENV && ENV/bin/pip install jax flax optax grain orbax-checkpoint clu ml-collections \
        sentencepiece tensorflow-datasets
    python -m benchmarks.nanodo --source=DIR --python=ENV/bin/python [--shape=W1|W2] [--rounds=20] [--steps=3]

Its model, without biases (so ours has none), its default config with AdamW in float32, and the step of its `Trainer`.
What else is counted, and how it is timed: see peer.py. Use the same jax in both environments.
"""

import pathlib
import sys

from benchmarks import peer


def build(shape: peer.Shape, source: str):
    """(parameters, step) of nanodo's Trainer."""
    sys.path.insert(0, source)
    import jax
    from nanodo import model_factory, train
    from nanodo.configs import default

    c = default.get_config()
    c.model.update(D=shape.width, H=shape.heads, L=shape.length, N=shape.layers, F=4 * shape.width, dtype="float32")
    c.opt.update(
        peak_learning_rate=peer.RATE, init_learning_rate=peer.RATE, final_learning_rate=peer.RATE, warmup_steps=0,
        b1=peer.BETA1, b2=peer.BETA2, weight_decay=peer.DECAY, clip_by_global_norm=peer.CLIP,
    )  # fmt: skip
    c.log_internal_metrics = False  # norms of all activations, which no other side works out
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    model, get_loss_fn = model_factory.get_model_and_loss(c, shape.vocab)
    shardings, state = train._init_train_state(c, model, jax.random.PRNGKey(0), mesh)
    trainer = train.Trainer(c=c, state=state, mesh=mesh, shardings=shardings, get_loss_fn=get_loss_fn)
    tokens = peer.tokens(shape)[:, :-1]
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        return trainer.do_step(steps, tokens)["train_loss"]

    return sum(leaf.size for leaf in jax.tree.leaves(state.params)), step


def main():
    parser = peer.arguments(__doc__)
    parser.add_argument("--source", type=pathlib.Path, required=True, help="a checkout of nanodo")
    parser.add_argument("--python", default=sys.executable, help="of an environment with what nanodo imports")
    args = parser.parse_args()
    if args.serve:
        peer.serve(lambda: build(peer.SHAPES[args.shape], str(args.source)))
        return
    if not (args.source / "nanodo" / "train.py").exists():
        parser.error(f"--source={args.source} has no nanodo/train.py: give a checkout of nanodo.")
    command = [args.python, "-m", "benchmarks.nanodo", "--source", str(args.source.resolve())]
    peer.compare(args, {"nanodo": command}, biases=False)


if __name__ == "__main__":
    main()
