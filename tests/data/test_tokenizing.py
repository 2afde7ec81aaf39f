"""The verbs `tokenizer train` and `tokenizer eval`, and that a store's tokenizer is its own, of each kind."""

import json
import shutil
import tempfile

import pytest
import tokenizers as library
from support.command import DEBUG, tree
from tokenizers import models, pre_tokenizers, trainers

from gptjax.data.preparation.prepare import DataConfig, prepare
from gptjax.data.store.store import Store
from gptjax.errors import Refused
from gptjax.tokenizers import tokenizer
from gptjax.tokenizers.tokenizer import TokenizerConfig


@pytest.fixture
def flags(corpus):
    flags = ["--config=" + DEBUG, "--config.data.source=text", f"--config.data.path={corpus}"]
    return [*flags, "--config.data.heldout_fraction=0.2", "--config.tokenizer.kind=sentencepiece"]


@pytest.fixture
def data(corpus):
    return DataConfig(source="text", path=str(corpus), heldout_fraction=0.2)


def huggingface(folder, corpus, dropped=None):
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(path) for path in corpus.parent.glob(corpus.name)], trainer)
    if dropped:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(dropped, "removed"), made.pre_tokenizer])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_what_is_trained_is_what_preparation_trains(gptjax_main, flags, data, tmp_path, model):
    flags += ["--config.tokenizer.vocab_size=280", f"--config.tokenizer.model={model}"]
    code, out, _ = gptjax_main("tokenizer", "train", *flags, f"--target={tmp_path}/made")
    made = tokenizer.load(tmp_path / "made")
    assert code == 0 and f"{tmp_path}/made: 280 ids, hash {made.hash[:12]}" in out
    trained = prepare(data, TokenizerConfig(vocab_size=280, model=model), tmp_path / "trained")
    given = prepare(data, TokenizerConfig(path=str(tmp_path / "made")), tmp_path / "given")
    assert made.hash == trained.tokenizer.hash == given.tokenizer.hash
    assert given.split("train").tokens == trained.split("train").tokens


def test_refusals_to_train(refused, flags, finished, tmp_path):
    target = f"--target={tmp_path}/made"
    assert "leaves nothing to train" in refused(
        tmp_path, "tokenizer", "train", *flags, target, "--config.tokenizer.kind=byte"
    )
    message = refused(tmp_path, "tokenizer", "train", *flags, target, "--config.tokenizer.vocab_size=99999")
    assert "vocab_size is 99999, but this corpus has pieces for at most" in message
    assert "must be a new or empty folder" in refused(finished, "tokenizer", "train", *flags, f"--target={finished}")
    assert "heldout_fraction=2.0 must be above 0 and below 1" in refused(
        tmp_path, "tokenizer", "train", *flags, target, "--config.data.heldout_fraction=2"
    )


