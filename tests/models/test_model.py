import dataclasses
import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.runs import mesh_of

from gptjax.errors import Refused
from gptjax.models import blocks as model_blocks
from gptjax.models import layers, transformer
from gptjax.models.config import ModelConfig, padded_vocab
from gptjax.models.interface import Inputs
from gptjax.models.loss import LossConfig, next_token_sums
from gptjax.models.transformer import Transformer
from gptjax.parallel.sharding import spec

B, T, VOCAB = 2, 12, 40
GPT2 = ModelConfig(num_layers=2, num_heads=4, embed_dim=32).resolved()
LLAMA = ModelConfig(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=32,
    norm="rmsnorm",
    positions="rope",
    activation="swiglu",
    biases=False,
    tied_embeddings=False,
    qk_norm=True,
).resolved()
STYLES = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(mesh_of(1, 1, 1)):
        yield


# Small programs, run once: what XLA would take to make them fast is most of the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick, static_argnames="config")
def make(config):
    """A model whose gains and biases are not the ones and zeros that they start as."""
    model = Transformer(config, VOCAB, T, nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def forward(model, tokens, positions=None, segments=None, dropout_key=None):
    """Hidden states; without positions and segments each row is one document."""
    if positions is None:
        positions, segments = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), jnp.ones_like(tokens)
    rows = spec("act_batch", "act_seq")
    inputs = Inputs(*(jax.sharding.reshard(array, rows) for array in (tokens, positions, segments)))
    return model.hidden(inputs, dropout_key).x_BTD


hidden_states = quick(forward)


def influence(model, tokens, *positions_and_segments):
    """[row and position of an output, row and position of an input]: the gradient's largest entry.

    Every position has a token of its own, so its row of the table is the input there.
    """
    assert len(np.unique(tokens)) == tokens.size

    @quick
    def gradient(table, output):
        def hidden(table):
            changed = jax.tree.map(lambda leaf: leaf, model)
            changed.embedding[...] = table
            x_BTD = forward(changed, tokens, *positions_and_segments)
            wanted = jnp.arange(tokens.size).reshape(*tokens.shape, 1) == output
            return (x_BTD * jnp.where(wanted, jax.random.normal(jax.random.key(2), x_BTD.shape), 0)).sum()

        return jax.grad(hidden)(table)

    gradients = np.stack([gradient(model.embedding[...], i) for i in range(tokens.size)])
    return np.abs(gradients).max(-1)[:, np.asarray(tokens).ravel()]


@STYLES
def test_a_position_sees_itself_and_the_past_of_its_row(config):
    tokens = jnp.arange(B * T).reshape(B, T)
    seen = influence(make(config), tokens).reshape(B, T, B, T)
    for row in range(B):
        assert (seen[row, :, row][np.tril_indices(T)] > 0).all()
        assert (seen[row, :, row][np.triu_indices(T, 1)] == 0).all()
        assert (seen[row, :, 1 - row] == 0).all()


@STYLES
def test_packed_documents_never_see_each_other(config):
    tokens = jnp.arange(T)[None]
    segments = jnp.repeat(jnp.array([1, 2, 3]), jnp.array([3, 5, 4]), total_repeat_length=T)[None]
    positions = jnp.concatenate([jnp.arange(n) for n in (3, 5, 4)])[None]
    seen = influence(make(config), tokens, positions, segments)
    same = np.asarray(segments[0][:, None] == segments[0]) & np.tri(T, dtype=bool)
    assert (seen[same] > 0).all() and (seen[~same] == 0).all()


