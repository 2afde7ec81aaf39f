"""gptjax's train step against Levanter's, in JAX, Equinox and Haliax.

    python -m venv ENV && ENV/bin/pip install --pre levanter haliax
    python -m benchmarks.levanter --python=ENV/bin/python [--shape=W1|W2] [--rounds=20] [--steps=3]

Its GPT-2 and the step of its `Trainer`, without hooks and trackers. By default it recomputes activations, which we do
not: switched off. Its attention twice, as it is by default on a CPU (a flash attention written in JAX) and in one
piece. What else is counted, and how it is timed: see peer.py. Use the same jax in both environments.
"""

import functools
import sys

from benchmarks import peer


def build(shape: peer.Shape, attention: str):
    """(parameters, step) of Levanter's Trainer."""
    import haliax
    import jax
    from levanter.layers.attention import AttentionBackend
    from levanter.models.gpt2 import Gpt2Config
    from levanter.models.lm_model import LmExample, compute_next_token_loss
    from levanter.optim import AdamConfig
    from levanter.tracker import NoopConfig
    from levanter.trainer import Trainer, TrainerConfig

    def mean(losses, axis, where):  # its own passes numbers as the mask, which jax refuses since 0.8
        return haliax.mean(losses, axis, where=where.astype(bool))

    loss = functools.partial(compute_next_token_loss, reduction=mean)
    config = TrainerConfig(
        train_batch_size=shape.batch, num_train_steps=10**6, tracker=NoopConfig(), id="peer", require_accelerator=False,
        log_jaxprs=False, log_xla_hlo=False, load_checkpoint=False,
    )  # fmt: skip
    adam = AdamConfig(
        learning_rate=peer.RATE, lr_schedule="constant", warmup=0, weight_decay=peer.DECAY, beta1=peer.BETA1,
        beta2=peer.BETA2, max_grad_norm=peer.CLIP,
    )  # fmt: skip
    gpt2 = Gpt2Config(
        seq_len=shape.length, hidden_dim=shape.width, num_layers=shape.layers, num_heads=shape.heads,
        gradient_checkpointing=False, attn_backend=AttentionBackend[attention],
    )  # fmt: skip
    trainer = Trainer(config, adam.build(config.num_train_steps), loss, add_default_hooks=False)
    trainer.__enter__()
    vocab = haliax.Axis("vocab", shape.vocab)
    state = trainer.initial_state(
        jax.random.PRNGKey(0), model_init=lambda: gpt2.build(vocab, key=jax.random.PRNGKey(1))
    )
    rows = [haliax.named(row, gpt2.Pos) for row in peer.tokens(shape)[:, :-1]]
    batch = haliax.stack(trainer.TrainBatch, rows)
    example = LmExample(batch, haliax.ones(batch.axes))

    def step():
        nonlocal state
        info = trainer.train_step(state, example)
        state = info.state
        return info.loss

    return sum(leaf.size for leaf in jax.tree.leaves(state.model) if hasattr(leaf, "size")), step


def main():
    parser = peer.arguments(__doc__)
    parser.add_argument("--python", default=sys.executable, help="of an environment with levanter")
    parser.add_argument("--attention", default="JAX_FLASH", help="of the peer's process: its backend")
    args = parser.parse_args()
    if args.serve:
        peer.serve(lambda: build(peer.SHAPES[args.shape], args.attention))
        return
    command = [args.python, "-m", "benchmarks.levanter", "--attention"]
    peers = {"Levanter flash": [*command, "JAX_FLASH"], "Levanter vanilla": [*command, "VANILLA"]}
    peer.compare(args, peers, biases=True)


if __name__ == "__main__":
    main()
