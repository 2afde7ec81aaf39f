import itertools
import math
import types

import numpy as np
import pytest

from gptjax.data.batch import Batch
from gptjax.data.preparation.prepare import DataConfig, prepare
from gptjax.data.stream import stream
from gptjax.data.stream.curriculum import Phase
from gptjax.data.stream.mixture import PERIOD, Corpus
from gptjax.data.stream.packing import Concat
from gptjax.errors import Refused
from gptjax.tokenizers.tokenizer import TokenizerConfig

T = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (40, 50))
    for index, text in enumerate(letters):
        (folder / f"{index:02}.txt").write_text("".join(text[: 3 * index % 47 + 1]))
    data = DataConfig(source="text", path=str(folder / "*.txt"), heldout_fraction=0.4)
    return prepare(data, TokenizerConfig(kind="byte"), folder / "store")


@pytest.fixture(scope="module")
def tokens(store):
    split = store.split("train")
    return split.read(np.array([0]), split.tokens)[0].astype(np.int32)


def train(store, batch_size=8, seed=0, rows=None, seq_len=T):
    phase = Phase(0, seq_len, batch_size, {"": PERIOD})
    data = stream.Stream(Corpus({"": store}), [phase], seq_len, seed)
    return Batches(data, np.arange(batch_size) if rows is None else rows)


class Batches:
    """Those of some rows, by their number."""

    def __init__(self, data, rows):
        self.data, self.rows = data, rows

    def __getitem__(self, index):
        return self.data.batch(index, self.rows)


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def concatenated(batches):
    return Batch(*map(np.concatenate, zip(*batches, strict=True)))


def window_of(tokens, row):
    """Which window a row of inputs is: the corpus is random, so that no two are alike."""
    windows = np.append(tokens[:-1], np.zeros(-(len(tokens) - 1) % T, np.int32)).reshape(-1, T)
    (found,) = np.flatnonzero((windows == row).all(axis=1))
    return int(found)


def test_fields_have_the_shape_and_dtype_promised(store):
    batch = train(store, batch_size=4)[3]
    assert {field.shape for field in batch} == {(4, T)}
    assert [str(field.dtype) for field in batch] == ["int32"] * 4 + ["float32"]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