@STYLES
def test_a_packed_document_is_as_it_is_alone(config):
    model, lengths = make(config), (3, 5, 4)
    tokens = jax.random.randint(jax.random.key(3), (1, T), 0, VOCAB)
    segments = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths), total_repeat_length=T)[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    packed = hidden_states(model, tokens, positions, segments)
    for document in range(3):
        alone = tokens[:, segments[0] == document + 1]
        np.testing.assert_allclose(packed[:, segments[0] == document + 1], hidden_states(model, alone), atol=1e-5)


def numpy_forward(model, tokens, positions):
    """The model again from its papers, on one document, in float64."""
    c, blocks = model.config, model.blocks

    def value(param, layer):
        return 0.0 if param is None else np.asarray(param[...], np.float64)[layer]

    def norm(x, module, kind, layer=...):
        x = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * value(module.gain, layer) + value(module.bias, layer)

    def turn(x):
        H = c.head_dim
        angle = positions[:, None] * c.rope_theta ** (-np.arange(H // 2) / (H / 2))
        z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    x = value(model.embedding, tokens) + (value(model.positions, positions) if model.positions is not None else 0)
    for i in range(c.num_layers):
        h = norm(x, blocks.norm_attention, c.norm, i)
        q = np.einsum("td,dnh->tnh", h, value(blocks.query, i)) + value(blocks.query_bias, i)
        k = np.einsum("td,dnh->tnh", h, value(blocks.key, i)) + value(blocks.key_bias, i)
        v = np.einsum("td,dnh->tnh", h, value(blocks.value, i)) + value(blocks.value_bias, i)
        if c.qk_norm:
            q, k = norm(q, blocks.query_norm, "rmsnorm", i), norm(k, blocks.key_norm, "rmsnorm", i)
        if c.positions == "rope":
            q, k = turn(q), turn(k)
        out = np.zeros_like(q)
        for head in range(c.num_heads):
            group = head // (c.num_heads // c.num_kv_heads)
            scores = q[:, head] @ k[:, group].T / math.sqrt(c.head_dim)
            scores[np.triu_indices(len(tokens), 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = p / p.sum(-1, keepdims=True) @ v[:, group]
        x = x + np.einsum("tnh,nhd->td", out, value(blocks.output, i)) + value(blocks.output_bias, i)
        h = norm(x, blocks.norm_mlp, c.norm, i)
        u = h @ value(blocks.up, i) + value(blocks.up_bias, i)
        if c.activation == "swiglu":
            gate = h @ value(blocks.gate, i)
            u = gate / (1 + np.exp(-gate)) * u
        elif c.activation == "relu2":
            u = np.maximum(u, 0) ** 2
        elif c.activation == "gelu":
            u = u / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        else:
            u = u / 2 * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))
        x = x + u @ value(blocks.down, i) + value(blocks.down_bias, i)
    return norm(x, model.norm, c.norm)


@pytest.mark.parametrize("config", [
    GPT2,
    LLAMA,
    dataclasses.replace(GPT2, activation="gelu_exact", num_kv_heads=1, qk_norm=True),
    dataclasses.replace(LLAMA, activation="relu2", norm="layernorm", biases=False, rope_theta=500.0),
], ids=["gpt2", "llama", "gelu_exact", "relu2"])  # fmt: skip
def test_forward_is_that_of_the_papers(config):
    model = make(config)
    tokens = jax.random.randint(jax.random.key(4), (1, T), 0, VOCAB)
    x_BTD = hidden_states(model, tokens)
    np.testing.assert_allclose(x_BTD[0], numpy_forward(model, np.asarray(tokens[0]), np.arange(T)), atol=2e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_parameters_in_float32():
    model = make(dataclasses.replace(LLAMA, dtype="bfloat16"))
    tokens = jnp.arange(B * T).reshape(B, T)
    x_BTD = hidden_states(model, tokens)
    assert x_BTD.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    full = hidden_states(make(LLAMA), tokens)
    np.testing.assert_allclose(x_BTD.astype(jnp.float32), full, atol=0.15)


ODD = {
    "grouped, qk_norm": ModelConfig(num_layers=3, num_heads=6, num_kv_heads=2, embed_dim=48, qk_norm=True),
    "untied, layernorm without biases": ModelConfig(
        num_layers=1, num_heads=2, embed_dim=24, biases=False, tied_embeddings=False
    ),
    "rope, biases, rmsnorm": ModelConfig(num_layers=2, num_heads=2, embed_dim=24, positions="rope", norm="rmsnorm"),
    "swiglu, biases, heads wider than the model": ModelConfig(
        num_layers=2, num_heads=3, head_dim=10, embed_dim=16, activation="swiglu"
    ),
    "relu2, own mlp": ModelConfig(num_layers=2, num_heads=2, embed_dim=16, mlp_dim=20, activation="relu2"),
}


@pytest.mark.parametrize("config", [GPT2, LLAMA, *ODD.values()], ids=["gpt2", "llama", *ODD])
@pytest.mark.parametrize("vocab_size", [257, 384])
def test_parameter_count(config, vocab_size):
    config = config.resolved()
    model = jax.eval_shape(lambda: Transformer(config, vocab_size, T, nnx.Rngs(0)))
    assert config.num_parameters(vocab_size, T).total == sum(leaf.size for leaf in jax.tree.leaves(model))


def test_published_parameter_counts():
    gpt2 = ModelConfig(num_layers=12, num_heads=12, embed_dim=768).resolved()
    assert gpt2.num_parameters(50257, 1024).total == 124_439_808 + 47 * 768  # 47 rows of padding
    llama = dict(norm="rmsnorm", positions="rope", activation="swiglu", biases=False, tied_embeddings=False)
    llama2_7b = ModelConfig(num_layers=32, num_heads=32, embed_dim=4096, mlp_dim=11008, **llama).resolved()
    assert llama2_7b.num_parameters(32000, 4096).total == 6_738_415_616
    tinyllama = ModelConfig(
        num_layers=22, num_heads=32, num_kv_heads=4, embed_dim=2048, mlp_dim=5632, **llama
    ).resolved()
    assert tinyllama.num_parameters(32000, 2048).total == 1_100_048_384


def products(jaxpr, times=1):
    """(FLOPs, is batched) of every dot_general, loops unrolled."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), (batch, _) = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracting)
            yield times * 2 * depth * eqn.outvars[0].aval.size, bool(batch)
        inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from products(sub, inner)


@pytest.mark.parametrize("config", [GPT2, LLAMA, *ODD.values()], ids=["gpt2", "llama", *ODD])
def test_flops_are_those_of_the_programs_products(config):
    config = config.resolved()
    model = jax.eval_shape(lambda: Transformer(config, VOCAB, T, nnx.Rngs(0)))

    def loss(model, tokens):
        rows = jax.sharding.reshard(tokens, spec("act_batch", "act_seq"))
        return next_token_sums(
            forward(model, tokens),
            model.output(),
            rows,
            rows.astype(float),
            vocab_size=VOCAB,
            config=LossConfig(num_chunks=4),
        ).objective

    counted = list(products(jax.make_jaxpr(jax.grad(loss))(model, jnp.ones((B, T), jnp.int32)).jaxpr))
    weights = sum(flops for flops, batched in counted if not batched)
    scores = sum(flops for flops, batched in counted if batched)
    assert scores == 3 * config.num_layers * 4 * B * T * T * config.num_heads * config.head_dim
    assert config.flops_per_token(VOCAB, T) == (weights + scores // 2) // (B * T)


def test_dropout_zeroes_its_rate_and_keeps_the_mean():
    dropped = layers.dropout(jnp.ones((100, 100, 10)), 0.3, jax.random.key(0), 0)
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.7)}
    assert abs(float((dropped == 0).mean()) - 0.3) < 0.01
    assert layers.dropout(jnp.ones(3), 0.3, None, 0).sum() == 3


def test_dropout_is_the_same_on_any_mesh_and_differs_by_key_and_site():
    def mask(shape, key=0, site=0):
        mesh = mesh_of(*shape)
        with jax.set_mesh(mesh):
            x = jax.device_put(jnp.ones((8, 16, 32)), jax.NamedSharding(mesh, spec("act_batch")))
            return np.asarray(jax.jit(lambda x: layers.dropout(x, 0.5, jax.random.key(key), site))(x))

    np.testing.assert_array_equal(mask((1, 1, 1)), mask((2, 2, 2)))
    np.testing.assert_array_equal(mask((1, 1, 1)), mask((8, 1, 1)))
    for other in (mask((1, 1, 1), site=1), mask((1, 1, 1), key=1)):
        assert abs((mask((1, 1, 1)) == other).mean() - 0.5) < 0.05


def test_dropout_acts_in_every_layer_and_only_with_a_key():
    config = dataclasses.replace(GPT2, dropout=0.5)
    model, tokens = make(config), jnp.arange(B * T).reshape(B, T)
    keyed = [hidden_states(model, tokens, dropout_key=jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(keyed[0], keyed[1])
    assert not np.allclose(keyed[0], keyed[2])
    np.testing.assert_array_equal(hidden_states(model, tokens), hidden_states(make(GPT2), tokens))

    masks = []
    original = layers.dropout

    def spy(x, rate, key, site):
        y = original(x, rate, key, site)
        jax.debug.callback(lambda kept: masks.append(np.asarray(kept)), y == 0)
        return y

    with pytest.MonkeyPatch.context() as patch:
        for module in (transformer, model_blocks):
            patch.setattr(module, "dropout", spy)
        quick(lambda: forward(model, tokens, dropout_key=jax.random.key(0)))()
        jax.effects_barrier()
    assert len(masks) == 1 + 2 * config.num_layers
    assert len({mask.tobytes() for mask in masks}) == len(masks)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 4, 8))

    def product(m, n):
        turned = [
            layers.rotate(x, layers.rope(jnp.full((1, 1), at), layers.rope_frequencies(8, 10_000.0)))
            for x, at in ((q, m), (k, n))
        ]
        return (turned[0] * turned[1]).sum(-1)

    np.testing.assert_allclose(product(7, 3), product(104, 100), atol=1e-4)
    np.testing.assert_allclose(product(0, 0), (q * k).sum(-1), atol=1e-5)
    assert not np.allclose(product(7, 3), product(7, 4), atol=1e-2)


@STYLES
def test_unrolling_the_layers_changes_nothing(config):
    tokens = jnp.arange(B * T).reshape(B, T)
    one, all_layers = (make(dataclasses.replace(config, scan_unroll=n)) for n in (1, 2))
    np.testing.assert_allclose(hidden_states(one, tokens), hidden_states(all_layers, tokens), atol=1e-6)


def test_residual_scale_falls_with_depth():
    config = dataclasses.replace(GPT2, num_layers=8)
    model = jax.jit(lambda: Transformer(config, VOCAB, T, nnx.Rngs(0)))()
    for weight, inputs in ((model.blocks.output, 32), (model.blocks.down, 128)):
        assert np.asarray(weight[...]).std() * (2 * 8 * inputs) ** 0.5 == pytest.approx(1, rel=0.05)


def test_the_vocabulary_is_padded_to_a_multiple_of_128():
    assert [padded_vocab(n) for n in (1, 128, 129, 257, 50257)] == [128, 128, 256, 384, 50304]


@pytest.mark.parametrize("changes, words", [
    (dict(norm="batchnorm"), 'model.norm="batchnorm".*layernorm, rmsnorm'),
    (dict(positions="alibi"), 'model.positions="alibi".*learned, rope'),
    (dict(activation="tanh"), 'model.activation="tanh".*gelu'),
    (dict(remat="some"), 'model.remat="some".*none, dots, full'),
    (dict(dtype="float16"), 'model.dtype="float16".*float32, bfloat16'),
    (dict(num_layers=0), "model.num_layers=0 must be at least 1"),
    (dict(num_heads=-1), "model.num_heads=-1 must be at least 1"),
    (dict(embed_dim=0), "model.embed_dim=0 must be at least 1"),
    (dict(scan_unroll=0), "model.scan_unroll=0 must be at least 1"),
    (dict(dropout=1.0), "model.dropout=1.0 must be at least 0 and below 1"),
    (dict(embed_dim=100), "model.embed_dim=100 is not divisible by model.num_heads=6"),
    (dict(num_kv_heads=4), "model.num_heads=6 is not divisible by model.num_kv_heads=4"),
    (dict(positions="rope", head_dim=7), "model.head_dim=7 is odd"),
])  # fmt: skip
def test_refused(changes, words):
    with pytest.raises(Refused, match=words):
        ModelConfig(**changes).resolved()


def test_sizes_are_worked_out():
    config = ModelConfig(num_heads=4, embed_dim=48).resolved()
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (4, 12, 192)
    assert ModelConfig(num_heads=4, embed_dim=48, activation="swiglu").resolved().mlp_dim == 128
    assert config.resolved() == config


CONTRACTIONS = [
    ("BTD,DF->BTF", (4, 8)), ("BTF,FD->BTD", (8, 4)), ("BTD,DNH->BTNH", (4, 2, 6)), ("BTNH,NHD->BTD", (2, 6, 4)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation, shape", CONTRACTIONS)
def test_the_gradient_of_a_product_is_that_of_einsum(equation, shape, dtype):
    x, w = products_of(equation, shape, dtype)
    made, back = jax.vjp(functools.partial(layers.contract, equation, x.dtype), x, w)
    expected, back_expected = jax.vjp(functools.partial(jnp.einsum, equation), x, w)
    np.testing.assert_array_equal(made, expected)
    for mine, theirs in zip(back(expected), back_expected(expected), strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        # Relative to the norm: where a bfloat16 sum cancels, each order of summation leaves another remainder.
        distance = np.linalg.norm(mine.astype(float) - theirs.astype(float)) / np.linalg.norm(theirs.astype(float))
        assert distance < (1e-6 if dtype == "float32" else 2**-6)


@pytest.mark.parametrize("equation, shape", CONTRACTIONS)
def test_of_the_gradient_of_a_weight_the_smaller_side_is_transposed(equation, shape):
    """XLA contracts rows of the second operand, so that it is the first one that it transposes."""
    x, w = products_of(equation, shape, "float32")
    gradient = jax.make_jaxpr(jax.grad(lambda w: layers.contract(equation, x.dtype, x, w).sum()))(w)
    last = [eqn for eqn in gradient.eqns if eqn.primitive.name == "dot_general"][-1]
    first, second = (operand.aval.size for operand in last.invars)
    assert first < second


def products_of(equation, shape, dtype):
    left, right = equation.split("->")[0].split(",")
    sizes = dict(zip(right, shape, strict=True)) | {"B": 3, "T": 5}
    keys = jax.random.split(jax.random.key(0))
    names = zip(keys, (left, right), strict=True)
    return tuple(jax.random.normal(key, [sizes[name] for name in each]).astype(dtype) for key, each in names)
