import hashlib
import json
import os
import random
import subprocess
import sys

import pytest
from datatrove.data import Document
from etils import epath
from support.command import tree

from gptjax.data.cleaning import filters, pipeline, stages
from gptjax.data.cleaning.pipeline import CleanConfig
from gptjax.data.cleaning.report import SAMPLES, Account, merged
from gptjax.data.preparation import survey
from gptjax.data.preparation.prepare import prepare
from gptjax.data.preparation.tasks import Corpus, finish
from gptjax.data.sources import sources
from gptjax.data.sources.documents import Damages, DataConfig
from gptjax.errors import Refused
from gptjax.tokenizers.tokenizer import TokenizerConfig
from gptjax.training.config.schema import default, parse

BYTE = TokenizerConfig(kind="byte")
STOP = "the of and to that with have be in on for from was by".split()
WORDS = """river town house garden winter summer teacher letter window market village bridge farmer captain story
journey mountain kitchen animal doctor music paper question answer station railway island forest weather company
history picture machine sister father children people money reason problem moment season street corner church school
office engine metal water silver golden heavy narrow broken gentle strange quiet ancient modern distant famous careful
walked carried opened wanted remembered followed believed finished covered offered watched painted noticed repaired
visited""".split()
GERMAN = "Der alte Mann ging langsam durch die Straßen der Stadt und dachte an seine Kinder in der Ferne. " * 8