def test_an_epoch_has_each_window_once_in_an_order_of_its_own(store, tokens, batch_size):
    num_windows = -(-(len(tokens) - 1) // T)
    batches = train(store, batch_size)
    # Three epochs, which no batch size above 1 divides.
    rows = concatenated([batches[step] for step in range(-(-3 * num_windows // batch_size))]).inputs[: 3 * num_windows]
    epochs = np.array([window_of(tokens, row) for row in rows]).reshape(3, num_windows)
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_windows))
    assert len({tuple(epoch) for epoch in [*epochs, range(num_windows)]}) == 4


def test_an_epoch_predicts_every_token_but_the_first_once(store, tokens):
    num_windows = -(-(len(tokens) - 1) // T)
    epoch = concatenated([train(store, 1)[step] for step in range(num_windows)])
    real = epoch.weights == 1
    assert set(np.unique(epoch.weights)) == {0, 1}
    assert real.sum() == len(tokens) - 1
    np.testing.assert_array_equal(np.sort(epoch.targets[real]), np.sort(tokens[1:]))
    assert (epoch.inputs[real] != epoch.targets[real]).any()


def test_padding_is_marked(store, tokens):
    assert (len(tokens) - 1) % T  # the last window is partial
    num_windows = -(-(len(tokens) - 1) // T)
    epoch = concatenated([train(store, 1)[step] for step in range(num_windows)])
    padding = epoch.weights == 0
    assert padding.any()
    np.testing.assert_array_equal(epoch.segments == 0, padding)
    for field in (epoch.inputs, epoch.targets, epoch.positions):
        assert (field[padding] == 0).all()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_global_batch_is_the_same_however_it_is_split(store, hosts):
    whole = train(store, 8)
    parts = [train(store, 8, rows=rows) for rows in np.split(np.arange(8), hosts)]
    for step in (0, 1, 17, 1000):
        assert_equal(whole[step], concatenated([part[step] for part in parts]))
    assert_equal([field[[5, 2]] for field in whole[9]], train(store, 8, rows=np.array([5, 2]))[9])


def test_step_k_is_the_same_by_iteration_from_anywhere(store):
    batches = train(store)
    for start, stop in ((0, 12), (7, 12), (11, 12)):
        for step, batch in zip(range(start, stop), stream.iterate(batches.__getitem__, start, stop), strict=True):
            assert_equal(batch, batches[step])
            assert_equal(batch, train(store)[step])
    assert list(stream.iterate(batches.__getitem__, 5, 5)) == []


def test_seeds_give_other_orders_and_not_each_others_epochs(store, tokens):
    num_windows = -(-(len(tokens) - 1) // T)
    orders = [
        tuple(window_of(tokens, train(store, 1, seed)[step].inputs[0]) for step in range(epoch, epoch + num_windows))
        for seed in (0, 1, 2)
        for epoch in (0, num_windows)
    ]
    assert len(set(orders)) == 6


def test_segments_and_positions_follow_documents(store):
    end = store.tokenizer.end_of_text
    for batch in itertools.islice(stream.iterate(train(store).__getitem__, 0, 20), 20):
        for row in range(8):
            segment, position = 1, 0
            for column in range(T):
                if batch.weights[row, column] == 0:
                    break
                if column and batch.inputs[row, column] == end:
                    segment, position = segment + 1, 0
                assert (batch.segments[row, column], batch.positions[row, column]) == (segment, position)
                position += 1
    assert batch.segments.max() > 1


@pytest.mark.parametrize("begin", [256, 3])
def test_segments_of_one_written_out_window(begin):
    """Where a tokenizer has another token than end-of-text to begin with, it is that among the inputs."""
    end, tokenizer = 256, types.SimpleNamespace(begin=begin, end_of_text=256)

    class Three:
        tokens, has_prompts = 9, False

        def spans(self, starts, lengths):
            corpus = np.array([end, 7, 8, end, 9, end, end, 5, 6] + [0] * 20, np.uint16)
            return np.concatenate(
                [corpus[start : start + length] for start, length in zip(starts, lengths, strict=True)]
            )

    spans = Concat(9, 6).spans(np.array([0, 1, 2]), np.zeros(3, np.int64), 6)
    batch = stream._rows(Three(), spans, 3, 6, tokenizer)
    np.testing.assert_array_equal(batch.inputs, [[begin, 7, 8, begin, 9, begin], [begin, 5, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.targets, [[7, 8, end, 9, end, end], [5, 6, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 3], [1, 1, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.weights, [[1] * 6, [1, 1, 0, 0, 0, 0], [0] * 6])
    spans = Concat(7, 6).spans(np.array([0]), np.zeros(1, np.int64), 6)  # whole rows alone
    np.testing.assert_array_equal(stream._rows(Three(), spans, 1, 6, tokenizer).inputs, batch.inputs[:1])
    np.testing.assert_array_equal(stream._rows(Three(), spans, 1, 6, tokenizer).targets, batch.targets[:1])


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_heldout_is_all_windows_in_order(store, batch_size):
    split = store.split("heldout")
    tokens = split.read(np.array([0]), split.tokens)[0].astype(np.int32)
    batches = stream.heldout_batches(store, seq_len=T, batch_size=batch_size, rows=np.arange(batch_size))
    assert len(batches) == math.ceil(math.ceil((len(tokens) - 1) / T) / batch_size)
    everything = concatenated(list(batches))
    assert {len(batch.inputs) for batch in batches} == {batch_size}
    np.testing.assert_array_equal(everything.inputs[everything.weights == 1], tokens[:-1])
    np.testing.assert_array_equal(everything.targets[everything.weights == 1], tokens[1:])


def test_heldout_rows_split_as_the_batch_does(store):
    whole = stream.heldout_batches(store, seq_len=T, batch_size=4, rows=np.arange(4))
    parts = [stream.heldout_batches(store, seq_len=T, batch_size=4, rows=rows) for rows in np.split(np.arange(4), 2)]
    assert len(whole) > 1
    for index in range(len(whole)):
        assert_equal(whole[index], concatenated([part[index] for part in parts]))


def test_a_corpus_shorter_than_a_window_is_refused(store, tokens):
    size = len(tokens)
    train(store, seq_len=size - 1)[0]
    with pytest.raises(Refused, match=f"has {size} tokens to train on, .* seq_len={size} takes {size + 1}"):
        train(store, seq_len=size)
