"""The maximal-update parametrization: the coordinate check, and that it is nothing at the base width."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import LLAMA, mesh_of, run, tiny

from benchmarks.coordinates import BASE, MODEL, PLACES, config_of, sizes, slopes
from gptjax.errors import Refused
from gptjax.training import step
from gptjax.training.config.schema import parse
from gptjax.training.optim import optimizers

WIDTHS = (128, 512)
GROUPED = dataclasses.replace(MODEL, num_kv_heads=1, activation="swiglu", qk_norm=True, tied_embeddings=False)
ONE_LAYER = dataclasses.replace(MODEL, num_layers=1)


def grown(mup: bool, **changes) -> dict[str, float]:
    return slopes(WIDTHS, np.stack([sizes(config_of(width, mup, **changes)) for width in WIDTHS]))


@pytest.mark.parametrize(
    "changes, bound",
    [
        pytest.param({}, 0.15, id="adamw"),
        pytest.param(dict(model=GROUPED, more_heads=False), 0.25, id="larger heads", marks=pytest.mark.slow),
        pytest.param(dict(model=ONE_LAYER, name="muon"), 0.15, id="muon", marks=pytest.mark.slow),
    ],
)
def test_activations_are_flat_over_widths(changes, bound):
    """At narrow widths, where a product of two as in swiglu is further from the limit."""
    found = grown(True, **changes)
    assert all(abs(found[place]) < bound for place in PLACES), found


@pytest.mark.slow
def test_without_it_they_are_not():
    found = grown(False)
    assert all(found[place] > 0.3 for place in PLACES[1:]), found


@pytest.mark.slow
@pytest.mark.parametrize("name, power", [("adamw", 1), ("lion", 1), ("muon", 0.5)])
def test_the_update_of_a_matrix_is_smaller_and_that_of_an_embedding_is_not(name, power):
    found = {}
    for mup in (False, True):
        config = config_of(256, mup, name=name, weight_decay=0.0)
        with jax.set_mesh(mesh_of(1, 1, 1)):
            model = jax.jit(functools.partial(step.init_state, config, 128))().model
            chain = optimizers.make_optimizer(config.optimizer, config.num_steps)
            found[mup], _ = chain.update(model, chain.init(model), model)

    def ratio(key):
        plain, mup = (operator.attrgetter(key)(found[each])[...] for each in (False, True))
        return float(jnp.linalg.norm(plain) / jnp.linalg.norm(mup))

    for key in ("query", "output", "up", "down"):
        assert ratio(f"blocks.{key}") == pytest.approx((256 / BASE) ** power, rel=1e-3)
    assert ratio("embedding") == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_at_the_base_width_nothing_differs(store, name):
    optimizers = dict(name=name, peak_learning_rate=3e-3, warmup_steps=2)
    losses = {}
    for mup in (0, 64):
        model = dataclasses.replace(LLAMA, mup_base_width=mup)
        config = parse(dataclasses.asdict(tiny(model)) | dict(optimizer=optimizers))
        losses[mup] = run(config, store, mesh_of(1, 1, 1), steps=3)[1]
    assert losses[0] == losses[64]


@pytest.mark.slow
def test_weight_decay_takes_the_same_share_at_any_width():
    """Without a gradient to follow, all that is left of an update is the decay."""
    config = config_of(256, True, weight_decay=0.5, clip_norm=0.0)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        model = jax.jit(lambda: step.init_state(config, 128))().model
        chain = optimizers.make_optimizer(config.optimizer, config.num_steps)
        updates, _ = chain.update(jax.tree.map(jnp.zeros_like, model), chain.init(model), model)
        np.testing.assert_allclose(updates.blocks.up[...], -0.01 * 0.5 * model.blocks.up[...], rtol=1e-5)


@pytest.mark.parametrize("changes, words", [
    (dict(model=dict(mup_base_width=64), optimizer=dict(name="adafactor")),
     "model.mup_base_width=64 with optimizer.name"),
    (dict(model=dict(mup_base_width=-1)), "model.mup_base_width=-1 must not be negative"),
    (dict(model=dict(mup_base_head_dim=32)), "model.mup_base_head_dim=32 needs model.mup_base_width too"),
])  # fmt: skip
def test_refused(changes, words):
    with pytest.raises(Refused, match=words):
        parse(changes)


def test_scales():
    config = config_of(256, True, more_heads=False)
    assert config.model.widened == 256 / BASE and config.model.query_scale == (32 / 128) ** 0.5
    assert config_of(256, True).model.query_scale == 1
