import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.runs import GPT2, LLAMA, mesh_of

from gptjax.errors import Refused
from gptjax.inference import sampling
from gptjax.inference.decoder import Decoder, Prompt, advance, begin, doubled
from gptjax.inference.detokenizer import Continuation
from gptjax.inference.generate import Request, generate, grow, samples
from gptjax.inference.sampling import Sampling, sample
from gptjax.models.interface import Inputs
from gptjax.models.transformer import Transformer
from gptjax.parallel import sharding
from gptjax.tokenizers.tokenizer import ByteTokenizer

SEQ_LEN = 48
TOKENIZER = ByteTokenizer("")
GREEDY = Sampling(temperature=0)
PROMPTS = [[10, 20, 30], [], list(range(100, 120)), [7]]


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(mesh_of(1, 1, 1)):
        yield


def make(config):
    """A model whose predictions differ from position to position, and whose padding of the vocabulary would win."""
    config = dataclasses.replace(config, dropout=0.0).resolved()
    model = jax.jit(lambda: Transformer(config, 257, SEQ_LEN, nnx.Rngs(1)))()
    for weight in (model.blocks.output, model.blocks.down):
        change(weight, 10 * np.asarray(weight[...]))
    for table in {id(table): table for table in (model.embedding, unembedding(model))}.values():
        values = (5 if model.head is None else 20) * np.asarray(table[...])
        values[257:] = 50 * np.sign(values[257:])
        change(table, values)
    return model


def unembedding(model):
    return model.embedding if model.head is None else model.head


def change(weight, values):
    weight[...] = jax.device_put(values, weight[...].sharding)


@pytest.fixture(scope="module", params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def model(request):
    with jax.set_mesh(mesh_of(1, 1, 1)):
        return make(request.param)


@pytest.fixture(scope="module")
def llama():
    with jax.set_mesh(mesh_of(1, 1, 1)):
        return make(LLAMA)


def ask(model, prompts, sampling=GREEDY, max_tokens=12, seed=0):
    return generate(model, prompts, TOKENIZER, Request(SEQ_LEN, max_tokens, sampling, seed))


@jax.jit
def last_logits(model, tokens_BT, length):
    """Of a full forward pass over one row padded on the right."""
    positions = jnp.arange(tokens_BT.shape[1])[None]
    arrays = tokens_BT, positions, jnp.ones_like(tokens_BT)
    inputs = Inputs(*(jax.sharding.reshard(array, sharding.spec("act_batch", "act_seq")) for array in arrays))
    x_BTD = model.hidden(inputs, None).x_BTD
    x_D = jax.sharding.reshard(x_BTD, jax.P())[0, length - 1]
    return jax.sharding.reshard(model.output().table[...], jax.P())[:257] @ x_D


def greedy_by_full_passes(model, prompt, max_tokens):
    ids = [TOKENIZER.end_of_text, *prompt]
    for _ in range(max_tokens):
        padded = np.zeros((1, SEQ_LEN), np.int32)
        padded[0, : len(ids)] = ids
        token = int(last_logits(model, padded, len(ids)).argmax())
        if token == TOKENIZER.end_of_text:
            break
        ids.append(token)
    return ids[1 + len(prompt) :]


def test_greedy_with_the_cache_is_that_of_full_passes(model):
    """Prompts of different lengths in one batch, each as if it were alone."""
    made = ask(model, PROMPTS)
    expected = [greedy_by_full_passes(model, prompt, 12) for prompt in PROMPTS]
    assert made == expected
    assert len({tuple(ids) for ids in made}) == len(PROMPTS) and sum(len(set(ids)) > 4 for ids in made) >= 2


def test_the_context_can_be_filled(model):
    prompt = list(range(30))
    assert ask(model, [prompt], max_tokens=SEQ_LEN - 30) == [greedy_by_full_passes(model, prompt, SEQ_LEN - 30)]
    with pytest.raises(Refused, match="30 tokens and --max_tokens=19 .* context of 48 holds: ask for at most 18"):
        ask(model, [prompt], max_tokens=19)


def test_any_mesh_gives_the_same_text(llama):
    """Four prompts on as many shards of the batch, and one prompt on them."""
    drawn = Sampling(top_k=20, top_p=0.9)
    four = ask(llama, PROMPTS, drawn)
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: Transformer(llama.config, 257, SEQ_LEN, nnx.Rngs(1)))

        def put(leaf, shape):
            return jax.device_put(np.asarray(leaf), jax.NamedSharding(mesh, shape.sharding.spec))

        moved = jax.tree.map(put, llama, shapes)
        assert ask(moved, PROMPTS, drawn) == four
        assert ask(moved, PROMPTS[:1], drawn) == four[:1]


