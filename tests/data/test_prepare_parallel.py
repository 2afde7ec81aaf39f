"""Preparing by several processes: the same store to the byte, after any kill, and on a disk that was full."""

import filecmp
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from support.command import DEBUG, tree
from support.disks import filled
from support.source_files import made

from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.preparation import merge, survey
from gptjax.data.preparation import prepare as module
from gptjax.data.preparation.prepare import DataConfig, prepare
from gptjax.data.sources.formats import web
from gptjax.data.store.store import Store, is_whole
from gptjax.errors import Failed, Refused
from gptjax.runtime import lock
from gptjax.tokenizers.tokenizer import TokenizerConfig

BYTE = TokenizerConfig(kind="byte")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """9 MB of JSON Lines in four files, one of them compressed, with a few damaged lines."""
    folder = tmp_path_factory.mktemp("lines")
    for part in range(4):
        records = (f"{part} {i} " + f"The square of {i} is {i * i}.\n" * (i % 100) for i in range(1500))
        text = "".join(json.dumps({"text": text}) + "\n" for text in records) + "{\n" * part
        (folder / f"{part}.jsonl").write_text(text)
    subprocess.run(["gzip", folder / "1.jsonl"], check=True)
    return DataConfig("jsonl", f"{folder}/*.jsonl*", damaged="skip", heldout_fraction=0.1)


def command(data, store, workers, *more):
    keys = {"source": data.source, "path": data.path, "damaged": "skip", "heldout_fraction": 0.1, "store": store}
    argv = [sys.executable, "-m", "gptjax", "data", "prepare", f"--config={DEBUG}", f"--workers={workers}", *more]
    return argv + [f"--config.data.{key}={value}" for key, value in keys.items()]


def same(one, other):
    """Whether two folders have the same files, to the byte."""
    names, others = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) for folder in (one, other)
    )
    mismatched = filecmp.cmpfiles(one, other, names, shallow=False)[1:]
    return names == others and mismatched == ([], [])


@pytest.fixture(scope="module")
def serial(lines, tmp_path_factory):
    """The store that one process makes in one go, task by task."""
    folder = tmp_path_factory.mktemp("serial") / "store"
    prepare(lines, TokenizerConfig(kind="byte"), folder)
    return folder


def test_the_store_is_the_same_whatever_the_workers_and_tasks(lines, serial, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(survey, "LEAST_TASK_BYTES", 1000)
    store = prepare(lines, BYTE, tmp_path / "one")
    assert same(tmp_path / "one", serial)
    prepare(lines, BYTE, tmp_path / "three", workers=3)
    assert same(tmp_path / "three", serial)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]
    lost = store.manifest["lost"]
    assert lost["damaged"] > 2 and len(lost["places"]) == min(lost["damaged"], 5)
    assert f"left out {lost['damaged']} damaged: {lost['places'][0]}" in capsys.readouterr().out


def test_killed_it_goes_on(lines, serial, tmp_path):
    """Killed once in each step, it does not do again what was done, and the store is the one of no kill."""
    argv, partial = command(lines, tmp_path / "store", 2), tmp_path / "store.partial"
    for step in ("survey", "pieces"):
        running = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not list((partial / step).glob("*.json")):
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        out, _ = running.communicate()
        assert not is_whole(tmp_path / "store")
    assert "resuming the preparation in" in out
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resuming the preparation in" in done.stdout and "train: " in done.stdout
    assert same(tmp_path / "store", serial)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_other_files_or_settings_begin_anew(lines, tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "merge", stop)
    for data, goes_on in [
        (lines, False),
        (lines, True),
        (DataConfig(**vars(lines) | {"heldout_fraction": 0.3}), False),
    ]:
        with pytest.raises(KeyboardInterrupt):
            prepare(data, BYTE, tmp_path / "store")
        printed = capsys.readouterr().out
        assert ("resuming the preparation in" in printed) == goes_on
    assert "starting over in" in printed


def test_what_was_done_is_kept_where_the_text_is_away_for_a_while(lines, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(lines, BYTE, tmp_path / "store")
    before = tree(tmp_path / "store.partial")
    away = DataConfig(**vars(lines) | {"path": str(tmp_path / "not mounted" / "*.jsonl")})
    with pytest.raises(Refused, match="matches 0 files"):
        prepare(away, BYTE, tmp_path / "store")
    assert tree(tmp_path / "store.partial") == before
    prepare(lines, BYTE, tmp_path / "store")
    # A kill between the two last steps leaves it.
    (tmp_path / "store.partial").mkdir()
    prepare(lines, BYTE, tmp_path / "store")
    assert not (tmp_path / "store.partial").exists()


def test_files_that_changed_while_it_was_stopped_begin_anew_at_the_next_call(tmp_path, monkeypatch):
    """At equal length, which is not seen before the text is read again."""

    def stop(*arguments):
        raise KeyboardInterrupt

    file, data = tmp_path / "a.jsonl", DataConfig("jsonl", str(tmp_path / "a.jsonl"), heldout_fraction=0.1)

    def write(word):
        file.write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(99)))

    write("one")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_tokenize", stop)
        prepare(data, BYTE, tmp_path / "store")
    write("two")
    with pytest.raises(Refused, match="changed while they were read"):
        prepare(data, BYTE, tmp_path / "store")
    assert not (tmp_path / "store.partial").exists()
    assert b"two" in bytes(prepare(data, BYTE, tmp_path / "store").split("train").read([0], 9)[0].astype("uint8"))


