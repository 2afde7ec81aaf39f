import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.runs import GPT2, LLAMA, mesh_of, run, tiny

from gptjax.errors import Refused
from gptjax.models import blocks, pattern
from gptjax.models.config import ModelConfig
from gptjax.models.interface import Inputs
from gptjax.parallel.trees import is_param, named_leaves
from gptjax.training import step
from gptjax.training.optim.config import OptimizerConfig

LAYERS, PATTERN = 5, "1(attention/mlp) 2(attention/mlp attention/mlp)"


def pair(model, mesh, **changes):
    """(config, model) in one segment, and (config, model) of the same weights in two."""
    one = tiny(dataclasses.replace(model, num_layers=LAYERS), **changes)
    two = dataclasses.replace(one, model=dataclasses.replace(one.model, layers=PATTERN).resolved())
    with jax.set_mesh(mesh):
        single = jax.jit(lambda: one.model.build(257, one.seq_len, nnx.Rngs(0)))()
        return (one, single), (two, jax.jit(lambda: split(two, single))())


def split(config, single):
    """The weights of a model in one segment, as those of the model in two."""
    model = config.model.build(257, config.seq_len, nnx.Rngs(1))
    for name in ("embedding", "positions", "norm", "head"):
        setattr(model, name, getattr(single, name))
    rows = [[slice(0, 1)], [slice(1, None, 2), slice(2, None, 2)]]
    for period, slices in zip(model.blocks, rows, strict=True):
        for place, rows_of in enumerate(slices):
            period[place] = jax.tree.map(lambda leaf, rows_of=rows_of: leaf[rows_of], single.blocks)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("model, shape", [(GPT2, (1, 1, 1)), (dataclasses.replace(LLAMA, remat="dots"), (1, 2, 2))])
def test_two_segments_train_as_one(model, shape, store):
    """Dropout, the optimizer's grouping of weights and rematerialization included."""
    mesh, optimizer = mesh_of(*shape), OptimizerConfig(name="muon", peak_learning_rate=3e-3, warmup_steps=1)
    losses = []
    for config, weights in pair(model, mesh, optimizer=optimizer):
        with jax.set_mesh(mesh):
            state = jax.jit(lambda weights, config=config: step.new_state(config, weights))(weights)
        losses.append(run(config, store, mesh, steps=3, state=state)[1])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][2] < losses[0][0]


@jax.jit
def read(model):
    """Hidden states of 12 tokens: by a full pass, of the 9th after a prefill, and of the 10th after a decoded token."""
    ids = jnp.arange(12)[None]
    whole_BTD = model.hidden(Inputs(ids, ids, jnp.zeros_like(ids)), None).x_BTD
    decoder = model.for_decoding()
    x_RD, state = decoder.prefill(ids, jnp.array([9]))
    padded = jax.tree.map(lambda old, new: old.at[:, :, :12].set(new), decoder.empty_state(1, 16), state)
    return whole_BTD, x_RD, decoder.decode(jnp.array([9]), jnp.array([9]), padded)[0]


def test_two_segments_decode_as_one():
    mesh, found = mesh_of(1, 1, 1), []
    for _, model in pair(LLAMA, mesh):
        with jax.set_mesh(mesh):
            whole, prefilled, decoded = jax.device_get(read(model))
            found.append(whole)
        np.testing.assert_allclose(prefilled[0], whole[0, 8], atol=1e-4)
        np.testing.assert_allclose(decoded[0], whole[0, 9], atol=1e-4)
    np.testing.assert_allclose(*found, atol=1e-4)


def test_names_of_weights():
    """One segment of one block keeps the names of earlier checkpoints."""
    (_, one), (_, two) = pair(GPT2, mesh_of(1, 1, 1))
    assert {"embedding", "blocks.query", "blocks.norm_mlp.gain"} < named_leaves(one).keys()
    assert {"embedding", "blocks.0.0.query", "blocks.1.1.norm_mlp.gain"} < named_leaves(two).keys()
    assert sum(leaf.size for leaf in jax.tree.leaves(one)) == sum(leaf.size for leaf in jax.tree.leaves(two))


def test_every_weight_declares_its_inputs_and_stacked_axes():
    with jax.set_mesh(mesh_of(1, 1, 1)):
        model = jax.eval_shape(lambda: LLAMA.resolved().build(257, 32, nnx.Rngs(0)))
    for param in jax.tree.leaves(model, is_leaf=is_param):
        assert set(param.inputs) < set(param.axes) and not set(param.inputs) & set(param.stacked)
        assert param.decay == bool(param.inputs)
    assert model.blocks.output.inputs == ("heads", "head_dim") and model.blocks.output.stacked == ("layers",)


def test_the_words_of_patterns_are_those_of_the_tables():
    assert (pattern.MIXERS, pattern.FEED_FORWARDS) == (tuple(blocks.MIXERS), tuple(blocks.FEED_FORWARDS))


def test_one_segment_of_one_block_is_the_default():
    assert ModelConfig(layers="6(attention/mlp)").resolved() == ModelConfig().resolved()
    assert ModelConfig(layers="3(attention/mlp attention/mlp)").resolved().segments[0].repeats == 3


@pytest.mark.parametrize("layers, words", [
    ("6(attention/mop)", 'unknown feed-forward "mop"; known: mlp, moe'),
    ("6(atention/mlp)", 'unknown mixer "atention"; known: attention. Did you mean "attention"'),
    ("6(attention)", 'unknown feed-forward ""'),
    ("6()", "empty period"),
    ("5(attention/mlp)", "has 5 blocks and model.num_layers=6; make them equal"),
    ("0(attention/mlp) 6(attention/mlp)", "must be segments such as"),
    ("attention/mlp", "must be segments such as"),
    ("6(attention/mlp", "must be segments such as"),
    ("9999999(attention/mlp)", "must be segments such as"),
])  # fmt: skip
def test_refused(layers, words):
    with pytest.raises(Refused) as refusal:
        ModelConfig(layers=layers).resolved()
    assert words in str(refusal.value) and f'model.layers="{layers}"' in str(refusal.value)
