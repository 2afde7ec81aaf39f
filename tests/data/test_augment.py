import argparse
import inspect

import numpy as np
import pytest
from support.runs import data_of, mesh_of, tiny

from gptjax.data.preparation.prepare import DataConfig, prepare
from gptjax.data.stream import augment, stream
from gptjax.data.stream.augment import FIM, Augment, AugmentConfig
from gptjax.errors import Refused
from gptjax.tokenizers.tokenizer import TokenizerConfig
from gptjax.training import corpus as corpus_

T = 64
PIECES = TokenizerConfig(vocab_size=600, special_tokens=",".join(FIM))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Lines of Python in SentencePiece's pieces, with the special tokens of fill in the middle."""
    folder = tmp_path_factory.mktemp("lines")
    lines = inspect.getsource(argparse).splitlines(keepends=True)
    for number in range(0, len(lines), 8):
        (folder / f"{number}.txt").write_text("".join(lines[number : number + 8]))
    data = DataConfig(source="text", path=str(folder / "*.txt"), heldout_fraction=0.1)
    return prepare(data, PIECES, tmp_path_factory.mktemp("augment") / "store")


def batches(store, **changes):
    return data_of(tiny(seq_len=T, tokenizer=PIECES, augment=AugmentConfig(**changes)), store)


def segments(batch):
    """(inputs, last target) of each document of each row."""
    for row in range(len(batch.inputs)):
        for number in range(1, batch.segments[row].max() + 1):
            places = np.flatnonzero(batch.segments[row] == number)
            yield batch.inputs[row, places], batch.targets[row, places]


def test_the_middle_goes_back_between(pieces):
    """Prefix, middle and suffix make the document again, and half of them are moved suffix first."""
    tokenizer = pieces.tokenizer
    prefix, suffix, middle = (tokenizer.special[name] for name in FIM)
    own, rng, spm = Augment(AugmentConfig(fim_rate=1.0), tokenizer, 0), np.random.default_rng(0), 0
    for _ in range(400):
        body = rng.integers(300, 390, rng.integers(1, 30))
        for head in ([], [tokenizer.begin]):
            moved = own.document(np.array([*head, *body, 77]), rng)
            assert moved[-1] == tokenizer.end_of_text and list(moved[: len(head)]) == head
            moved = moved[len(head) : -1].tolist()
            assert len(moved) == len(body) + 3 and moved[0] == prefix
            a, b = moved.index(suffix), moved.index(middle)
            if a == 1:  # SPM, or an empty prefix
                rest = moved[b + 1 :]
                parts = (rest, moved[a + 1 : b])
                assert [*parts[0], *parts[1]] == body.tolist()
            else:
                assert [*moved[1:a], *moved[b + 1 :], *moved[a + 1 : b]] == body.tolist()
            spm += a == 1
    assert 0.45 < spm / 800 < 0.62  # of the others some have an empty prefix


def test_rates_are_the_asked_ones(pieces):
    prefix = pieces.tokenizer.special[FIM[0]]
    data = (batches(pieces, fim_rate=0.3).batch(index, np.arange(8)) for index in range(40))
    found = [prefix in inputs for batch in data for inputs, _ in segments(batch)]
    assert len(found) > 300 and 0.24 < np.mean(found) < 0.36
    plain, dropped = batches(pieces), batches(pieces, token_dropout=0.2)
    changed = []
    for index in range(10):
        one, other = plain.batch(index, np.arange(8)), dropped.batch(index, np.arange(8))
        for field, same in list(zip(one, other, strict=True))[1:]:
            np.testing.assert_array_equal(field, same)
        special = np.isin(one.inputs, list(pieces.tokenizer.special.values()))
        np.testing.assert_array_equal(one.inputs[special], other.inputs[special])
        assert all(np.isin(b, a).all() for a, b in zip(one.inputs, other.inputs, strict=True))
        changed.append((one.inputs != other.inputs)[~special & (one.weights > 0)].mean())
    assert 0.15 < np.mean(changed) < 0.2  # a few are replaced by their like


