import grain
import numpy as np
import pytest

from gptjax.data.stream import shuffle


@pytest.mark.parametrize("largest", [1, 2, 255, 1000, 65_535, 65_537, 100_000, 10**9, 2**40 + 5])
def test_it_is_grains(largest):
    rng = np.random.default_rng(0)
    indexes = np.unique(np.append(rng.integers(0, largest + 1, 50), [0, largest]))
    for key in (0, 1, 123_456_789, 2**32 - 1):
        expected = [
            grain.experimental.index_shuffle(int(index), max_index=largest, seed=key, rounds=4) for index in indexes
        ]
        np.testing.assert_array_equal(shuffle.permuted(indexes, largest, key), expected)


@pytest.mark.parametrize("rows", [1, 2, 300, 65_536, 65_537, 65_538])
def test_it_is_a_permutation(rows):
    """Of 65,537 rows too, where Grain's own gives one twice."""
    for epoch in (0, 1):
        examples = np.arange(epoch * rows, (epoch + 1) * rows)
        order = shuffle.shuffled(examples, rows, 0, "")
        assert np.array_equal(np.sort(order), np.arange(rows))
        some = np.random.default_rng(0).permutation(rows)[:50]
        np.testing.assert_array_equal(shuffle.shuffled(examples[some], rows, 0, ""), order[some])
    assert rows < 300 or not np.array_equal(order, shuffle.shuffled(examples, rows, 0, "code"))