def prose(seed: int) -> str:
    """Text that no rule has anything against."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(f"{draw.choice(STOP)} {draw.choice(WORDS)}" for _ in range(6)).capitalize() + "."

    return "\n".join(" ".join(sentence() for _ in range(3)) for _ in range(5))


def judged(config: CleanConfig, step: str, text: str) -> tuple[str, str]:
    """The reason that a step gives, and what it leaves of the text."""
    document = Document(text, "0")
    return filters.steps(config)[step](document), document.text


@pytest.mark.parametrize(
    ("config", "step", "text", "reason"),
    [
        (CleanConfig(languages="en, fr"), "languages", GERMAN, "de"),
        (CleanConfig(languages="en"), "languages", "ok 12", "en, but not surely"),
        (CleanConfig(gopher=True), "gopher_repetition", "The same line again.\n" * 30, "dup_line_frac"),
        (CleanConfig(gopher=True), "gopher_quality", "Too short to be of use.", "gopher_short_doc"),
        (CleanConfig(gopher=True, gopher_max_words=60), "gopher_quality", prose(1), "gopher_long_doc"),
        (CleanConfig(gopher=True), "gopher_quality", "house garden river " * 30, "gopher_enough_stop_words"),
        (CleanConfig(gopher=True), "gopher_quality", prose(1).replace(" ", " # "), "gopher_too_many_hashes"),
        (CleanConfig(c4=True), "c4", prose(1) + "\nOpen a { and close it again.", "curly_bracket"),
        (CleanConfig(c4=True), "c4", prose(1) + "\nLorem ipsum dolor sit amet.", "lorem_ipsum"),
        (CleanConfig(c4=True), "c4", "One sentence is not enough.", "too_few_sentences"),
        (CleanConfig(c4=True), "c4", prose(1).replace(".", ""), "too_few_sentences"),
        (CleanConfig(fineweb=True), "fineweb", prose(1).replace(".", ""), "line_punct_ratio"),
        (CleanConfig(fineweb=True), "fineweb", "".join(f"Item {i}.\n" for i in range(30)), "short_line_ratio"),
    ],
)
def test_each_rule_removes_what_it_is_against_and_nothing_else(config, step, text, reason):
    assert judged(config, step, text) == (reason, text)
    if "max" not in reason and config.gopher_max_words > 60:
        assert judged(config, step, prose(2)) == ("", prose(2))


def test_rules_with_a_setting_are_loosened_by_it():
    unpunctuated = "\n".join(line.removesuffix(".") for line in prose(1).splitlines())
    assert judged(CleanConfig(c4=True), "c4", unpunctuated)[0] == "too_few_sentences"
    assert judged(CleanConfig(c4=True, c4_terminal_punctuation=False), "c4", unpunctuated) == ("", unpunctuated)
    config = CleanConfig(gopher=True, gopher_stop_words="der die das", gopher_min_words=5)
    assert judged(config, "gopher_quality", GERMAN) == ("", GERMAN)
    assert judged(config, "gopher_quality", prose(1))[0] == "gopher_enough_stop_words"
    no_stop_words = CleanConfig(gopher=True, gopher_stop_words="")
    assert judged(no_stop_words, "gopher_quality", "house garden river " * 30)[0] == ""


def test_c4_takes_lines_out_of_a_document_that_stays():
    text = prose(1) + "\nclick here\nThis site uses cookies for you.\nPlease switch on javascript in here."
    assert judged(CleanConfig(c4=True), "c4", text) == ("", prose(1))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("An ass is an animal.", "ass"),
        ("ASS", "ass"),
        ("First class of the assembly.", ""),
        ("A bad  word", ""),
        ("That bad word!", "bad word"),
        ("这是坏词吗", "坏词"),
        ("a+b", "a+b"),
    ],
)
def test_blocked_words(tmp_path, text, found):
    (tmp_path / "words.txt").write_text("Ass\n\nbad word \n坏词\na+b\n")
    assert judged(CleanConfig(blocked_words=str(tmp_path / "words.txt")), "blocked_words", text) == (found, text)


def test_personal_data_is_replaced():
    text = "Write to jane.doe+x@mail.example.net, from 8.8.8.8 or 192.168.0.1, at 10:30 @home."
    changed = "Write to email@example.com, from 192.0.2.1 or 192.168.0.1, at 10:30 @home."
    assert judged(CleanConfig(personal_data=True), "personal_data", text) == ("", changed)


ALL = dict(languages="en", gopher=True, c4=True, fineweb=True, personal_data=True)
ALL |= dict(exact_duplicates=True, near_duplicates=True)
STEPS = CleanConfig(**ALL, blocked_words="words").steps()
BAD = {
    "languages": GERMAN,
    "gopher_repetition": "The same line of words again and with no change.\n" * 30,
    "gopher_quality": prose(105)[:200],
    "c4": prose(101) + "\nOpen a { and then close it again.",
    "fineweb": prose(102) + "".join(f"\nThe house of {word}." for word in WORDS[:15]),
    "blocked_words": prose(103) + "\nThere is a foo here.",
}


def corpus(folder, monkeypatch) -> DataConfig:
    """Twenty good documents, a bad one for each step, an equal, an alike and a private one; in several tasks."""
    texts = {f"{index:02}": prose(index) for index in range(20)} | BAD
    texts |= {"exact_duplicates": texts["03"], "near_duplicates": texts["05"] + "\nOne more line of this was added."}
    texts["personal_data"] = prose(104) + "\nWrite to jane@mail.net for more of this."
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    monkeypatch.setattr(survey, "LEAST_TASK_BYTES", 9000)
    monkeypatch.setattr(survey, "TASK_BYTES", 9000)
    return DataConfig(source="text", path=str(folder / "*.txt"), heldout_fraction=0.2)


def config(folder) -> CleanConfig:
    (folder / "words").write_text("foo\n")
    return CleanConfig(**ALL, blocked_words=str(folder / "words"))


def stem(row) -> str:
    return row["name"].rpartition("/")[2].removesuffix(".txt")


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    """(folder, store, what was printed): a corpus prepared with all steps on."""
    folder = tmp_path_factory.mktemp("cleaned")
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as out:
        lines = []
        out.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        data = corpus(folder / "corpus", patch)
        assert len(survey._tasks(sources.parts(data))) > 3
        store = prepare(data, BYTE, folder / "store", cleaning=config(folder))
    return folder, store, "\n".join(lines)


def test_what_is_left_is_what_was_read_without_what_the_report_lists(cleaned):
    folder, store, printed = cleaned
    report = json.loads((folder / "store/cleaning/report.json").read_text())
    assert store.manifest["cleaning"] == report
    steps = {row["step"]: row for row in report["steps"]}
    assert list(steps) == STEPS
    removed = {}
    for step in STEPS:
        rows = [json.loads(line) for line in (folder / f"store/cleaning/removed/{step}.jsonl").read_text().splitlines()]
        removed[step] = [stem(row) for row in rows if row["reason"] != "changed"]
        gone = [(folder / "corpus" / f"{name}.txt").stat().st_size for name in removed[step]]
        if step not in ("exact_duplicates", "near_duplicates"):  # which come after steps that change text
            assert steps[step]["removed"] == {"documents": len(gone), "bytes": sum(gone)}
        assert sum(count["documents"] for count in steps[step]["reasons"].values()) == len(gone)
    near = removed.pop("near_duplicates")
    assert near in (["05"], ["near_duplicates"])
    assert removed == {step: [step] if step in BAD or step == "exact_duplicates" else [] for step in removed}

    names = [stem(row) for split in store.splits.values() for row in split.names(range(split.documents))]
    everything = {path.stem for path in (folder / "corpus").iterdir()}
    assert sorted(names) == sorted(everything - set(BAD) - {"exact_duplicates", *near})
    total = {key: sum(getattr(split, key) for split in store.splits.values()) for key in ("documents", "bytes")}
    assert report["kept"] == total
    assert report["read"]["documents"] == len(everything)
    assert report["read"]["bytes"] == sum(path.stat().st_size for path in (folder / "corpus").iterdir())
    lost = {key: sum(row["removed"][key] for row in report["steps"]) for key in total}
    lost["bytes"] += sum(row["changed"]["bytes"] for row in report["steps"])
    assert {key: report["kept"][key] + lost[key] for key in total} == report["read"]
    assert all(f"{step} removed" in printed for step in STEPS) and pipeline.table(report) in printed


def test_what_was_personal_is_in_neither_the_store_nor_the_samples(cleaned):
    folder, store, _ = cleaned
    (row,) = map(json.loads, (folder / "store/cleaning/removed/personal_data.jsonl").read_text().splitlines())
    assert (stem(row), row["reason"]) == ("personal_data", "changed")
    assert "email@example.com" in row["text"] and "jane@" not in row["text"]
    (changed,) = (row["changed"] for row in store.manifest["cleaning"]["steps"] if row["step"] == "personal_data")
    assert changed == {"documents": 1, "bytes": len("jane@mail.net") - len("email@example.com")}
    texts = [split.read([0], split.tokens)[0] for split in store.splits.values()]
    assert not any("jane@" in store.tokenizer.decode(text) for text in texts)


@pytest.mark.slow
def test_two_workers_leave_the_same(tmp_path, monkeypatch):
    data = corpus(tmp_path / "corpus", monkeypatch)
    tasks = survey._tasks(sources.parts(data))
    found = []
    for workers in (1, 2):
        folder = epath.Path(tmp_path / f"by_{workers}")
        (folder / "tasks").mkdir(parents=True)
        for number, task in enumerate(tasks):
            finish(folder / "tasks", number, task)

        def run(step, tasks, words, workers=workers, folder=folder):
            survey.run_step(step, tasks, workers, folder, words, None)

        whole = Corpus(data, folder / "tasks")
        kept, *reports = pipeline.clean(config(tmp_path), whole, len(tasks), folder / "clean", run)
        found.append([[list(kept.documents(task, Damages("stop"))) for task in range(len(tasks))], *reports])
    assert found[0] == found[1]
    assert sum(map(len, found[0][0])) == found[0][1]["kept"]["documents"] > 0


@pytest.mark.parametrize("done", [1, 4, 7, 15, 25])
def test_what_was_stopped_goes_on_to_the_same_bytes(cleaned, tmp_path, monkeypatch, done):
    """Stopped after so many tasks of all stages."""
    folder, _, _ = cleaned
    monkeypatch.setattr(survey, "LEAST_TASK_BYTES", 9000)
    monkeypatch.setattr(survey, "TASK_BYTES", 9000)
    data = DataConfig(source="text", path=str(folder / "corpus/*.txt"), heldout_fraction=0.2)
    left = [done]

    def stop(where, task, result):
        if where.parent.name == "clean":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        finish(where, task, result)

    monkeypatch.setattr(stages, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, BYTE, tmp_path / "store", cleaning=config(tmp_path))
    monkeypatch.setattr(stages, "finish", finish)
    prepare(data, BYTE, tmp_path / "store", cleaning=config(tmp_path))
    first, again = ({str(path.relative_to(root)): hash for path, hash in tree(root).items()} for root in (
        folder / "store", tmp_path / "store"))  # fmt: skip
    assert first == again


def test_of_equal_documents_the_first_stays(tmp_path, monkeypatch):
    """Also where another is nearer to the beginning of its task."""
    data = corpus(tmp_path / "corpus", monkeypatch)
    for number in range(20):
        (tmp_path / "corpus" / f"z{number:02}.txt").write_text(prose(number))
    store = prepare(data, BYTE, tmp_path / "store", cleaning=CleanConfig(exact_duplicates=True))
    names = {stem(row) for split in store.splits.values() for row in split.names(range(split.documents))}
    assert names == {path.stem for path in (tmp_path / "corpus").glob("[!z]*")} - {"exact_duplicates"}
    (row,) = store.manifest["cleaning"]["steps"]
    assert (row["step"], row["removed"]["documents"]) == ("exact_duplicates", 21)


def test_samples_do_not_depend_on_how_documents_are_shared_out():
    documents = [Document(f"text {i}", str(i), metadata={"name": f"file {i}", "offset": 0}) for i in range(50)]
    found = []
    for sizes in ([50], [7, 1, 0, 42]):
        accounts, rest = [], iter(documents)
        for size in sizes:
            accounts.append(Account())
            for document in (next(rest) for _ in range(size)):
                accounts[-1].add(document.text)
                accounts[-1].remove("c4", "curly_bracket", document)
        found.append(merged([account.result() for account in accounts], ["c4"]))
    assert found[0] == found[1]
    assert len(found[0][1]["c4"]) == SAMPLES


def test_the_sample_of_a_change_is_looked_for_where_it_is_kept(monkeypatch):
    looked = []
    monkeypatch.setattr(os.path, "commonprefix", lambda texts: looked.append(texts) or "")
    account = Account()
    for number in range(1000):
        document = Document(f"text {number}", str(number), metadata={"name": f"file {number}", "offset": 0})
        account.change("personal_data", f"Text {number}", document, False)
    ((_, rows),) = account.result()["samples"]
    hashes = [hashlib.blake2b(f"file {number}\x000".encode(), digest_size=8).hexdigest() for number in range(1000)]
    assert [row["hash"] for row in rows] == sorted(hashes)[:SAMPLES] and len(looked) < 100


def test_what_is_off_needs_no_package_and_changes_nothing(tmp_path, monkeypatch):
    data = corpus(tmp_path / "corpus", monkeypatch)
    program = f"""import sys
