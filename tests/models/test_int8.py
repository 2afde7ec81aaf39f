import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.runs import GPT2, LLAMA, mesh_of

from gptjax.inference.generate import Request, generate
from gptjax.inference.sampling import Sampling
from gptjax.models import int8
from gptjax.models.transformer import Transformer
from gptjax.tokenizers.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer("")


def make(config, mesh):
    with jax.set_mesh(mesh):
        config = dataclasses.replace(config, dropout=0.0).resolved()
        return jax.jit(lambda: Transformer(config, 257, 48, nnx.Rngs(1)))()


def ask(model, prompts=((1, 2, 3), (), (9,) * 20)):
    return generate(
        model, [list(prompt) for prompt in prompts], TOKENIZER,
        Request(seq_len=48, max_tokens=12, sampling=Sampling(top_k=20), seed=0),
    )  # fmt: skip


@pytest.mark.parametrize("config", [pytest.param(GPT2, marks=pytest.mark.slow), LLAMA], ids=["gpt2", "llama"])
def test_int8_weights_are_the_rounded_ones(config):
    """What is generated with them is what the model with rounded weights makes, and nearly the memory of a quarter."""
    mesh = mesh_of(1, 1, 1)
    model = make(config, mesh)
    with jax.set_mesh(mesh):
        small = int8.quantized(model)
        size, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(each)) for each in (small, model))
        assert size < 0.3 * whole + 4 * 48 * 64
        assert ask(small) == ask(int8.rounded(model))
    before, after = (np.asarray(each.blocks.up[...]) for each in (model, int8.rounded(model)))
    step = np.abs(before).max(1, keepdims=True) / 127
    assert (np.abs(before - after) <= 0.501 * step).all() and (before != after).any()  # the given model stays


@pytest.mark.slow
def test_any_mesh_gives_the_same_text():
    whole, cut = mesh_of(1, 1, 1), mesh_of(2, 2, 2)
    model = make(LLAMA, whole)
    with jax.set_mesh(whole):
        expected = ask(int8.quantized(model))
    with jax.set_mesh(cut):
        shapes = jax.eval_shape(lambda: Transformer(model.config, 257, 48, nnx.Rngs(1)))

        def put(leaf, shape):
            return jax.device_put(np.asarray(leaf), jax.NamedSharding(cut, shape.sharding.spec))

        assert ask(int8.quantized(jax.tree.map(put, model, shapes))) == expected


def test_weights_of_zeros_stay():
    values, scale = int8.steps(jnp.zeros((3, 4)), (-2,))
    assert not values.any() and np.isfinite(scale).all()