def test_killed_while_it_begins_anew(lines, tmp_path, monkeypatch):
    """With some of the earlier work away, none of it is gone on with."""

    def stop(*arguments):
        raise KeyboardInterrupt

    kind = type(epath.Path(tmp_path))
    rmtree, iterdir = kind.rmtree, kind.iterdir

    def removed(path):
        rmtree(path)
        if path.name == "tasks":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merge, "merge", stop)
        prepare(lines, BYTE, tmp_path / "store")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "rmtree", removed)
        patch.setattr(kind, "iterdir", lambda path: iter(sorted(iterdir(path))))  # work.json, the worst order, last
        prepare(DataConfig(**vars(lines) | {"heldout_fraction": 0.3}), BYTE, tmp_path / "store")
    assert not (tmp_path / "store.partial" / "tasks").exists()
    assert prepare(lines, BYTE, tmp_path / "store")


def test_two_preparations_of_one_store_refuse_each_other(lines, tmp_path):
    with lock.locked(epath.Path(tmp_path / "store.partial"), "is", "wait"):
        before = tree(tmp_path)
        words = rf"store.partial is being prepared on host \S+, process {os.getpid()}: wait until it is done, stop it"
        with pytest.raises(Refused, match=words):
            prepare(lines, BYTE, tmp_path / "store")
        assert tree(tmp_path) == before


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk(lines, serial, disk, workers, capfd):
    """It ends in a sentence, with nothing that looks whole, and the same call goes on when there is room.

    The disk is full from the start, while tasks are done, and while the store is put together.
    """
    for size, left in [("8m", 0), ("8m", 100_000), ("8m", 7_900_000), ("32m", 1 << 30)]:
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        ballast = filled(disk, left) if left < 1 << 30 else None
        with pytest.raises((Failed, Refused), match="can't be written"):
            prepare(lines, BYTE, disk / "store", workers)
        assert not (disk / "store").exists()
        ballast and ballast.unlink()
    assert "Traceback" not in capfd.readouterr().err
    subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    prepare(lines, BYTE, disk / "store", workers)
    assert same(disk / "store", serial)


def test_a_warc_is_extracted_once(tmp_path, monkeypatch):
    texts = [f"This is page number {i}, and it has a sentence or two. Here is the second." for i in range(30)]
    store = prepare(made("warc", tmp_path, [*texts, "", ""]), BYTE, tmp_path / "store")
    assert sum(split.documents for split in store.splits.values()) == 30
    assert store.manifest["lost"] == {"damaged": 0, "left_out": {web.NO_TEXT: 2, web.NO_PAGE: 32}, "places": []}
    names = store.split("train").names([0])
    assert names[0]["name"].endswith("a.warc.gz")


def test_a_source_that_yields_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n{}\n[]\n")
    data = DataConfig("jsonl", str(tmp_path / "a.jsonl"), damaged="skip")
    with pytest.raises(Refused, match="data.source=jsonl has 0 documents and 0 different ones, and at least 2"):
        prepare(data, BYTE, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_store_of_a_version_that_had_fewer_keys_is_opened(lines, serial, tmp_path):
    manifest = json.loads((serial / "manifest.json").read_text())
    assert Store.open(serial).manifest["settings"].pop("data.damaged") == "skip"
    copied = pathlib.Path(subprocess.run(["cp", "-r", serial, tmp_path / "copied"], check=True).args[-1])
    del manifest["settings"]["data.text_field"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(lines, BYTE, copied).manifest == manifest
    with pytest.raises(Refused, match=r"data.text_field \(text there, body now\)"):
        prepare(DataConfig(**vars(lines) | {"text_field": "body"}), BYTE, copied)


def test_the_command_line(lines, refused, tmp_path):
    argv = ["data", "prepare", f"--config={DEBUG}"]
    assert "--workers=0 must be at least 1" in refused(tmp_path, *argv, "--workers=0", f"--workdir={tmp_path}/run")
    assert "give one of them" in refused(tmp_path, *argv)
    assert 'data.source="jsonlines" must be one of' in refused(
        tmp_path, *argv, f"--workdir={tmp_path}/run", "--config.data.source=jsonlines"
    )


@pytest.mark.slow
def test_a_tokenizer_is_trained_and_measured_on_the_same_texts(lines, serial):
    store = Store.open(serial)
    heldout = [store.tokenizer.encode(document.text) for document in module.heldout_documents(lines, CleanConfig(), 2)]
    assert sum(map(len, heldout)) + len(heldout) == store.split("heldout").tokens
    assert (
        sum(len(text.encode()) for text in module.training_texts(lines, CleanConfig(), 2)) == store.split("train").bytes
    )