sys.modules["datatrove"] = None
from gptjax.data.preparation.prepare import DataConfig, prepare
from gptjax.tokenizers.tokenizer import TokenizerConfig
store = prepare({data!r}, TokenizerConfig(kind="byte"), {str(tmp_path / "store")!r})
assert "cleaning" not in store.manifest
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_store_of_other_cleaning_is_refused_by_key(cleaned):
    folder, _, _ = cleaned
    data = DataConfig(source="text", path=str(folder / "corpus/*.txt"), heldout_fraction=0.2)
    with pytest.raises(Refused, match=r"clean.c4 \(True there, False now\)"):
        prepare(data, BYTE, folder / "store")
    (folder / "words").write_text("foo\nbar\n")
    with pytest.raises(Refused, match=r"clean.blocked_words \(\w{64} there, \w{64} now\)"):
        prepare(data, BYTE, folder / "store", cleaning=CleanConfig(**ALL, blocked_words=str(folder / "words")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(language_score=1.0), "clean.language_score=1.0 must be at least 0 and below 1"),
        (dict(gopher_min_words=0), "clean.gopher_min_words=0 must be at least 1, and at most .*=100000"),
        (dict(gopher_min_words=9, gopher_max_words=8), "gopher_min_words=9 .*gopher_max_words=8"),
        (dict(minhash_buckets=0), "clean.minhash_buckets=0 must be from 1 to"),
        (dict(languages="en, xq"), 'clean.languages has "xq", which must be a known language'),
        (dict(gopher=True, word_language="klingon"), 'clean.word_language has "klingon"'),
        (dict(gopher=True, word_language="ur"), "clean.word_language=ur needs a model of Stanza .* downloaded"),
        (dict(gopher=True, word_language="th"), "clean.word_language=th needs a package .*: pip install"),
        (dict(blocked_words="nowhere"), "nowhere is missing: give a file of words"),
        (dict(blocked_words="empty"), "clean.blocked_words=.*empty has 0 words, and at least 1"),
        (dict(blocked_words="latin1"), "clean.blocked_words=.*latin1 is not UTF-8 at byte 1"),
    ],
)
def test_refusals_come_before_any_work(tmp_path, keys, message):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin1").write_bytes(b"n\xe9\n")
    if "blocked_words" in keys:
        keys = {"blocked_words": str(tmp_path / keys["blocked_words"])}
    data = DataConfig(source="text", path="missing/*.txt")
    with pytest.raises(Refused, match=message):
        values = default()
        values.clean.update(keys)
        prepare(data, BYTE, tmp_path / "store", cleaning=parse(values).clean)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "latin1"}


