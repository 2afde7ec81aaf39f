import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath

from gptjax.data.store import store
from gptjax.data.store.store import Store
from gptjax.errors import Refused
from gptjax.tokenizers import tokenizer
from gptjax.tokenizers.tokenizer import TokenizerConfig

DOCUMENTS = [np.arange(n) + 300 * n for n in (5, 1, 20, 3)]


def write(folder, vocab_size=60_000):
    folder = epath.Path(folder)
    trained = tokenizer.train(TokenizerConfig(kind="byte"), [], folder / "tokenizer")
    splits = {}
    for name in store.SPLITS:
        writer = store.SplitWriter(folder / name, store.token_dtype(vocab_size))
        for index, tokens in enumerate(DOCUMENTS):
            writer.append(f"{index}.txt", index * 10, tokens, len(tokens) - 1)
        splits[name] = writer.close()
    manifest = {"tokenizer_hash": trained.hash, "vocab_size": vocab_size, "text_hash": "", "settings": {}}
    sizes = dict.fromkeys(("compressed_heldout_bytes", "gzip_bytes", "xz_bytes"), 1)
    store.write_manifest(folder, manifest | {"splits": splits} | sizes)
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
    monkeypatch.setattr(store, "SHARD", 16)
    monkeypatch.setattr(store, "CHUNK", 4)
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
    with pytest.raises(Refused, match="manifest.json is damaged"):
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


@pytest.mark.parametrize("changes, words", [
    (dict(format="1"), "of format '1' and this gptjax reads format 1"),
    (dict(splits=[]), "(splits is [], not of type dict)"),
    (dict(splits={"train": {}, "heldout": {}}), "(tokens is missing, not of type int)"),
    (dict(gzip_bytes=0), "(gzip_bytes is 0)"),
    (dict(vocab_size=10**40), "(vocab_size is a number of 133 bits)"),
    (dict(vocab_size=257.0), "(vocab_size is 257.0, not of type int)"),
    (dict(files={"train/documents.jsonl": None}), "is None, not of type int)"),
    (dict(files={"../outside": 3}), "'../outside' leads out of"),
    (dict(files={"/etc/passwd": 3}), "'/etc/passwd' leads out of"),
    (dict(files={"train/./../../x": 3}), "leads out of"),
    (dict(files={"gs://bucket/x": 3}), "leads out of"),
    (dict(files={"a\0b": 3}), "leads out of"),
    (dict(vocab_size=70_000), "zarr.json is not as it was written"),
])  # fmt: skip
def test_a_manifest_that_can_not_be_is_refused(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(Refused) as refusal:
        Store.open(folder)
    assert words in str(refusal.value)


@pytest.mark.parametrize("tokens, documents", [(10**15, 4), (29, 29), (28, 4), (29, 3)])
def test_sizes_that_the_files_do_not_have_are_refused(folder, tokens, documents):
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    edit(folder, splits=splits | {"train": dict(tokens=tokens, documents=documents, bytes=25)})
    with pytest.raises(Refused, match="manifest.json is damaged .train has|zarr.json is not as it was written"):
        Store.open(folder)


def test_tokens_that_have_no_bytes_are_refused(folder):
    """TensorStore would read them as zeros, and any number of them."""
    file = folder / "train/tokens/zarr.json"
    file.write_text(file.read_text().replace('"shape":[29]', f'"shape":[{10**15}]'))
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = manifest["splits"] | {"train": dict(tokens=10**15, documents=4, bytes=25)}
    edit(folder, splits=splits, files=manifest["files"] | {"train/tokens/zarr.json": file.stat().st_size})
    with pytest.raises(
        Refused, match=r"manifest.json is damaged \(train has 4 documents of 1000000000000000 tokens in \d+ bytes"
    ):
        Store.open(folder)


@pytest.mark.parametrize("old, new", [
    ('"chunk_shape":[8192]', '"chunk_shape":[8191]'),
    ('"uint16"', '"uint32"'),
    ('"crc32c"', '"gzip"  '),
    ('"shape":[29]', '"shape":[99]'),
    ("{", "["),
])  # fmt: skip
def test_an_array_of_another_form_is_refused(folder, old, new):
    file = folder / "train/tokens/zarr.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(Refused, match="train/tokens/zarr.json"):
        Store.open(folder)


def test_document_starts_that_can_not_be_are_refused(folder):
    split = Store.open(folder).split("train")
    with pytest.raises(Refused, match="documents 1 to 3 do not follow one another.: copy the whole store"):
        dataclasses.replace(split, tokens=6).document_starts(1, 3)
    path = folder / "train/document_starts/c/0"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(Refused, match="train/document_starts is not as it was written .*: copy the whole store"):
        Store.open(folder).split("train").document_starts()


@pytest.mark.parametrize("name", ["train", "train/documents.jsonl"])
def test_a_link_out_of_the_store_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(Refused, match="'train/.*' leads out of"):
        Store.open(folder)


def test_a_store_may_be_a_link_itself(whole, tmp_path):
    (tmp_path / "link").symlink_to(whole)
    assert Store.open(tmp_path / "link").split("train").tokens == 29


def test_tokens_of_nothing_but_zeros_have_their_bytes_on_disk(tmp_path):
    """Else a manifest could tell of any number of them."""
    writer = store.SplitWriter(epath.Path(tmp_path / "split"), np.uint16)
    writer.append("zeros", 0, np.zeros(100_000, np.int32), 1)
    writer.close()
    assert (tmp_path / "split/tokens/c/0").stat().st_size > 200_000
