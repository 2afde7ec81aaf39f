import contextlib
import dataclasses
import errno
import gzip
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from support.runs import tiny

from gptjax.data.preparation import prepare as module
from gptjax.data.preparation import tasks
from gptjax.data.preparation.prepare import DataConfig, prepare
from gptjax.data.store.store import is_whole
from gptjax.errors import Failed, Refused
from gptjax.runtime import files, lock
from gptjax.tokenizers.tokenizer import TokenizerConfig
from gptjax.training.corpus import make_corpus

BYTE = TokenizerConfig(kind="byte")


def corpus(folder, texts):
    folder.mkdir(exist_ok=True)
    for index, text in enumerate(texts):
        (folder / f"{index:03}.txt").write_bytes(text.encode())
    return DataConfig(source="text", path=str(folder / "*.txt"), heldout_fraction=0.2)


@pytest.fixture
def texts():
    return [f"document {i}\n" + f"line é {i * i}\r\n" * (i % 7) for i in range(60)]


@pytest.fixture
def data(tmp_path, texts):
    return corpus(tmp_path / "corpus", texts)


def decoded(store, name):
    """The documents of a split, by where the store says they begin."""
    split = store.split(name)
    tokens = split.read(np.array([0]), split.tokens)[0].astype(np.int32)
    parts = np.split(tokens, split.document_starts()[1:])
    assert all(part[0] == store.tokenizer.end_of_text for part in parts)
    return [store.tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("tokenizer", [BYTE, TokenizerConfig(vocab_size=300)], ids=["byte", "sentencepiece"])
def test_every_document_is_in_one_split_with_its_bytes(tmp_path, data, texts, tokenizer, monkeypatch):
    monkeypatch.setattr(tasks, "BATCH_BYTES", 200)
    store = prepare(data, tokenizer, tmp_path / "store")
    train, heldout = decoded(store, "train"), decoded(store, "heldout")
    assert sorted(train + heldout) == sorted(texts)
    assert 3 <= len(heldout) <= 25
    assert store.split("train").bytes == sum(len(text.encode()) for text in train)
    names = [json.loads(line)["name"] for line in (tmp_path / "store/heldout/documents.jsonl").read_text().splitlines()]
    assert [open(name, encoding="utf-8", newline="").read() for name in names] == heldout


def test_equal_documents_are_on_the_same_side_and_order_does_not_matter(tmp_path, texts):
    first = prepare(corpus(tmp_path / "a", texts + texts), BYTE, tmp_path / "first")
    again = prepare(corpus(tmp_path / "b", texts[::-1]), BYTE, tmp_path / "again")
    assert set(decoded(first, "train")).isdisjoint(decoded(first, "heldout"))
    assert set(decoded(first, "heldout")) == set(decoded(again, "heldout"))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_both_splits_have_a_document(tmp_path, texts, fraction, count):
    data = dataclasses.replace(corpus(tmp_path / "corpus", texts[:count]), heldout_fraction=fraction)
    store = prepare(data, BYTE, tmp_path / "store")
    assert store.split("heldout" if fraction < 0.5 else "train").documents == 1
    assert store.split("train" if fraction < 0.5 else "heldout").documents == count - 1


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3])
def test_the_held_out_bytes_are_near_the_asked_fraction(tmp_path, fraction, capsys):
    """Small documents of one kind, of which hashes alone hold out too many or too few."""
    for seed in range(4):
        texts = [f"{seed} {index} " + "x" * (index * 37 % 200) for index in range(240)]
        data = dataclasses.replace(corpus(tmp_path / f"corpus{seed}", texts), heldout_fraction=fraction)
        store = prepare(data, BYTE, tmp_path / f"store{seed}")
        held = sum(len(text.encode()) for text in decoded(store, "heldout"))
        assert abs(held / sum(map(len, texts)) / fraction - 1) <= 0.25
    assert "warning" not in capsys.readouterr().out


def test_a_corpus_that_can_not_be_cut_so_is_told(tmp_path, capsys):
    data = corpus(tmp_path / "corpus", ["a" * 500, "b" * 500])
    prepare(dataclasses.replace(data, heldout_fraction=0.02), BYTE, tmp_path / "store")
    said = capsys.readouterr().out
    assert "500 of 1,000 bytes are held out, 50.00%, where data.heldout_fraction asks for 2.00%" in said


