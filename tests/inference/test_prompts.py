"""Pairs of prompt and response: which tokens carry loss, from the line of a file to a step and an evaluation."""

import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx
from support.command import training
from support.runs import GPT2, data_of, mesh_of, tiny

from gptjax.data.preparation import tasks
from gptjax.data.preparation.prepare import prepare
from gptjax.data.sources import sources
from gptjax.data.sources.documents import Damages, DataConfig, Document
from gptjax.data.store.store import Store
from gptjax.data.stream import stream
from gptjax.data.stream.augment import AugmentConfig
from gptjax.data.stream.mixture import Corpus
from gptjax.data.stream.packing import PackingConfig
from gptjax.errors import Failed, Refused
from gptjax.evaluation.heldout import evaluate
from gptjax.inference import generate
from gptjax.models.loss import LossConfig
from gptjax.models.transformer import Transformer
from gptjax.tokenizers.tokenizer import ByteTokenizer, TokenizerConfig, encode_prompt

PAIRS = [
    (f"What is {a} plus {b}, né? " * (a % 3), f"It is {a + b}{'!' * (b % 4)}") for a in range(12) for b in range(9)
]
BYTE = TokenizerConfig(kind="byte")
T = 128


def jsonl(folder, pairs):
    lines = [json.dumps({"id": 1, "answer": response, "question": prompt}) for prompt, response in pairs]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return DataConfig(
        "jsonl", str(folder / "a.jsonl"), text_field="answer", prompt_field="question", heldout_fraction=0.2
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("pairs"), PAIRS)


@pytest.fixture(scope="module")
def pairs(data, tmp_path_factory):
    """The pairs as a store of bytes."""
    return prepare(data, BYTE, tmp_path_factory.mktemp("stores") / "pairs")


def documents(split):
    """Of each document in its order: its tokens, and how many of them are a prompt's by what the store says."""
    tokens = split.read(np.array([0]), split.tokens)[0].astype(np.int32)
    prompt = split.in_prompts(np.array([0]), np.array([split.tokens]))
    starts = split.document_starts()[1:]
    return zip(np.split(tokens, starts), np.split(prompt, starts), strict=True)


@pytest.mark.parametrize("tokenizer", [BYTE, TokenizerConfig(vocab_size=300)], ids=["byte", "sentencepiece"])
def test_a_store_knows_where_prompts_end(data, tmp_path, tokenizer):
    store, found = prepare(data, tokenizer, tmp_path / "store"), []
    encode = store.tokenizer.encode
    for split in store.splits.values():
        for tokens, prompt in documents(split):
            assert tokens[0] == store.tokenizer.end_of_text and not prompt[0]
            count = prompt.sum()
            assert prompt[1 : 1 + count].all()
            pair = tuple(store.tokenizer.decode(part) for part in (tokens[1 : 1 + count], tokens[1 + count :]))
            found.append(pair)
            np.testing.assert_array_equal(tokens[1:], np.concatenate([encode(text) for text in pair]))
    assert sorted(found) == sorted(PAIRS)