def test_a_missing_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(
        Refused, match=r"Cleaning needs packages that are not installed \(.*spacy.*\): pip install 'gptjax\[data\]'"
    ):
        prepare(DataConfig(), BYTE, tmp_path / "store", cleaning=CleanConfig(gopher=True))


def test_only_deduplication_needs_a_file_of_each_task(tmp_path, monkeypatch):
    data = corpus(tmp_path / "corpus", monkeypatch)
    monkeypatch.setattr(stages.resource, "getrlimit", lambda _: (9, 9))
    with pytest.raises(Refused, match="ulimit -Hn is 9: raise it"):
        prepare(data, BYTE, tmp_path / "store", cleaning=CleanConfig(exact_duplicates=True))
    prepare(data, BYTE, tmp_path / "store", cleaning=CleanConfig(languages="en"))


def test_a_corpus_of_which_nothing_is_left_is_refused(tmp_path, monkeypatch):
    data = corpus(tmp_path / "corpus", monkeypatch)
    with pytest.raises(Refused, match=r"leaves 1 of 29 documents, and languages removes 28 \(en\)"):
        prepare(data, BYTE, tmp_path / "store", cleaning=CleanConfig(languages="de"))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_comparing_tells_that_it_goes_on(tmp_path):
    """So that the watchdog of a run that prepares by itself does not end it."""

    class Step:
        def run(self, *_):
            pass

    counts = []
    step = stages.Compare(Step(), 2, epath.Path(tmp_path))
    for task in range(2):
        step(task, lambda *more: counts.append(more))
    assert counts == [(0, 0, 0)] * 2