def test_the_tokenizer_learns_from_training_documents_only(tmp_path, texts, monkeypatch):
    seen = []
    train = module.tokenizers.train
    monkeypatch.setattr(module.tokenizers, "train", lambda _, texts, f: (seen.extend(texts), train(BYTE, seen, f))[1])
    data = corpus(tmp_path / "corpus", texts)
    store = prepare(data, TokenizerConfig(), tmp_path / "store")
    assert sorted(seen) == sorted(decoded(store, "train"))

    seen.clear()
    monkeypatch.setattr(module, "TRAINING_BYTES", sum(len(text.encode()) for text in texts) // 3 + 1)
    store = prepare(data, TokenizerConfig(), tmp_path / "sampled")
    assert seen == [text for text in texts[::3] if text in decoded(store, "train")]


def test_a_disk_that_is_full_for_the_tokenizers_texts_is_no_refusal(tmp_path, data, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(Failed, match="store.partial can't be written .No space"):
        patch.setattr(tasks.Sample, "__call__", full)
        prepare(data, TokenizerConfig(vocab_size=300), tmp_path / "store")
    assert (tmp_path / "store.partial/survey/00000.json").exists()


def test_compressed_sizes_are_those_of_gzip_and_xz(tmp_path, data, monkeypatch):
    store = prepare(data, BYTE, tmp_path / "store")
    heldout = "".join(decoded(store, "heldout")).encode()
    manifest = store.manifest
    assert manifest["compressed_heldout_bytes"] == len(heldout)
    assert manifest["gzip_bytes"] == len(gzip.compress(heldout, 9, mtime=0))
    assert manifest["xz_bytes"] == len(lzma.compress(heldout, preset=9))

    monkeypatch.setattr(tasks, "COMPRESSED_BYTES", 100)
    manifest = prepare(data, BYTE, tmp_path / "less").manifest
    assert manifest["compressed_heldout_bytes"] == 100
    assert manifest["xz_bytes"] == len(lzma.compress(heldout[:100], preset=9))


def test_a_store_of_the_same_settings_is_opened_and_not_made(tmp_path, data, capsys):
    prepare(data, BYTE, tmp_path / "store")
    before = os.stat(tmp_path / "store" / "manifest.json").st_mtime_ns
    capsys.readouterr()
    other_vocab = dataclasses.replace(BYTE, vocab_size=99)  # not read by kind=byte
    prepare(dataclasses.replace(data, store="elsewhere"), other_vocab, tmp_path / "store")
    assert os.stat(tmp_path / "store" / "manifest.json").st_mtime_ns == before
    assert capsys.readouterr().out.startswith("using the token store in ")


@pytest.mark.parametrize("change, words", [
    ("", ""),
    ("new", "has 1 new files (.*new.txt)"),
    ("missing", "has 1 missing files (.*003.txt)"),
    ("longer", "has 1 changed files (.*003.txt)"),
    ("other words", "has 1 changed files (.*003.txt)"),
    ("all gone", "had 60 files, and matches 0 files now"),
])  # fmt: skip
def test_a_corpus_that_has_changed_is_told(tmp_path, data, capsys, change, words):
    prepare(data, BYTE, tmp_path / "store")
    folder = tmp_path / "corpus"
    third = folder / "003.txt"
    if change == "new":
        (folder / "new.txt").write_text("x")
    elif change == "missing":
        third.unlink()
    elif change == "longer":
        third.write_text(third.read_text() + "x")
    elif change == "other words":
        third.write_bytes(third.read_bytes()[::-1])
        os.utime(third, (time.time() + 5,) * 2)
    elif change:
        for path in folder.iterdir():
            path.unlink()
    capsys.readouterr()
    prepare(data, BYTE, tmp_path / "store")
    said = capsys.readouterr().err
    if not words:
        assert said == ""
    assert re.search(words, said) and said.count("warning") == said.count("give another folder in data.store") == bool(
        words
    )


def test_a_store_of_other_settings_is_refused_by_key(tmp_path, data):
    prepare(data, BYTE, tmp_path / "store")
    with pytest.raises(Refused, match=r"data.heldout_fraction \(0.2 there, 0.5 now\): give another folder"):
        prepare(dataclasses.replace(data, heldout_fraction=0.5), BYTE, tmp_path / "store")
    with pytest.raises(Refused, match=r"tokenizer.kind \(byte there, sentencepiece now\)"):
        prepare(data, TokenizerConfig(), tmp_path / "store")


def test_a_store_that_another_run_finished_meanwhile(tmp_path, data, monkeypatch):
    """It is compared with the settings, and no refusal removes it."""
    real, where = lock.locked, tmp_path / "run" / "store"

    @contextlib.contextmanager
    def locked(*arguments):
        monkeypatch.undo()
        prepare(dataclasses.replace(data, heldout_fraction=0.5), BYTE, where)
        with real(*arguments):
            yield

    monkeypatch.setattr(lock, "locked", locked)
    with pytest.raises(Refused, match=r"data.heldout_fraction \(0.5 there, 0.2 now\)"):
        make_corpus(tiny(data=data), epath.Path(tmp_path / "run"))
    assert is_whole(where) and [path.name for path in where.parent.iterdir()] == ["store"]


def test_a_store_of_less_than_a_window_does_not_stay(tmp_path, data):
    with pytest.raises(Refused, match="seq_len=32768"):
        make_corpus(tiny(data=data, seq_len=32768), epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_refusals_leave_nothing(tmp_path, data, texts):
    def refused(message, data=data, tokenizer=BYTE):
        with pytest.raises(Refused, match=message):
            prepare(data, tokenizer, tmp_path / "out" / "store")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    refused("has 1 documents and 1 different ones, and at least 2", corpus(tmp_path / "one", texts[:1]))
    refused("has 3 documents and 1 different ones", corpus(tmp_path / "same", texts[:1] * 3))
    for fraction in (0.0, 1.0, -0.1):
        refused("must be above 0 and below 1", dataclasses.replace(data, heldout_fraction=fraction))
    refused("kind", tokenizer=TokenizerConfig(kind="bytes"))
    refused("vocab_size is 9999, but this corpus has pieces for at most", tokenizer=TokenizerConfig(vocab_size=9999))


def test_a_folder_of_other_files_is_refused_and_an_empty_one_is_used(tmp_path, data):
    (tmp_path / "mine").mkdir()
    prepare(data, BYTE, tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    for name in ("other", "other/thesis.tex"):
        with pytest.raises(Refused, match=f"{name} exists and has no manifest.json"):
            prepare(data, BYTE, tmp_path / name)
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_mount_is_filled(disk, data, tmp_path, monkeypatch):
    """A folder that can't be renamed over, with the work inside of it; what a killed move left is replaced."""
    (disk / "lost+found").mkdir()
    right = prepare(data, BYTE, tmp_path / "store")
    fill = files.fill

    def killed(folder, made, last):
        (made / "train").rename(folder / "train")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "fill", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, BYTE, disk)
    assert not is_whole(disk)
    monkeypatch.setattr(files, "fill", fill)
    store = prepare(data, BYTE, disk)
    assert sorted(os.listdir(disk)) == sorted([*os.listdir(tmp_path / "store"), "lost+found"])
    assert decoded(store, "train") == decoded(right, "train")
    assert prepare(data, BYTE, disk).folder == store.folder


def test_files_that_change_while_read_are_refused(tmp_path, data, monkeypatch):
    check = module.tokenizers.train

    def change(*arguments):
        with (tmp_path / "corpus" / "007.txt").open("a") as file:
            file.write("new")
        return check(*arguments)

    monkeypatch.setattr(module.tokenizers, "train", change)
    with pytest.raises(Refused, match="60 documents of (.*) bytes at first, then 60 of (?!\\1)"):
        prepare(data, BYTE, tmp_path / "store")


def test_a_killed_prepare_leaves_nothing_that_looks_whole(tmp_path, data):
    program = f"""import time
from gptjax.data.preparation import prepare as module
from gptjax.tokenizers.tokenizer import TokenizerConfig
def stop(*arguments):
    print("writing", flush=True)
    time.sleep(60)
module.write_manifest = stop
module.prepare(module.{data!r}, TokenizerConfig(kind="byte"), "{tmp_path}/out/store")
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    while process.stdout.readline() != "writing\n":
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = (tmp_path / "out").iterdir()
    assert left.name == "store.partial" and not is_whole(left)
    assert prepare(data, BYTE, tmp_path / "out" / "store").split("train").documents > 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["store"]
