import collections
import dataclasses
import json
import math

import numpy as np
import pytest
from etils import epath
from support.command import DEBUG, losses, rows
from support.runs import tiny
from support.stores import write_store

from gptjax.checkpoints.manager import Checkpoints
from gptjax.checkpoints.record import RunRecord
from gptjax.data.store import store as stores
from gptjax.data.store.store import Store
from gptjax.data.stream import curriculum, mixture
from gptjax.data.stream.curriculum import CurriculumConfig, Phase
from gptjax.data.stream.mixture import PERIOD, Corpus, MixtureConfig
from gptjax.data.stream.stream import Stream
from gptjax.errors import Refused
from gptjax.models.config import ModelConfig
from gptjax.tokenizers.tokenizer import TokenizerConfig
from gptjax.training import batch_audit, loop
from gptjax.training.corpus import make_corpus
from gptjax.training.optim.config import OptimizerConfig
from gptjax.training.resume_point import check_same_data

T = 16
SIZES = {"code": 1000, "web": 2500, "books": 700}  # tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("mixture")
    return {name: write_store(where / name, size, letters) for (name, size), letters in
            zip(SIZES.items(), ("abcdefgh", "ijklmnop", "qrstuvwxyz"), strict=True)}  # fmt: skip


def names(folders):
    return ", ".join(f"{name}={folder}" for name, folder in folders.items())


def stream_of(folders, weights, seed=0, seq_len=T, batch_size=8, history=(), batch=0, **changes):
    planned = curriculum.phases(
        MixtureConfig(names(folders), weights), CurriculumConfig(**changes), seq_len, batch_size
    )
    return Stream(Corpus.open(names(folders)), curriculum.going_on(list(history), planned, batch), seq_len, seed)


def counts(data, batches):
    found = collections.Counter(source.store for batch in batches for source in data.sources(batch))
    return {name: found[name] for name in sorted(found)}


@pytest.mark.parametrize("weights, asked", [
    ("code 0.7, web 0.3", {"code": 0.7, "web": 0.3}),
    ("code 1, web 1, books 1", dict.fromkeys(SIZES, 1 / 3)),
    ("web 977, books 22, code 1", {"web": 0.977, "books": 0.022, "code": 0.001}),
])  # fmt: skip
def test_proportions_over_ten_thousand_windows(folders, weights, asked):
    """From anywhere, exactly as far as 10,000 windows can be; over less, within two windows."""
    data = stream_of(folders, weights, batch_size=50)
    found = counts(data, range(137, 337))
    assert sum(found.values()) == 10_000
    assert all(abs(found[name] - 10_000 * share) < 1 for name, share in asked.items())
    some = counts(data, range(3, 10))
    assert all(abs(some.get(name, 0) - 350 * share) <= 2 for name, share in asked.items())


def test_what_a_table_says_is_what_is_counted():
    shares = mixture.shares("a 3, b 2, c 0.01", ["a", "b", "c"])
    store, before = mixture.taken(shares, np.arange(3 * PERIOD))
    seen = collections.Counter()
    for number, (chosen, count) in enumerate(zip(store.tolist(), before.tolist(), strict=True)):
        assert seen[chosen] == count
        seen[chosen] += 1
        if number % 777 == 0:
            assert mixture.given(shares, number + 1) == {name: seen[at] for at, name in enumerate(shares)}


