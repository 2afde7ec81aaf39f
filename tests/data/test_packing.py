from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.runs import data_of, mesh_of, tiny
from support.stores import write_store

from gptjax.data.store.store import Store
from gptjax.data.stream import packing, stream
from gptjax.data.stream.packing import BestFit, Concat, PackingConfig
from gptjax.errors import Refused
from gptjax.models.config import ModelConfig
from gptjax.models.objective import batch_sums
from gptjax.training.step import init_state

T = 32


@pytest.fixture(scope="module")
def split_store(tmp_path_factory):
    return Store.open(write_store(tmp_path_factory.mktemp("packing") / "store", 3000))


def one_by_one(sizes, length):
    """Best-fit decreasing as its definition says it: the row with the least room, of several the first."""
    room, row_of = [], np.empty(len(sizes), int)
    for item in np.argsort(-sizes, kind="stable"):
        fits = [(free, row) for row, free in enumerate(room) if free >= sizes[item]]
        row = min(fits)[1] if fits else len(room)
        room[row:] = room[row:] or [length]
        room[row] -= sizes[item]
        row_of[item] = row
    return row_of


@pytest.mark.parametrize("length, seed", [(8, 0), (30, 1), (64, 2)])
def test_best_fit_is_what_its_definition_says(length, seed):
    rng = np.random.default_rng(seed)
    for count in (1, 7, 300):
        sizes = rng.integers(1, length + 1, count) if seed else rng.choice([1, 2, 3, length], count)
        found = packing.best_fit(sizes, length)
        filled = np.bincount(found, sizes)
        assert filled.max() <= length and filled.min() > 0
        expected = np.bincount(one_by_one(sizes, length), sizes)
        np.testing.assert_array_equal(np.sort(filled), np.sort(expected))


def test_rows_hold_each_token_once(split_store):
    split = split_store.split("train")
    for made in (Concat(split.tokens, T), BestFit(split.document_starts(), split.tokens, T)):
        spans = made.spans(np.arange(made.rows), np.zeros(made.rows, int), T)
        tokens = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(spans.starts, spans.lengths, strict=True)]
        )
        np.testing.assert_array_equal(np.sort(tokens), np.arange(split.tokens - 1))
        ends = np.zeros(made.rows, int)
        for row, place, _, length in zip(*spans, strict=True):
            assert place == ends[row]
            ends[row] += length
        assert ends.max() <= T and ends.min() > 0
        for quarter in range(4):  # of each row its parts
            part = made.spans(np.arange(made.rows), np.full(made.rows, 8 * quarter), 8)
            whole = {
                (r, p + i): s + i for r, p, s, n in zip(*spans, strict=True) for i in range(n) if p + i >= 8 * quarter
            }
            found = {(r, p + i + 8 * quarter): s + i for r, p, s, n in zip(*part, strict=True) for i in range(n)}
            assert found == {key: token for key, token in whole.items() if key[1] < 8 * quarter + 8}


def test_documents_stay_whole_and_there_is_little_padding(split_store):
    split = split_store.split("train")
    starts = split.document_starts()
    ends = np.append(starts[1:], split.tokens)
    fitted, end_to_end = BestFit(starts, split.tokens, T), Concat(split.tokens, T)
    spans = fitted.spans(np.arange(fitted.rows), np.zeros(fitted.rows, int), T)
    begins, stops = set(spans.starts), set(spans.starts + spans.lengths)
    for start, end in zip(starts, ends, strict=True):
        assert start in begins and (end in stops or end == split.tokens)
        pieces = [n for s, n in zip(spans.starts, spans.lengths, strict=True) if start <= s < end]
        assert len(pieces) == -(-(min(end, split.tokens - 1) - start) // T)
    best, concat = (packing.report(made, split, T) for made in (fitted, end_to_end))
    assert best.truncated == np.mean(ends - starts > T) < concat.truncated
    assert concat.truncated == np.mean(
        [s // T != (min(e, split.tokens - 1) - 1) // T for s, e in zip(starts, ends, strict=True)]
    )
    assert best.padding == pytest.approx(1 - spans.lengths.sum() / (T * fitted.rows)) and best.padding < 0.1
    unread = SimpleNamespace(tokens=split.tokens)  # the starts of a million documents are read once
    assert packing.report(fitted, unread, T) == best
    assert concat.padding == pytest.approx(1 - (split.tokens - 1) / (T * end_to_end.rows)) and concat.padding < 0.02


def test_fields_of_a_packed_batch(split_store):
    config = tiny(seq_len=T, packing=PackingConfig("best_fit"))
    data, split = data_of(config, split_store), split_store.split("train")
    tokens = split.read(np.array([0]), split.tokens)[0].astype(int)
    for index in range(5):
        batch = data.batch(index, np.arange(8))
        for row, source in enumerate(data.sources(index)):
            filled = 0
            for number, (place, start, length) in enumerate(source.spans, 1):
                part = slice(place, place + length)
                np.testing.assert_array_equal(batch.inputs[row, part], tokens[start : start + length])
                np.testing.assert_array_equal(batch.targets[row, part], tokens[start + 1 : start + length + 1])
                assert (batch.segments[row, part] == number).all()
                np.testing.assert_array_equal(batch.positions[row, part], np.arange(length))
                filled += length
            assert (batch.weights[row, :filled] == 1).all()
            assert all((field[row, filled:] == 0).all() for field in batch)
        halves = [data.batch(index, rows) for rows in (np.arange(4), np.arange(4, 8))]
        for field, parts in zip(batch, zip(*halves, strict=True), strict=True):
            np.testing.assert_array_equal(field, np.concatenate(parts))


def test_nothing_is_looked_at_across_documents(split_store):
    """The loss of a row's last document is the same whatever those before it say."""
    config = tiny(ModelConfig(num_layers=1, num_heads=2, embed_dim=16), seq_len=T, packing=PackingConfig("best_fit"))
    data, mesh = data_of(config, split_store), mesh_of(1, 1, 1)
    batch = data.batch(0, np.arange(8))
    assert (batch.segments.max(axis=1) >= 2).any()
    last = (batch.segments == batch.segments.max(axis=1, keepdims=True)) & (batch.segments > 1)
    others = np.where(last | (batch.segments == 0), batch.inputs, 99)
    assert (others != batch.inputs).any()

    @jax.jit
    def nll(model, inputs, weights):
        changed = batch._replace(inputs=inputs, weights=weights)
        return batch_sums(model, changed, None, vocab_size=257, loss=config.loss).nll

    with jax.set_mesh(mesh):
        model = jax.jit(lambda: init_state(config, 257).model)()
        of_last = [float(nll(model, inputs, last.astype(np.float32))) for inputs in (batch.inputs, others)]
        of_all = [float(nll(model, inputs, batch.weights)) for inputs in (batch.inputs, others)]
    assert of_last[0] == of_last[1] and of_all[0] != of_all[1]


def test_evaluation_is_of_windows_however_training_is_packed(split_store):
    batches = stream.heldout_batches(split_store, seq_len=T, batch_size=4, rows=np.arange(4))
    split = split_store.split("heldout")
    inputs = np.concatenate([batch.inputs[batch.weights > 0] for batch in batches])
    np.testing.assert_array_equal(inputs, split.read(np.array([0]), split.tokens - 1)[0])


def test_an_unknown_method_is_refused():
    with pytest.raises(
        Refused, match='packing.method="bestfit" must be one of concat, best_fit. Did you mean "best_fit"?'
    ):
        tiny(packing=PackingConfig("bestfit"))