@pytest.mark.parametrize("method", ["concat", "best_fit"])
@pytest.mark.parametrize("seq_len", [16, 200])
def test_an_epoch_has_the_responses_and_their_ends_as_targets_with_weight(pairs, method, seq_len):
    config = tiny(GPT2, seq_len=seq_len, packing=PackingConfig(method))
    data, split = data_of(config, pairs), pairs.split("train")
    rows = data.packed[""].rows
    batches = [data.batch(index, np.arange(8)) for index in range(rows // 8)]
    batches.append(data.batch(rows // 8, np.arange(rows % 8)))
    inputs, targets, _, segments, weights = (np.concatenate(field) for field in zip(*batches, strict=True))
    assert ((inputs == 256) | (segments > 0) | (weights == 0)).all()
    expected = np.concatenate([tokens[~prompt] for tokens, prompt in documents(split)])[1:]
    assert sorted(targets[weights == 1]) == sorted(expected)
    assert set(np.unique(weights)) == {0, 1}
    if (method, seq_len) == ("best_fit", 200):  # whole pairs: each response is at once behind its prompt
        printed = "".join(
            "|" if target == 256 or not segment else chr(target) if weight else "."
            for row in zip(targets, weights, segments, strict=True)
            for target, weight, segment in [*zip(*row, strict=True), (256, 0, 0)]
        )
        ends = re.findall(r"(\.*)([^.|]+)\|", printed)
        train = [(len(prompt.encode()), text) for prompt, text in PAIRS]
        assert {(len(prompt), text) for prompt, text in ends} <= set(train) and len(ends) == split.documents


def test_held_out_rows_are_of_whole_pairs(pairs):
    split = pairs.split("heldout")
    batches = stream.heldout_batches(pairs, seq_len=96, batch_size=5, rows=np.arange(5))
    everything = [
        np.concatenate(field) for field in zip(*(batches[index] for index in range(len(batches))), strict=True)
    ]
    inputs, _, _, segments, weights = everything
    opened = inputs[:, 0][segments[:, 0] > 0]
    assert (opened == 256).all() and len(opened) < 5 * len(batches)
    assert weights.sum() == sum((~prompt).sum() for _, prompt in documents(split)) - 1


@pytest.fixture(scope="module")
def judged():
    """The evaluation of an untrained model on a store, of the first so many windows."""
    mesh = mesh_of(1, 2, 1)
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: Transformer(GPT2.resolved(), 257, T, nnx.Rngs(0)))()

    def judge(store, max_windows):
        corpus = Corpus({"": store})
        with jax.set_mesh(mesh):
            return evaluate(
                model, corpus=corpus, mesh=mesh, seq_len=T, batch_size=4, max_windows=max_windows, loss=LossConfig()
            )

    return judge


def test_an_evaluation_counts_the_bytes_of_responses(pairs, judged):
    found = judged(pairs, 0)
    responses = [tokens[~prompt][1:] for tokens, prompt in documents(pairs.split("heldout"))]
    size = sum(map(len, responses))
    assert found.tokens == size + len(responses) - 1
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / size, rel=1e-6)
    assert found.loss == pytest.approx(math.log(257), rel=0.1)  # untrained, it gives about the same to each byte


def test_prompts_alone_are_no_evaluation(tmp_path, judged):
    data = jsonl(tmp_path, [("x" * 400 + str(number), "y") for number in range(30)])
    with pytest.raises(Failed, match="have 0 tokens with a loss; raise eval_batches"):
        judged(prepare(data, BYTE, tmp_path / "store"), 4)


@pytest.mark.parametrize("record, words", [
    ({"answer": "x"}, 'must have a field "question" (it has answer): name the one that holds the prompt'),
    ({"question": "x"}, 'must have a field "answer" (it has question): name the one that holds the text'),
    ({"question": 1, "answer": "x"},
     'must have a field "question" that is text (1): name the one that holds the prompt'),
    ({"question": "x", "answer": None}, 'must have a field "answer" that is text (None)'),
    ({"question": "x", "answer": ""}, 'has an empty response in the field "answer": add the response'),
])  # fmt: skip
def test_a_pair_that_is_none_is_named_by_its_line(tmp_path, record, words):
    data = jsonl(tmp_path, PAIRS[:3])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(Refused) as refusal:
        list(sources.documents(data))
    assert f"a.jsonl line 4 {words}" in str(refusal.value)
    damages = Damages("skip")
    assert [document.text for document in sources.documents(data, damages)] == ["".join(pair) for pair in PAIRS[:3]]
    assert damages.count == 1


def test_what_does_not_go_with_prompts(pairs, refused, corpus, tmp_path):
    on = training(corpus, tmp_path / "run", "--config.data.prompt_field=question")
    assert "data.source=text and data.text_field=text: change one" in refused(tmp_path, *on)
    same = *on, "--config.data.source=jsonl", "--config.data.text_field=question"
    assert "data.source=jsonl and data.text_field=question: change one" in refused(tmp_path, *same)
    assert "clean.c4 are both set" in refused(tmp_path, *on, "--config.clean.c4=true")
    with pytest.raises(Refused, match="has prompts, and augment=.*token_dropout.* turn it off"):
        data_of(tiny(GPT2, augment=AugmentConfig(token_dropout=0.1)), pairs)


def test_a_prompt_is_told_as_generate_tells_it():
    """With the space that the tokenizer's model knows; a response, and a text without a prompt, are as they are."""
    known = ByteTokenizer("")
    known.prefix = "always"
    texts = [Document("x", 0, "askedanswered", 5), Document("x", 0, "text")]
    (asked, answered), (nothing, text) = tasks._encoded(known, texts, False)
    assert asked.tolist() == encode_prompt(known, "asked").tolist() == known.encode(" asked").tolist()
    assert [known.decode(ids) for ids in (answered, nothing, text)] == ["answered", "", "text"]


def test_prompts_that_can_not_be_are_refused(data, tmp_path):
    store = prepare(data, BYTE, tmp_path / "store")
    path = tmp_path / "store/train/prompts/c/0"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(Refused, match="train/prompts is not as it was written .*: copy the whole store"):
        Store.open(store.folder).split("train").in_prompts(np.array([0]), np.array([5]))


def test_a_damaged_index_of_the_held_out_rows_ends_no_run(pairs, data, gptjax_main, tmp_path):
    """They are packed by it; `gptjax eval` refuses them."""
    store = shutil.copytree(pairs.folder, tmp_path / "store")
    path = store / "heldout/document_starts/c/0"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    more = (f"--config.data.store={store}", "--config.data.source=jsonl", "--config.data.text_field=answer")
    more += ("--config.data.prompt_field=question", "--config.data.heldout_fraction=0.2")
    code, out, error = gptjax_main(*training(data.path, tmp_path / "run", *more))
    assert code == 0, error
    why = "the held-out rows of process 0 of 1: Refused: "
    assert f"step 4 could not be evaluated (Unreadable: {why}" in out and "heldout/document_starts is not as" in out
    code, _, error = gptjax_main("eval", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and error.count("\n") == 1 and why in error


def test_a_store_without_prompts_is_as_before(store):
    assert not any("prompts" in name for name in store.manifest["files"])
    assert not store.split("train").has_prompts


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert generate.read_prompts(epath.Path(tmp_path / "prompts.txt")) == ["one", "two"]