def test_another_encoding_is_of_the_same_text(pieces):
    plain, again = batches(pieces), batches(pieces, subword_alpha=0.2)
    tokenizer, longer = pieces.tokenizer, 0
    for index in range(5):
        one, other = plain.batch(index, np.arange(8)), again.batch(index, np.arange(8))
        for row in range(8):
            text, start = (tokenizer.decode(batch.inputs[row].tolist()) for batch in (one, other))
            assert text.startswith(start) and len(start) > len(text) / 3
            longer += start != text
        assert (other.inputs != one.inputs).any()
    assert longer > 20


def test_targets_follow_inputs_and_positions_begin_anew(pieces):
    data = batches(pieces, subword_alpha=0.1, fim_rate=0.5)
    for index in range(5):
        batch = data.batch(index, np.arange(8))
        for inputs, targets in segments(batch):
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
        assert ((batch.segments > 0) == (batch.weights > 0)).all()
        begins = np.diff(batch.segments, axis=1, prepend=0) > 0
        assert (batch.positions[begins] == 0).all()
        inside = ~begins & (batch.segments > 0)
        assert (np.diff(batch.positions, axis=1, prepend=0)[inside] == 1).all()


def test_they_are_functions_of_seed_batch_and_row(pieces):
    changes = dict(subword_alpha=0.1, fim_rate=0.5, token_dropout=0.1)
    whole = batches(pieces, **changes).batch(7, np.arange(8))
    parts = [batches(pieces, **changes).batch(7, rows) for rows in np.split(np.arange(8), 4)]
    for field, rows in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(field, np.concatenate(rows))
    config = tiny(seq_len=T, seed=1, tokenizer=PIECES, augment=AugmentConfig(**changes))
    assert (data_of(config, pieces).batch(7, np.arange(8)).inputs != whole.inputs).any()
    own = Augment(AugmentConfig(**changes), pieces.tokenizer, 0)
    row = [field[0] for field in batches(pieces).batch(7, np.arange(8))]

    def augmented(batch):
        return own.row(batch, 0, row[0], row[1], row[3])[0]

    assert (augmented(7) == whole.inputs[0]).all() and (augmented(8) != augmented(7)).any()


def test_evaluation_sees_none_of_it(pieces, monkeypatch):
    def refuse(*args):
        raise AssertionError("augmented")

    monkeypatch.setattr(Augment, "row", refuse)
    assert len(list(stream.heldout_batches(pieces, seq_len=T, batch_size=8, rows=np.arange(8))))
    with pytest.raises(AssertionError, match="augmented"):
        batches(pieces, fim_rate=0.1).batch(0, np.arange(8))


@pytest.mark.parametrize("changes, words", [
    (dict(fim_rate=1.5), "augment.fim_rate=1.5 must be from 0 to 1"),
    (dict(token_dropout=-0.1), "augment.token_dropout=-0.1 must be"),
    (dict(fim_rate=0.5), r"augment.fim_rate=0.5 needs 3 special tokens, .* lacks <\|fim_prefix\|>"),
])  # fmt: skip
def test_what_is_refused(changes, words):
    with pytest.raises(Refused, match=words):
        tiny(augment=AugmentConfig(**changes))


def test_a_tokenizer_that_can_not_is_refused(store):
    with pytest.raises(Refused, match=r"lacks <\|fim_prefix\|>: prepare the data with tokenizer.special_tokens="):
        batches(store, fim_rate=0.5)
    with pytest.raises(Refused, match="tokenizer.kind=byte has one encoding of a text"):
        batches(store, subword_alpha=0.1)
    assert augment.FIM == FIM


def test_it_is_refused_where_the_corpus_is_prepared(store, corpus, tmp_path):
    """Before anything is compiled, and so that all processes know of it."""
    data = DataConfig(source="text", path=str(corpus), store=str(store.folder), heldout_fraction=0.3)
    with pytest.raises(Refused, match="tokenizer.kind=byte has one encoding of a text"):
        corpus_.prepare(tiny(data=data, augment=AugmentConfig(subword_alpha=0.1)), tmp_path / "run", mesh_of(1, 1, 1))
    assert not (tmp_path / "run").exists()