def test_what_can_not_be_written_is_a_sentence(gptjax_main, flags, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    flags += ["--config.tokenizer.vocab_size=280"]
    code, _, error = gptjax_main("tokenizer", "train", *flags, f"--target={tmp_path}/file/x")
    assert code == 1 and f"--target={tmp_path}/file/x can't be written (Not a directory): make room" in error
    for verb in ["train", f"--target={tmp_path}/x"], ["eval", "--tokenizers=byte"]:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", f"{tmp_path}/none")
            code, _, error = gptjax_main("tokenizer", *verb, *flags)
        assert code == 1 and "temporary files can't be written (No such file or directory): make room" in error


def test_eval_compares_on_the_heldout_text(gptjax_main, flags, data, corpus, tmp_path):
    made = tokenizer.train(TokenizerConfig(vocab_size=280), ["one plus two is three.\n"] * 9, tmp_path / "made")
    paths = ["byte", str(tmp_path / "made"), str(huggingface(tmp_path / "hf", corpus))]
    code, out, _ = gptjax_main("tokenizer", "eval", *flags, f"--tokenizers={','.join(paths)}", "--json")
    found = json.loads(out)
    store = prepare(data, TokenizerConfig(path=str(tmp_path / "made")), tmp_path / "store")
    split = store.split("heldout")
    assert code == 0 and (found["documents"], found["bytes"]) == (split.documents, split.bytes)
    rows = {row["tokenizer"]: row for row in found["tokenizers"]}
    assert list(rows) == paths
    assert all(row["exact_documents"] == split.documents and row["megabytes_per_second"] > 0 for row in rows.values())
    assert rows["byte"]["bytes_per_token"] == 1
    seen = {byte for row in heldout(store) for byte in open(row["name"], "rb").read()}
    assert rows["byte"]["vocab_used"] == len(seen) / 257
    assert rows[paths[1]]["bytes_per_token"] == split.bytes / (split.tokens - split.documents)
    assert rows[paths[1]]["vocab_size"] == made.vocab_size and rows[paths[2]]["vocab_size"] == 300
    code, out, _ = gptjax_main("tokenizer", "eval", *flags, f"--config.tokenizer.path={paths[1]}")
    first, head, row = out.splitlines()
    assert first.startswith(f"{split.documents} held-out documents") and head.split()[0] == "tokenizer"
    assert row.split()[:2] == [paths[1], "280"] and row.endswith(f"{split.documents} of {split.documents}")


def heldout(store):
    return [json.loads(line) for line in (store.folder / "heldout/documents.jsonl").read_text().splitlines()]


def test_eval_names_the_documents_that_change(gptjax_main, flags, data, corpus, tmp_path):
    names = [row["name"] for row in heldout(prepare(data, TokenizerConfig(kind="byte"), tmp_path / "store"))]
    line = open(names[1], encoding="utf-8").readlines()[3]
    path = huggingface(tmp_path / "hf", corpus, dropped=line)
    code, out, _ = gptjax_main("tokenizer", "eval", *flags, f"--tokenizers={path}")
    assert code == 0 and out.splitlines()[-1].endswith(f"{len(names) - 1} of {len(names)}, not {names[1]}")


def test_refusals_to_compare(refused, flags, tmp_path):
    assert "--tokenizers is not given" in refused(tmp_path, "tokenizer", "eval", *flags)
    assert "/nowhere does not exist" in refused(tmp_path, "tokenizer", "eval", *flags, "--tokenizers=byte,/nowhere")


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "huggingface"])
def test_a_store_refuses_another_tokenizer(data, corpus, tmp_path, kind):
    config = {
        "byte": TokenizerConfig(kind="byte", special_tokens="<a>"),
        "sentencepiece": TokenizerConfig(vocab_size=280),
        "huggingface": TokenizerConfig(kind="huggingface", path=str(huggingface(tmp_path / "hf", corpus))),
    }[kind]
    store = prepare(data, config, tmp_path / "store")
    kept = store.folder / "tokenizer"
    other = tokenizer.train(TokenizerConfig(kind="byte", special_tokens="<b>"), [], tmp_path / "other")
    shutil.rmtree(kept)
    shutil.copytree(tmp_path / "other", kept)
    manifest = json.loads((store.folder / "manifest.json").read_text())  # of which the lengths fit
    lengths = {f"tokenizer/{path.name}": path.stat().length for path in kept.iterdir()}
    files = {name: size for name, size in manifest["files"].items() if not name.startswith("tokenizer/")}
    (store.folder / "manifest.json").write_text(json.dumps(manifest | {"files": files | lengths}))
    with pytest.raises(
        Refused, match=f"has hash {other.hash[:12]}, but the tokens .* made by {store.tokenizer.hash[:12]}"
    ):
        Store.open(store.folder)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_path_that_holds_another_tokenizer_by_now_is_refused(data, corpus, tmp_path, kind):
    if kind == "huggingface":
        path = huggingface(tmp_path / "there", corpus)
        config = TokenizerConfig(kind=kind, path=str(path))
    else:
        tokenizer.train(TokenizerConfig(vocab_size=280), ["one plus two is three.\n"] * 9, tmp_path / "there")
        path = tmp_path / "there" / "sentencepiece.model"
        config = TokenizerConfig(path=str(tmp_path / "there"))
    made = prepare(data, config, tmp_path / "store").tokenizer.hash
    path.write_bytes(path.read_bytes() + b"\n")
    before = tree(tmp_path / "store")
    with pytest.raises(Refused, match=f"has hash .*, but the tokens of {tmp_path}/store were made by {made[:12]}"):
        prepare(data, config, tmp_path / "store")
    assert tree(tmp_path / "store") == before
    shutil.rmtree(tmp_path / "there")  # and one that is gone is not needed: the store has its own
    assert prepare(data, config, tmp_path / "store").tokenizer.hash == made
