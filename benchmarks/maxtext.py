"""gptjax's train step against MaxText's, in JAX and Flax.

    python3.12 -m venv ENV && ENV/bin/pip install maxtext jax flax optax orbax-checkpoint ...
    python -m benchmarks.maxtext --python=ENV/bin/python [--shape=W1|W2] [--rounds=20] [--steps=3]

MaxText does not declare what it imports: see its base requirements. Its GPT-3 (learned positions, LayerNorm, biases,
tied embedding) and its `train_step`, set up and jitted by its own functions. Its layers are unrolled, as ours are. No
setting of its recomputes nothing: this one saves all products and attention's output, and recomputes what lies between.
What else is counted, and how it is timed: see peer.py.
"""

import pathlib
import sys
import tempfile

from benchmarks import peer


def build(shape: peer.Shape):
    """(parameters, step) of MaxText's training loop."""
    import jax
    import maxtext
    import numpy as np
    from flax import nnx
    from flax.linen import partitioning
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = dict(
        run_name="peer", base_output_directory=tempfile.mkdtemp(), hardware="cpu", skip_jax_distributed_system=True,
        enable_checkpointing=False, dataset_type="synthetic", jax_cache_dir="", steps=10**6,
        decoder_block="gpt3", base_num_decoder_layers=shape.layers, base_num_query_heads=shape.heads,
        base_num_kv_heads=shape.heads, head_dim=shape.width // shape.heads, base_emb_dim=shape.width,
        base_mlp_dim=4 * shape.width, mlp_activations="[gelu]", vocab_size=shape.vocab, max_target_length=shape.length,
        trainable_position_size=shape.length, per_device_batch_size=shape.batch, logits_via_embedding=True,
        normalize_embedding_logits=False, fused_qkv=True, enable_dropout=False,
        dtype="float32", attention="dot_product", remat_policy="minimal_with_context", scan_layers=False,
        opt_type="adamw", learning_rate=peer.RATE, learning_rate_final_fraction=1.0, warmup_steps_fraction=0.0,
        adam_b1=peer.BETA1, adam_b2=peer.BETA2, adam_weight_decay=peer.DECAY, gradient_clipping_threshold=peer.CLIP,
    )  # fmt: skip
    config, recorder = train.initialize(["", str(base), *(f"{key}={value}" for key, value in settings.items())])
    _, _, shardings, model, mesh, *_, state = train_utils.setup_train_loop(config, recorder)
    graph, state = nnx.split(state)
    param_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    update, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, params_shardings=param_shardings
    )
    tokens = peer.tokens(shape)
    positions = np.tile(np.arange(shape.length, dtype=np.int32), (shape.batch, 1))
    data = {}
    for name, part in (("inputs", tokens[:, :-1]), ("targets", tokens[:, 1:])):
        data |= {name: part, f"{name}_position": positions, f"{name}_segmentation": np.ones_like(positions)}

    def step():
        nonlocal state
        with jax.set_mesh(mesh), mesh, partitioning.axis_rules(config.logical_axis_rules):
            state, metrics = update(state, data)
        return metrics["scalar"]["learning/loss"]

    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))), step


def main():
    parser = peer.arguments(__doc__)
    parser.add_argument("--python", default=sys.executable, help="of an environment with maxtext")
    args = parser.parse_args()
    if args.serve:
        peer.serve(lambda: build(peer.SHAPES[args.shape]))
    else:
        peer.compare(args, {"MaxText": [args.python, "-m", "benchmarks.maxtext"]}, biases=True)


if __name__ == "__main__":
    main()