def test_seeds_and_rows(llama):
    drawn = Sampling(temperature=1.5)
    three = ask(llama, [[1, 2]] * 3, drawn)
    assert ask(llama, [[1, 2]] * 3, drawn) == three
    assert ask(llama, [[1, 2]], drawn) == three[:1]
    assert len({tuple(ids) for ids in three}) == 3
    assert ask(llama, [[1, 2]], drawn, seed=1) != three[:1]


def test_one_candidate_is_greedy(llama):
    assert ask(llama, PROMPTS, Sampling(top_k=1)) == ask(llama, PROMPTS)


def test_padding_of_the_vocabulary_is_never_drawn(llama):
    hot = ask(llama, [[1]] * 16, Sampling(temperature=1e4), max_tokens=40)
    ids = {id for row in hot for id in row}
    assert max(ids) < 257 and len(ids) > 150


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_stops_at_the_end_of_the_text(config):
    """The end is made likely where another token was; a row stops there, without it, and the others go on."""
    model = make(config)
    values = np.array(unembedding(model)[...])
    values[TOKENIZER.end_of_text] = 1.2 * values[ask(model, PROMPTS)[2][3]]
    change(unembedding(model), values)
    made = ask(model, PROMPTS)
    assert made == [greedy_by_full_passes(model, prompt, 12) for prompt in PROMPTS]
    assert len({len(ids) for ids in made}) > 1 and not any(TOKENIZER.end_of_text in ids for ids in made)


@pytest.mark.slow
def test_soft_cap_applies_to_what_is_drawn():
    """Capped at ±0.01 all tokens are about as likely; uncapped a few hold everything."""
    capped, free = (make(dataclasses.replace(GPT2, logits_softcap=cap)) for cap in (0.01, 0.0))
    drawn = [
        len({id for row in ask(model, [[1]] * 16, Sampling(0.1), max_tokens=20) for id in row})
        for model in (capped, free)
    ]
    assert drawn[0] > 150 > 2 * drawn[1]


LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03]))[[3, 0, 4, 1, 2]].astype(np.float32)
DRAWS = 20_000


draw = jax.jit(sample)


def frequencies(chosen):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    settings = jax.tree.map(lambda number: jnp.full(DRAWS, number), chosen.row())
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, 5))
    seen = jnp.broadcast_to(jnp.arange(5) % 2 == 1, (DRAWS, 5))  # the first and the second of those below
    drawn = draw(logits, seen, keys, settings)
    return np.bincount(drawn, minlength=5)[[1, 3, 4, 0, 2]] / DRAWS


