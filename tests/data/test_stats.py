import dataclasses
import json
import pathlib
import sys
from collections import Counter

import matplotlib.image
import pytest
from etils import epath
from support.command import DEBUG, tree

from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.preparation.prepare import prepare
from gptjax.data.sources.documents import DataConfig
from gptjax.data.store import stats, stats_plot
from gptjax.errors import Refused
from gptjax.tokenizers.tokenizer import TokenizerConfig

ENGLISH = "The old man walked slowly through the streets of the town and thought about his children far away."
GERMAN = "Der alte Mann ging langsam durch die Straßen der Stadt und dachte an seine Kinder in der Ferne."
TEXTS = [f"{ENGLISH} {'And so he did again.' * i} Number {i}." for i in range(40)] + [GERMAN, GERMAN + " Ja."]
COPIES = [TEXTS[3], TEXTS[3], TEXTS[7]]
ALIKE = [TEXTS[39] + " Yes."]
SIZE = {"documents": 1, "bytes": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats")
    (folder / "corpus").mkdir()
    for number, text in enumerate(TEXTS + COPIES + ALIKE):
        (folder / "corpus" / f"{number:03}.txt").write_text(text)
    data = DataConfig(source="text", path=str(folder / "corpus/*.txt"), heldout_fraction=0.2)
    return prepare(data, TokenizerConfig(kind="byte"), folder / "store")


@pytest.fixture(scope="module")
def found(store):
    return stats.stats(store)


def test_counts_and_lengths(store, found):
    sizes = sorted(len(text.encode()) for text in TEXTS + COPIES + ALIKE)
    assert found["total"] == {"documents": len(sizes), "tokens": sum(sizes) + len(sizes), "bytes": sum(sizes)}
    assert found["splits"]["heldout"]["documents"] == store.split("heldout").documents
    assert found["sample"] == {"documents": len(sizes), "bytes": sum(sizes), "whole": True}
    lengths = found["bytes_per_document"]
    assert lengths["mean"] == pytest.approx(sum(sizes) / len(sizes))
    assert (lengths["min"], lengths["max"], lengths["median"]) == (sizes[0], sizes[-1], sizes[(len(sizes) - 1) // 2])
    bins = list(zip(lengths["edges"][:-1], lengths["edges"][1:], lengths["counts"], strict=True))
    assert all(sum(low <= size < high for size in sizes) == count for low, high, count in bins)
    assert sum(lengths["counts"]) == len(sizes)
    assert found["tokens_per_document"]["max"] == sizes[-1] + 1  # end_of_text, and of bytes a token each


def test_duplicates_languages_and_ngrams(found):
    exact = found["duplicates"]["exact"]
    assert exact == {"documents": 3, "bytes": sum(len(text) for text in COPIES)}
    assert found["duplicates"]["near"]["documents"] >= 1
    assert {name: count["documents"] for name, count in found["languages"].items()} == {"en": 44, "de": 2}
    words = Counter(word for text in TEXTS + COPIES + ALIKE for word in stats.WORD.findall(text))
    assert found["ngrams"]["1"]["total"] == words.total()
    assert dict(found["ngrams"]["1"]["most_frequent"]) == dict(
        sorted(words.items(), key=lambda item: (-item[1], item[0]))[: stats.TOP]
    )
    assert found["ngrams"]["3"]["most_frequent"][0][0] == "And so he"
    assert found["ngrams"]["3"]["counted_low_by_at_most"] == 0


def test_alike_documents_are_found_and_others_not(tmp_path):
    (tmp_path / "corpus").mkdir()
    words = stats.WORD.findall(ENGLISH + GERMAN)
    texts = [" ".join(words[i:] + words[:i]) + f" {i}" + " x" * i for i in range(0, 30, 10)]
    apart = [" ".join(word + "abcd"[i] for word in words) for i in range(4)]  # MinHash sees all numbers as one
    for number, text in enumerate([*apart, apart[0] + " y", *texts]):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    data = DataConfig(source="text", path=str(tmp_path / "corpus/*.txt"), heldout_fraction=0.2)
    found = stats.stats(prepare(data, TokenizerConfig(kind="byte"), tmp_path / "store"))
    assert found["duplicates"]["exact"]["documents"] == 0
    assert 1 <= found["duplicates"]["near"]["documents"] <= 3  # the longer one, and perhaps the rotated ones


def test_reading_in_pieces_finds_the_same(store, found, monkeypatch):
    monkeypatch.setattr(stats, "READ_TOKENS", 200)
    monkeypatch.setattr(stats, "READ_DOCUMENTS", 3)
    assert stats.stats(store) == found


def test_a_sample_has_all_copies_or_none_and_says_so(store, monkeypatch):
    add, looked_at = stats._Sample.add, Counter()
    monkeypatch.setattr(stats._Sample, "add", lambda self, *of: (looked_at.update([of[-1]]), add(self, *of)))
    monkeypatch.setattr(stats, "SAMPLE_DOCUMENTS", 15)
    found = stats.stats(store)
    there = Counter(TEXTS + COPIES + ALIKE)
    assert looked_at == {text: there[text] for text in looked_at}
    assert found["duplicates"]["exact"]["documents"] == looked_at.total() - len(looked_at)
    assert 3 <= found["sample"]["documents"] <= 30 and not found["sample"]["whole"]
    assert found["total"]["documents"] == len(TEXTS + COPIES + ALIKE)
    assert " 15 of " not in stats_plot._title(found) and "a sample by hash" in stats_plot._title(found)


def test_rare_ngrams_are_forgotten_and_the_bound_holds(store, found, monkeypatch):
    monkeypatch.setattr(stats, "MAX_NGRAMS", 60)
    short = stats.stats(store)["ngrams"]["3"]
    true = dict(map(tuple, found["ngrams"]["3"]["most_frequent"]))
    assert short["counted_low_by_at_most"] > 0
    for words, count in short["most_frequent"][:5]:
        assert true[words] - short["counted_low_by_at_most"] <= count <= true[words]


def test_the_command_writes_both_files(store, found, tmp_path, gptjax_main):
    before = tree(pathlib.Path(store.folder))
    code, out, error = gptjax_main("data", "stats", f"--store={store.folder}", f"--target={tmp_path}/out")
    assert (code, error) == (0, "") and f"wrote {tmp_path}/out/stats.json" in out
    assert tree(pathlib.Path(store.folder)) == before
    assert json.loads((tmp_path / "out/stats.json").read_text()) == json.loads(json.dumps(found))
    assert matplotlib.image.imread(tmp_path / "out/stats.png").shape[:2] == (800, 1500)
    assert (tmp_path / "out/stats.png").stat().st_size < 150_000


def test_by_a_config_the_store_is_that_of_its_data(store, tmp_path, gptjax_main):
    argv = "data", "stats", f"--config={DEBUG}", f"--config.data.store={store.folder}", f"--target={tmp_path}/out"
    assert gptjax_main(*argv)[0] == 0
    assert (tmp_path / "out/stats.png").exists()


def test_refusals(store, tmp_path, refused, gptjax_main, monkeypatch):
    assert "Give --store=DIR" in refused(tmp_path, "data", "stats")
    assert "Give --store=DIR" in refused(tmp_path, "data", "stats", f"--config={DEBUG}")
    assert "holds no token store" in refused(tmp_path, "data", "stats", f"--store={tmp_path}/none")
    (tmp_path / "file").write_text("")
    message = refused(tmp_path, "data", "stats", f"--store={store.folder}", f"--target={tmp_path}/file/x")
    assert f"--target={tmp_path}/file/x can't be made (Not a directory): give another" in message
    (tmp_path / "made/stats.json").mkdir(parents=True)
    code, _, error = gptjax_main("data", "stats", f"--store={store.folder}", f"--target={tmp_path}/made")
    assert code == 1 and f"{tmp_path}/made can't be written (Is a directory): make room" in error
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "gptjax.data.store.stats_plot")
    message = refused(tmp_path, "data", "stats", f"--store={store.folder}")
    assert "gptjax data stats needs packages that are not installed (import of matplotlib" in message


def test_the_cleaning_of_a_store_is_in_the_picture(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(TEXTS + COPIES):
        (tmp_path / "corpus" / f"{number:03}.txt").write_text(text)
    data = DataConfig(source="text", path=str(tmp_path / "corpus/*.txt"), heldout_fraction=0.2)
    cleaning = CleanConfig(exact_duplicates=True)
    store = prepare(data, TokenizerConfig(kind="byte"), tmp_path / "store", cleaning=cleaning)
    found = stats.stats(store)
    size = {"documents": 3, "bytes": sum(len(text) for text in COPIES)}
    assert found["cleaning"]["exact_duplicates"] == size and found["duplicates"]["exact"]["documents"] == 0
    stats_plot.draw(found, epath.Path(tmp_path / "stats.png"))
    assert (tmp_path / "stats.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("cleaning", "reason"),
    [
        (3, "cleaning is 3, not of type dict"),
        ({"read": {}}, "kept is missing"),
        ({"read": {}, "kept": {}, "steps": [1]}, "documents is missing"),
        ({"read": SIZE, "kept": SIZE, "steps": [1]}, "a step is 1, not of type dict"),
        ({"read": SIZE, "kept": SIZE, "steps": [{"step": 1}]}, "step is 1, not of type str"),
    ],
)
def test_a_manifest_that_can_not_be_is_refused(store, cleaning, reason):
    damaged = dataclasses.replace(store, manifest=store.manifest | {"cleaning": cleaning})
    with pytest.raises(Refused, match=f"manifest.json is damaged .*{reason}"):
        stats.stats(damaged)


def test_tokens_that_can_not_be_are_refused(store):
    fewer = type("Fewer", (), {"vocab_size": 100, "decode": store.tokenizer.decode})()
    with pytest.raises(Refused, match=r"train is not as it was written \(token 2\d\d of 100\): copy the whole store"):
        stats.stats(dataclasses.replace(store, tokenizer=fewer))