def test_each_store_gives_its_windows_in_its_own_epochs(folders):
    data = stream_of(folders, "code 5, web 3, books 2")
    starts = collections.defaultdict(list)
    for batch in range(100):
        for source in data.sources(batch):
            starts[source.store].append(source.spans[0][1])
    for name, found in starts.items():
        windows = -(-(SIZES[name] - 1) // T)
        epochs = [found[at : at + windows] for at in range(0, len(found) - windows + 1, windows)]
        assert epochs and all(sorted(epoch) == list(range(0, T * windows, T)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_rows_are_of_their_stores_on_any_number_of_hosts(folders):
    data = stream_of(folders, "code 0.5, web 0.4, books 0.1")
    for batch in (0, 3, 1000):
        whole = data.batch(batch, np.arange(8))
        for source, row, weights in zip(data.sources(batch), whole.inputs, whole.weights, strict=True):
            split = data.corpus.stores[source.store].split("train")
            tokens = split.read(np.array([source.spans[0][1]]), T)[0]
            np.testing.assert_array_equal(row, np.where(weights, tokens, 0))
        for hosts in (2, 4):
            parts = [data.batch(batch, rows) for rows in np.split(np.arange(8), hosts)]
            for field, split in zip(whole, zip(*parts, strict=True), strict=True):
                np.testing.assert_array_equal(field, np.concatenate(split))
        again = stream_of(folders, "code 0.5, web 0.4, books 0.1").batch(batch, np.array([6, 1]))
        np.testing.assert_array_equal(again.inputs, whole.inputs[[6, 1]])


def test_weights_that_change_when_a_run_goes_on_leave_each_store_where_it_was(folders):
    """Neither what it gave before nor what it gives next depends on them, but only how soon."""
    first = stream_of(folders, "code 0.7, web 0.3")
    changed = stream_of(folders, "code 0.2, web 0.5, books 0.3", history=first.phases, batch=37)
    assert [phase.first for phase in changed.phases] == [0, 37]
    for batch in range(37):
        assert changed.sources(batch) == first.sources(batch)

    def order(data):
        sources = [source for batch in range(90) for source in data.sources(batch)]
        return {name: [source.spans[0][1] for source in sources if source.store == name] for name in SIZES}

    for name in ("code", "web"):
        one, other = order(first)[name], order(changed)[name]
        assert one[: len(other)] == other[: len(one)] and len(one) != len(other)
    again = curriculum.read_saved(json.loads(json.dumps({"phases": curriculum.saved(changed.phases)})), T, "here")
    same = stream_of(folders, "code 0.2, web 0.5, books 0.3", history=again, batch=60)
    assert same.phases == changed.phases
    for batch in (36, 37, 60, 200):
        assert same.sources(batch) == changed.sources(batch)


def test_a_schedule_of_weights(folders):
    data = stream_of(folders, "0: code 1; 20: code 1, web 3; 60: books 1")
    assert counts(data, range(20)) == {"code": 160}
    assert counts(data, range(20, 60)) == {"code": 80, "web": 240}
    assert counts(data, range(60, 70)) == {"books": 80}
    assert data.sources(19) != data.sources(20)


@pytest.mark.parametrize("stores, weights, words", [
    ("code", "code 1", '"code", which must be NAME=FOLDER'),
    ("code=/a, code=/b", "code 1", "names code twice, /a and /b"),
    ("a b=/a", "code 1", "which must be NAME=FOLDER"),
    ("code=/a", "", 'mixture.weights="" must give'),
    ("", "code 1", 'mixture.stores="" must name'),
    ("code=/a, web=/b", "code 1, wbe 2", 'wbe, which must be one of the stores code, web. Did you mean "web"?'),
    ("code=/a, web=/b", "code 1, web 0", "has web 0; a weight must be above 0"),
    ("code=/a, web=/b", "code 1, web -0.5", "has web -0.5; a weight must be above 0"),
    ("code=/a, web=/b", "code 1, web nan", "a weight must be above 0"),
    ("code=/a, web=/b", "code 1, web inf", "a weight must be above 0"),
    ("code=/a, web=/b", "code 1, code 2", "has code twice, 1 and 2"),
    ("code=/a, web=/b", "code 1, web", 'has "web", which must be NAME NUMBER'),
    ("code=/a, web=/b", "code 1, web 0.00001", "less than one window in 10000"),
    ("code=/a, web=/b", "0: code 1; 0: web 1", 'has "0: web 1"; "BATCH: VALUE" must start at 0 and ascend'),
    ("code=/a, web=/b", "5: code 1", '"BATCH: VALUE" must start at 0'),
    ("code=/a, web=/b", "0: code 1; x: web 1", '"BATCH: VALUE" must start at 0'),
])  # fmt: skip
def test_what_is_refused(stores, weights, words):
    with pytest.raises(Refused) as refusal:
        curriculum.phases(MixtureConfig(stores, weights), CurriculumConfig(), T, 8)
    assert words in str(refusal.value)


def test_a_small_store_and_another_tokenizer_are_refused(folders, tmp_path):
    small = write_store(tmp_path / "small", T)
    with pytest.raises(Refused, match=f"small has {T} tokens to train on, and a window of seq_len={T} takes {T + 1}"):
        stream_of(folders | {"small": small}, "code 1")
    other = write_store(tmp_path / "other", 100)
    (other / "tokenizer" / "tokenizer.json").write_text('{"kind": "byte" }')
    manifest = json.loads((other / "manifest.json").read_text())
    hash = mixture.Store.open(folders["code"]).tokenizer.hash
    files = {"tokenizer.json": (other / "tokenizer" / "tokenizer.json").read_bytes()}
    manifest["tokenizer_hash"] = stores.hash_of(files)
    manifest["files"]["tokenizer/tokenizer.json"] = len(files["tokenizer.json"])
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refused, match=f"code was made by tokenizer {hash[:12]} and other by"):
        Corpus.open(names(folders | {"other": other}))


@pytest.mark.parametrize("change, words", [
    (dict(phases={}), "phases is {}, not of type list"),
    (dict(phases=[]), "it has no phases"),
    (dict(phases=[3]), "a phase is 3, not of type dict"),
    (dict(first=1), "a phase from batch 1 that can't be"),
    (dict(seq_len=0), "that can't be"),
    (dict(seq_len=7), "that can't be"),
    (dict(batch_size=0), "a phase of 0 sequences"),
    (dict(batch_size=2**40), "sequences"),
    (dict(shares={"a": 5, "b": 9_994}), "that can't be"),
    (dict(shares={"a": -1, "b": 10_001}), "that can't be"),
    (dict(shares={"a": "x"}), "a is 'x', not of type int"),
])  # fmt: skip
def test_phases_that_no_run_wrote_are_refused(change, words):
    phase = dict(first=0, seq_len=T, batch_size=8, shares={"a": PERIOD})
    content = {"phases": change["phases"] if "phases" in change else [phase | change]}
    with pytest.raises(Refused) as refusal:
        curriculum.read_saved(content, T, "here")
    assert words in str(refusal.value)
    assert curriculum.read_saved({"phases": [phase]}, T, "here") == [Phase(**phase)]


# Whole runs


def run_of(folders, **changes):
    mixed = MixtureConfig(names(folders), changes.pop("weights"))
    own = dict(
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2, schedule="constant"),
        num_steps=6,
        checkpoint_every=3,
        eval_every=3,
        log_every=1,
        num_samples=0,
        seq_len=T,
        mixture=mixed,
    )
    return tiny(ModelConfig(num_layers=1, num_heads=2, embed_dim=16), **(own | changes))


@pytest.fixture(scope="module")
def mixed(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    loop.train(run_of(folders, weights="code 0.6, web 0.4"), epath.Path(folder))
    return folder


def test_loss_by_source(mixed, folders, gptjax_main):
    code, out, error = gptjax_main("eval", f"--workdir={mixed}")
    assert code == 0, error
    found = json.loads(out)
    assert set(found["sources"]) == set(SIZES)
    each = found["sources"].values()
    assert [row["tokens"] for row in each] == [size - 1 for size in SIZES.values()]
    total = sum(row["tokens"] for row in each)
    assert found["tokens"] == total
    assert found["loss"] == pytest.approx(sum(row["loss"] * row["tokens"] for row in each) / total, rel=1e-6)
    (last,) = [row for row in rows(mixed) if row["step"] == 6 and "eval_loss" in row]
    for name, row in found["sources"].items():
        assert last[f"eval_loss/{name}"] == pytest.approx(row["loss"], rel=1e-5)
        assert last[f"eval_bits_per_byte/{name}"] == pytest.approx(row["bits_per_byte"], rel=1e-5)
        assert row["bits_per_byte"] > row["loss"] / math.log(2)  # the tokens that end documents have no bytes
    assert last["eval_loss"] == pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.slow
def test_weights_changed_on_resume(mixed, folders, tmp_path, capfd):
    """The run that was changed at step 3 is, to the last bit, one that planned it."""
    changed, planned = epath.Path(tmp_path / "changed"), epath.Path(tmp_path / "planned")
    loop.train(run_of(folders, weights="code 0.6, web 0.4", num_steps=3), changed)
    loop.train(run_of(folders, weights="web 0.2, books 0.8"), changed)
    loop.train(run_of(folders, weights="0: code 0.6, web 0.4; 3: web 0.2, books 0.8"), planned)
    assert losses(changed) == losses(planned)
    assert list(losses(changed).values())[:3] == list(losses(mixed).values())[:3]
    assert list(losses(changed).values())[3:] != list(losses(mixed).values())[3:]
    with Checkpoints(changed / "checkpoints") as checkpoints:
        assert [phase.first for phase in checkpoints.record(6).progress.phases] == [0, 3]
    other = {"text": folders["code"]} | {name: folders[name] for name in ("web", "books")}
    with pytest.raises(Refused, match="mixture.stores calls .*code text, but .* knows this text as 'code'"):
        loop.train(run_of(other, weights="web 1", num_steps=7), changed)
    swapped = folders | {"code": folders["web"]}
    with pytest.raises(Refused, match=r"web has text_hash \w{12}, but .* was trained on \w{12}"):
        loop.train(run_of(swapped, weights="web 1", num_steps=7), changed)


def test_a_name_that_comes_or_goes(folders, tmp_path):
    alone, mix = ({name: Store.open(folders["code"])} for name in ("", "code"))

    def hashes(corpus):
        return {name: store.manifest["text_hash"] for name, store in corpus.items()}

    for saved, corpus, words in (
        (alone, mix, f"go on with data.store={folders['code']} and no mixture"),
        (mix, alone, f"go on with mixture.stores='code={folders['code']}' and mixture.weights='code 1'"),
    ):
        known = RunRecord({}, Corpus(saved).tokenizer.hash, hashes(saved))
        check_same_data(Corpus(saved), known, "here")
        with pytest.raises(Refused, match=words):
            check_same_data(Corpus(corpus), known, "here")


def test_the_vocabulary_is_that_of_the_stores(folders, tmp_path):
    config = run_of(folders, weights="code 1", tokenizer=TokenizerConfig())
    with pytest.raises(Refused, match="a vocabulary of 257, and the section tokenizer 4096: set .*kind=byte"):
        make_corpus(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_show_prints_what_was_read(mixed, folders, gptjax_main, refused):
    mixture_flags = [f"--config.mixture.stores={names(folders)}", "--config.mixture.weights=code 0.6, web 0.4"]
    flags = [f"--config={DEBUG}", *mixture_flags, f"--config.seq_len={T}"]
    code, out, error = gptjax_main("data", "show", *flags, "--step=5", "--row=2")
    assert code == 0, error
    config = dataclasses.replace(run_of(folders, weights="code 0.6, web 0.4"), batch_size=8)
    data = Stream(Corpus.open(names(folders)), config.phases, T, 0)
    source, row = data.sources(4)[2], data.batch(4, np.array([2]))
    start = source.spans[0][1]
    split = data.corpus.stores[source.store].split("train")
    assert f"step 5 reads batch 4: 8 rows of {T} tokens, code 60.00%, web 40.00%" in out
    assert f"row 2 · {source.store} {folders[source.store]} · {(row.weights == 0).sum()} of {T} padding" in out
    segments = out.split("─" * 8)[1:]
    assert len(segments) == 2 * row.segments.max()
    shown = "".join(segment.strip("\n") for segment in segments[1::2])
    tokenizer = data.corpus.tokenizer
    assert shown.replace("⏵", "") == tokenizer.decode(row.inputs[0][row.weights[0] > 0])
    assert shown.count("⏵") == (row.inputs[0] == tokenizer.end_of_text).sum()
    number, starts = split.document_at(start), split.document_starts()
    begins = start - starts[number]
    assert f"{source.store}/{number}.txt from 0, tokens {begins} to " in segments[0]
    show = ["data", "show", *flags]
    code, whole, _ = gptjax_main(*show, "--step=5")
    assert code == 0 and out[out.index("row 2 ·") :].strip() in whole
    assert "--step=0 must be from 1 to num_steps=60" in refused(mixed, *show, "--step=0")
    assert "--step=61 must be from 1 to num_steps=60" in refused(mixed, *show, "--step=61")
    assert "--row=8 is none of the rows 0 to 7 of step 5" in refused(mixed, *show, "--step=5", "--row=8")
    shown = batch_audit.show(run_of(folders, weights="code 0.6, web 0.4"), epath.Path(mixed), 5, 2)
    assert shown.startswith("step 5 reads batch 4, as of the checkpoint of step 6: 8 rows")
    with pytest.raises(Refused, match="batch 0 has rows of the store code, which mixture.stores no longer has"):
        batch_audit.show(run_of({"web": folders["web"]}, weights="web 1"), epath.Path(mixed), 1, -1)
    alone = ["data", "show", f"--config={DEBUG}", "--step=1"]
    assert "--workdir is not given: set one of the three" in refused(mixed, *alone)