@pytest.mark.parametrize("chosen, expected", [
    (Sampling(), [0.5, 0.25, 0.15, 0.07, 0.03]),
    (Sampling(temperature=0.5), np.square([0.5, 0.25, 0.15, 0.07, 0.03]) / 0.3408),
    (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
    (Sampling(top_k=99), [0.5, 0.25, 0.15, 0.07, 0.03]),
    (Sampling(top_p=0.7), [2 / 3, 1 / 3, 0, 0, 0]),
    (Sampling(top_p=0.8), [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),
    (Sampling(top_p=0.4), [1, 0, 0, 0, 0]),
    (Sampling(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0, 0]),  # of the three, the first two hold 0.83
    (Sampling(temperature=0), [1, 0, 0, 0, 0]),
    (Sampling(min_p=0.2), [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),
    (Sampling(min_p=0.25, temperature=2), np.append(np.sqrt([0.5, 0.25, 0.15, 0.07]), 0) / 1.8589),
    (Sampling(min_p=1.0), [1, 0, 0, 0, 0]),
    (Sampling(temperature=1e-30), [1, 0, 0, 0, 0]),
    # Scores are logarithms here, so below 0: twice one is the square of a probability.
    (Sampling(repetition_penalty=2.0), np.array([0.25, 0.0625, 0.15, 0.07, 0.03]) / 0.5625),
    (Sampling(repetition_penalty=4.0, temperature=0), [0, 0, 1, 0, 0]),
])  # fmt: skip
def test_the_right_ones_are_drawn_as_often_as_they_should_be(chosen, expected):
    found = frequencies(chosen)
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert ((found > 0) == (np.asarray(expected) > 0)).all()


def test_rows_are_drawn_each_by_its_own_numbers():
    """In one call, as alone; and a positive score is divided by the penalty."""
    kinds = [Sampling(), Sampling(top_k=2), Sampling(top_p=0.4), Sampling(temperature=0), Sampling(min_p=1.0)]
    settings = jax.tree.map(lambda *each: jnp.repeat(jnp.array(each), 2000), *(kind.row() for kind in kinds))
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (10_000, 5))
    drawn = draw(logits, jnp.zeros((10_000, 5), bool), jax.random.split(jax.random.key(1), 10_000), settings)
    found = [set(row) for row in np.asarray(drawn).reshape(5, 2000).tolist()]
    assert found == [{0, 1, 2, 3, 4}, {1, 3}, {1}, {1}, {1}]
    penalty = jax.tree.map(lambda number: number[None], Sampling(temperature=0, repetition_penalty=3.0).row())
    logits = jnp.array([[5.0, 2.0, -1.0]])
    key = jax.random.split(jax.random.key(0), 1)
    seen = jnp.array([[True, False, False]])
    assert draw(logits, seen, key, penalty).item() == 1 and draw(logits - 4, seen, key, penalty).item() == 0


def test_candidates_by_bisection_are_those_by_sorting():
    logits = 3 * np.random.default_rng(0).normal(size=(6, 999)).astype(np.float32)
    logits[0, 500:] = -np.inf
    logits[1, :300] = logits[1].max()  # ties stay together
    for k in (1, 7, 400, 2000):
        kept = np.isfinite(jax.jit(sampling.among_the_first)(logits, jnp.full(6, k)))
        least = -np.sort(-logits, axis=-1)[:, min(k, 999) - 1]
        np.testing.assert_array_equal(kept, (logits >= least[:, None]) & np.isfinite(logits))
    for p in (0.01, 0.5, 0.95, 0.999):
        kept = np.isfinite(jax.jit(sampling.among_the_nucleus)(logits, jnp.full(6, p)))
        for row, logit in zip(kept, logits.astype(np.float64), strict=True):
            probability = np.exp(logit) / np.exp(logit).sum()
            above = np.array([probability[logit > one].sum() for one in logit])
            np.testing.assert_array_equal(row[abs(above - p) > 1e-6], (above < p)[abs(above - p) > 1e-6])


def test_a_repetition_penalty_covers_prompt_and_made(llama):
    """A large one: no token comes twice, nor one of the prompt."""
    prompts = [[10, 20, 30], [40]]
    made = ask(llama, prompts, Sampling(temperature=0, repetition_penalty=1e6), max_tokens=40)
    for prompt, ids in zip(prompts, made, strict=True):
        assert len({*prompt, *ids}) == len(prompt) + len(ids)
    assert any(len(set(ids)) < len(ids) for ids in ask(llama, prompts, max_tokens=40))


def test_rows_take_prompts_at_any_time(llama):
    """A row that begins while others go on, in a row that was used before, gets what it gets alone."""
    eot, model = TOKENIZER.end_of_text, llama.for_decoding()
    drawn = Sampling(top_k=20)
    alone = [ask(llama, [prompt], drawn, max_tokens=9)[0] for prompt in PROMPTS]
    decoder = Decoder(model, TOKENIZER, 2, SEQ_LEN)
    rows = {number: Continuation(TOKENIZER, 9) for number in range(4)}

    def begin(row, number):
        return decoder.begin({row: Prompt([eot, *PROMPTS[number]], 9, drawn, 0, 0)})[row]

    rows[2].push(begin(0, 2))
    rows[2].push(decoder.step([0], 3)[0])
    rows[0].push(begin(1, 0))
    both = decoder.step([0, 1], 32)
    rows[2].push(both[0])
    rows[0].push(both[1][:2])
    rows[3].push(begin(1, 3))  # in place of what was not done
    rows[1].push(begin(0, 1))
    both = decoder.step([0, 1], 32)
    rows[1].push(both[0])
    rows[3].push(both[1])
    assert [rows[number].tokens for number in (1, 2, 3)] == alone[1:]
    assert rows[0].tokens == alone[0][:3]


class Begun(ByteTokenizer):
    begin = 70


def test_a_document_opens_with_the_token_that_the_tokenizer_has_for_it(llama):
    """As `<s>` is Llama's; and that token was not said, while the end-of-text of a prompt was."""

    def ask(tokenizer, prompts, **more):
        return generate(llama, prompts, tokenizer, Request(SEQ_LEN, max_tokens=12, seed=0, **more))

    opened, sampling = [[70, *prompt] for prompt in PROMPTS], Sampling(temperature=0, repetition_penalty=1e6)
    made = ask(Begun(""), PROMPTS, sampling=GREEDY)
    assert made == ask(TOKENIZER, opened, sampling=GREEDY, opened=True) != ask(TOKENIZER, PROMPTS, sampling=GREEDY)
    decoder = Decoder(llama.for_decoding(), Begun(""), 1, SEQ_LEN)
    decoder.begin({0: Prompt([70, 1, 256], 5, sampling, 0, 0)})
    seen = np.flatnonzero(decoder._rows.seen_BV[0])
    assert {1, 256} < set(seen.tolist()) and len(seen) == 3


def test_no_request_compiles_anew(llama):
    """Other numbers, and prompts of other lengths up to the same multiple."""
    decoder = Decoder(llama.for_decoding(), TOKENIZER, 2, SEQ_LEN)
    decoder.begin({0: Prompt([256, 1], 5, GREEDY, 0, 0)})
    decoder.step([0], 4)
    before = begin._cache_size(), advance._cache_size()
    decoder.begin({1: Prompt([256, 1, 2, 3], 7, Sampling(0.3, 5, 0.9, 0.1, 1.2), 9, 1)})
    decoder.step([0, 1], 2)
    assert (begin._cache_size(), advance._cache_size()) == before


@pytest.mark.slow
def test_lengths_alike_share_a_program():
    """Batches whose longest rows are of 130 to 256 tokens take the same one."""
    long = dataclasses.replace(LLAMA, dropout=0.0).resolved()
    model = jax.jit(lambda: Transformer(long, 257, 300, nnx.Rngs(1)))()

    def make_text(length):
        generate(model, [[1] * length], TOKENIZER, Request(300, 2, GREEDY, seed=0))

    make_text(130)
    before = begin._cache_size(), advance._cache_size()
    make_text(200)
    assert (begin._cache_size(), advance._cache_size()) == before
    assert [doubled(64, needed, 300) for needed in (1, 64, 65, 250, 257, 400)] == [64, 64, 128, 256, 300, 300]


def test_the_whole_is_what_came_in_pieces(llama):
    """And a row ends with the token in which a stop string ends, however many steps are between two looks."""
    drawn = Sampling(temperature=1.5)
    whole = ask(llama, PROMPTS, drawn, max_tokens=20)
    texts = [TOKENIZER.decode(ids) for ids in whole]
    number, end = next((n, at + 2) for n in range(4) for at in range(4, 18) if max(whole[n][at : at + 2]) < 128)
    stop = TOKENIZER.decode(whole[number][end - 2 : end])
    for steps in (1, 3, 32):
        texts_so_far = [""] * 4
        for rows in grow(llama, PROMPTS, TOKENIZER, Request(SEQ_LEN, 20, drawn, 0, (stop,)), steps=steps):
            texts_so_far = [text + row.news() for text, row in zip(texts_so_far, rows, strict=True)]
        assert texts_so_far == [text.partition(stop)[0] for text in texts]
        assert rows[number].tokens == whole[number][:end] and rows[number].finish == "stop"
    made = generate(llama, PROMPTS, TOKENIZER, Request(SEQ_LEN, 20, drawn, 0, (stop,)))
    assert made == [row.tokens for row in rows]
    with pytest.raises(Refused, match='--stop=""'):
        generate(llama, PROMPTS, TOKENIZER, Request(SEQ_LEN, 20, drawn, 0, ("",)))


def test_samples(llama):
    texts = samples(llama, TOKENIZER, "ab", seq_len=SEQ_LEN, count=2, seed=0)
    assert len(texts) == 2 and all(text.startswith("ab") for text in texts)
    long = "".join(chr(97 + i % 26) for i in range(2 * SEQ_LEN))
    assert samples(llama, TOKENIZER, long, seq_len=SEQ_LEN, count=1, seed=0)[0].startswith(long)
    assert samples(llama, TOKENIZER, "", seq_len=SEQ_LEN, count=0, seed=0) == []


def test_refused(llama):
    with pytest.raises(Refused, match="The prompt has 48 tokens, and the context of 48 takes at most 47"):
        ask(llama, [[1] * 48])
    for drawn, words in (
        (Sampling(temperature=-1.0), "--temperature=-1.0"),
        (Sampling(temperature=float("nan")), "--temperature=nan"),
        (Sampling(top_k=-2), "--top_k=-2"),
        (Sampling(top_p=0.0), "--top_p=0.0"),
        (Sampling(top_p=1.1), "--top_p=1.1"),
        (Sampling(min_p=1.5), "--min_p=1.5"),
        (Sampling(temperature=float("inf")), "--temperature=inf"),
        (Sampling(repetition_penalty=0.0), "--repetition_penalty=0.0"),
    ):
        with pytest.raises(Refused, match=words):
            ask(llama, [[1]], drawn)
    with pytest.raises(Refused, match="--max_tokens=0 must be at least 1"):
        ask(llama, [[1]], max_tokens=0)
