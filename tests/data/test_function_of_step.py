"""Rows are a function of the step: bit for bit the same in every process, whatever its salt and its history."""

import inspect
import json
import subprocess
import sys

import pytest

from gptjax.data.preparation.prepare import DataConfig, prepare
from gptjax.data.stream.augment import FIM
from gptjax.tokenizers.tokenizer import TokenizerConfig

# Prints the hash of a step's rows, for each of several settings of everything that is drawn.
PROGRAM = """
import hashlib, json, sys
import numpy as np
from gptjax.data.stream.augment import AugmentConfig
from gptjax.data.stream.curriculum import Phase
from gptjax.data.stream.mixture import PERIOD, Corpus
from gptjax.data.stream.packing import PackingConfig
from gptjax.data.stream.stream import Stream
from gptjax.data.store.store import Store

bpe, unigram, before = sys.argv[1:]
stores = {"bpe": {"": Store.open(bpe)}, "unigram": {"": Store.open(unigram)}}
found = {}
for kind, opened in stores.items():
    for name, changes in {
        "plain": {}, "subwords": dict(subword_alpha=0.2), "middle": dict(fim_rate=0.7, fim_spm_rate=0.5),
        "dropped": dict(token_dropout=0.2), "all": dict(subword_alpha=0.1, fim_rate=0.5, token_dropout=0.1),
    }.items():
        for method in ("concat", "best_fit"):
            phases = [Phase(0, 64, 8, {"": PERIOD})]
            stream = Stream(Corpus(opened), phases, 64, 3, PackingConfig(method=method), AugmentConfig(**changes))
            for index in range(int(before)):
                stream.batch(index, np.arange(8))
            batch = stream.batch(9, np.arange(8))
            digest = hashlib.sha256(b"".join(np.ascontiguousarray(field).tobytes() for field in batch)).hexdigest()
            found[f"{kind} {name} {method}"] = digest
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    lines = inspect.getsource(inspect).splitlines(keepends=True)
    for number in range(0, len(lines), 8):
        (folder / f"{number}.txt").write_text("".join(lines[number : number + 8]))
    data = DataConfig(source="text", path=str(folder / "*.txt"), heldout_fraction=0.1)
    made = []
    for model in ("bpe", "unigram"):
        config = TokenizerConfig(vocab_size=500, model=model, special_tokens=",".join(FIM))
        made.append(str(prepare(data, config, folder / model).folder))
    return made


def test_two_processes_read_the_same_rows(stores):
    """The second process has another salt of hashes, and has drawn other rows before."""
    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, *stores, str(number * 2)],
                env={"PYTHONHASHSEED": str(number + 1), "PYTHONPATH": ":".join(sys.path)},
                capture_output=True,
                check=True,
            ).stdout
        )
        for number in (0, 1)
    ]
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(found[0])
