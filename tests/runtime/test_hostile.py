"""Every reader meets hostile files and words with a value or a refusal. `python -m benchmarks.fuzz` tries many more."""

import gc

import pytest

from benchmarks import fuzz
from gptjax.data.store import store


# When one of its reads fails, orbax leaves the others to themselves.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_value_or_a_refusal(name, tmp_path, monkeypatch):
    for size in ("SHARD", "CHUNK"):  # put back what the readers of stores make small
        monkeypatch.setattr(store, size, getattr(store, size))
    found = fuzz.fuzz(name, 200, tmp_path)
    gc.collect()
    assert not found["other"], found["examples"]
    assert found["accepted"] and (found["refused"] or name == "metrics.jsonl")  # of which a bad line is dropped
