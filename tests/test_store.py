import json
import shutil

import numpy as np
import pytest
from etils import epath

from gptjax import tokenizer
from gptjax.data import store as stores
from gptjax.data.store import Store
from gptjax.errors import Refused
from gptjax.tokenizer import TokenizerConfig

DOCUMENTS = [np.arange(n) + 300 * n for n in (5, 1, 20, 3)]


def write(folder, vocab_size=60_000):
    folder = epath.Path(folder)
    trained = tokenizer.train(TokenizerConfig(kind="byte"), [], folder / "tokenizer")
    splits = {}
    for name in stores.SPLITS:
        writer = stores.SplitWriter(folder / name, stores.token_dtype(vocab_size))
        for index, tokens in enumerate(DOCUMENTS):
            writer.append(f"{index}.txt", index * 10, tokens, len(tokens) - 1)
        splits[name] = writer.close()
    stores.write_manifest(folder, {"tokenizer_hash": trained.hash, "vocab_size": vocab_size, "splits": splits})
    return Store.open(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    write(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to be spoiled."""
    return shutil.copytree(whole, tmp_path / "store")


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_written_is_read(whole):
    split = Store.open(whole).split("train")
    everything = np.concatenate(DOCUMENTS)
    assert (split.tokens, split.documents, split.bytes) == (29, 4, 25)
    np.testing.assert_array_equal(split.read(np.array([0]), 29)[0], everything)
    starts = np.array([7, 0, 3, 3])
    np.testing.assert_array_equal(split.read(starts, 6), [everything[start : start + 6] for start in starts])
    np.testing.assert_array_equal(split.document_starts(), [0, 5, 6, 26])
    np.testing.assert_array_equal(split.document_starts(1, 3), [5, 6])
    names = [json.loads(line) for line in (whole / "train" / "documents.jsonl").read_text().splitlines()]
    assert names[2] == {"name": "2.txt", "offset": 20}


def test_tokens_after_the_last_are_zero(whole):
    windows = Store.open(whole).split("train").read(np.array([27, 29]), 4)
    np.testing.assert_array_equal(windows, [[DOCUMENTS[3][1], DOCUMENTS[3][2], 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("vocab_size, dtype", [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_dtype_is_the_smallest_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    assert write(tmp_path / "store", vocab_size).split("train").read(np.array([0]), 1).dtype == dtype


def test_several_shards_are_one_array(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "SHARD", 16)
    monkeypatch.setattr(stores, "CHUNK", 4)
    split = write(tmp_path / "store").split("heldout")
    assert len(list((tmp_path / "store/train/tokens/c").iterdir())) == 2
    np.testing.assert_array_equal(split.read(np.array([0, 10]), 19)[1], np.concatenate(DOCUMENTS)[10:])


def test_missing_store_is_refused(tmp_path):
    with pytest.raises(Refused, match="holds no token store"):
        Store.open(tmp_path / "nowhere")


def test_other_format_is_refused(folder):
    edit(folder, format=7)
    with pytest.raises(Refused, match="format 7 and this gptjax reads format 1"):
        Store.open(folder)


def test_other_tokenizer_is_refused(folder):
    edit(folder, tokenizer_hash="0123456789abcdef")
    with pytest.raises(Refused, match=r"has hash \w{12}, but .* were made by 0123456789ab"):
        Store.open(folder)


def test_cut_manifest_is_refused(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:50])
    with pytest.raises(Refused, match="manifest.json is cut short"):
        Store.open(folder)


@pytest.mark.parametrize("name", ["train/tokens/c/0", "heldout/tokens/c/0", "heldout/documents.jsonl"])
def test_missing_and_truncated_files_are_refused(folder, name):
    file = folder / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(Refused, match=rf"{name} has {len(content) - 1} bytes where {len(content)} bytes were written"):
        Store.open(folder)
    file.unlink()
    with pytest.raises(Refused, match=f"{name} is missing where {len(content)} bytes"):
        Store.open(folder)


def test_a_changed_token_is_an_error_and_not_a_batch(folder):
    file = folder / "train/tokens/c/0"
    content = bytearray(file.read_bytes())
    content[8] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="train/tokens/c/0.*Digest mismatch"):
        Store.open(folder).split("train").read(np.array([0]), 4)