@pytest.mark.parametrize("numbers, left", [(True, 60), (False, 1)])
def test_texts_that_differ_in_numbers_alone(tmp_path, numbers, left):
    folder = tmp_path / "sums"
    folder.mkdir()
    for one in range(60):
        (folder / f"{one}.txt").write_text(f"We add {one} and {3 * one + 7}, which makes {4 * one + 7} in all.")
    data = DataConfig(source="text", path=str(folder / "*.txt"), heldout_fraction=0.3)
    cleaning = CleanConfig(near_duplicates=True, minhash_numbers=numbers)
    if left == 1:
        with pytest.raises(Refused):  # a single document can't be split in two
            prepare(data, BYTE, tmp_path / "store", cleaning=cleaning)
        return
    store = prepare(data, BYTE, tmp_path / "store", cleaning=cleaning)
    assert store.manifest["cleaning"]["kept"]["documents"] == left


def test_a_store_of_before_is_used_as_it_was_made(tmp_path, monkeypatch):
    """Its settings do not say whether numbers differ."""
    data, cleaning = corpus(tmp_path / "corpus", monkeypatch), CleanConfig(near_duplicates=True)
    store = prepare(data, BYTE, tmp_path / "store", cleaning=cleaning)
    path = tmp_path / "store/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["settings"].pop("clean.minhash_numbers") is True
    path.write_text(json.dumps(manifest))
    assert prepare(data, BYTE, tmp_path / "store", cleaning=cleaning).folder == store.folder


def test_a_byte_order_mark_is_no_part_of_the_first_blocked_word(tmp_path):
    (tmp_path / "words").write_bytes(b"\xef\xbb\xbffoo\nbar\n")
    assert pipeline.blocked(CleanConfig(blocked_words=str(tmp_path / "words"))) == ["bar", "foo"]
