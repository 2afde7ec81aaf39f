"""Adapters: what is added to a model, and what of a state is trained."""

import dataclasses

import jax
import numpy as np
import pytest
from support.runs import LLAMA, mesh_of, run, tiny

from gptjax.models.config import padded_vocab
from gptjax.models.lora import LoraConfig
from gptjax.parallel.trees import is_param, named_leaves
from gptjax.training import step
from gptjax.training.optim.config import OptimizerConfig
from gptjax.training.optim.optimizers import muon_dimensions

MODEL = dataclasses.replace(LLAMA, qk_norm=False)
SUMS = {
    "query": "LDr,LrNH->LDNH",
    "key": "LDr,LrKH->LDKH",
    "value": "LDr,LrKH->LDKH",
    "output": "LNHr,LrD->LNHD",
    "gate": "LDr,LrF->LDF",
    "up": "LDr,LrF->LDF",
    "down": "LFr,LrD->LFD",
}


def config(**changes):
    return tiny(MODEL, init_from="a workdir", lora=LoraConfig(rank=4, alpha=2.0), **changes)


@pytest.fixture(scope="module")
def trained(store):
    """(state, losses) of a few steps on one device."""
    return run(config(), store, mesh_of(1, 1, 1), 6)


def test_what_is_added_is_the_product_and_begins_as_nothing(trained):
    with jax.set_mesh(mesh_of(1, 1, 1)):
        born = jax.jit(lambda: step.init_state(config(), 257))()
        wholes = step.weights(born), step.weights(trained[0])
    for state, whole in zip((born, trained[0]), map(named_leaves, wholes), strict=True):
        base, adapters = named_leaves(state.base), named_leaves(state.model)
        assert base.keys() == whole.keys() and {name.partition(".")[0] for name in adapters} == SUMS.keys()
        for name, weight in base.items():
            added = 0
            if (matrix := name.removeprefix("blocks.")) in SUMS:
                a, b = (np.asarray(adapters[f"{matrix}.{side}"], np.float64) for side in "ab")
                added = 2.0 / 4 * np.einsum(SUMS[matrix], a, b)
                assert a.std() > 0 and (np.abs(added).max() > 0) == (state is not born)
            np.testing.assert_allclose(whole[name], weight + added, rtol=1e-5, atol=1e-7)


def test_only_adapters_are_trained_and_have_moments(trained):
    state, losses = trained
    with jax.set_mesh(mesh_of(1, 1, 1)):
        born = jax.jit(lambda: step.init_state(config(), 257))()
    for name, weight in named_leaves(born.base).items():
        np.testing.assert_array_equal(weight, named_leaves(state.base)[name])
    count = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * count
    assert count < 0.15 * sum(leaf.size for leaf in jax.tree.leaves(state.base))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_same_on_a_mesh(trained, store):
    """Adapters are cut as their matrices are."""
    state, losses = run(config(), store, mesh_of(2, 2, 2), 6)
    np.testing.assert_allclose(losses, trained[1], rtol=1e-5)
    down = state.model.down
    assert down.a[...].addressable_shards[0].data.size == down.a.size // 2  # of the MLP, over tensor
    assert down.b[...].addressable_shards[0].data.size == down.b.size // 2  # of the stream, over fsdp
    assert state.base.embedding.shape[0] == padded_vocab(257)


def test_of_muon_adapters_are_adams():
    settings = OptimizerConfig(name="muon", warmup_steps=4, ema_decay=0.9)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        state = jax.eval_shape(lambda: step.init_state(config(optimizer=settings), 257))
    adapters = jax.tree.leaves(state.model, is_leaf=is_param)
    assert set(jax.tree.leaves(muon_dimensions(adapters), is_leaf=lambda leaf: leaf is None)) == {None}
    assert named_leaves(state.ema).keys() == named_leaves(state.model).keys()
