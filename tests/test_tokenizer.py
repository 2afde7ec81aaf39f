import io
import random

import numpy as np
import pytest
import sentencepiece

from gptjax import tokenizer
from gptjax.errors import Refused
from gptjax.tokenizer import TokenizerConfig

TEXTS = [f"def f{i}(x):\n    return x + {i}  # the quick brown fox, étude {i}\n" for i in range(200)]
NASTY = [
    "",
    " ",
    "   leading, trailing   ",
    "a\r\nb\r\tc\n\n\n",
    "\0",
    "a\0b",
    "\u2581",
    " \u2581\u2581 a\u2581b ",
    "\U0001f600\U0001f1e9\U0001f1ea e\u0301 \u00e9",
    "\ufeffbom \u2028\u2029\x85\x0b\x0c",
    "\ufb01 \uff21 \u2126",
    "</s><unk><0x41><|end_of_text|>",
    "1234567890",
    "\u4e2d\u6587\u0627\u0644",
    "x" * 10_000,
]


@pytest.fixture(scope="module", params=["byte", "sentencepiece"])
def trained(request, tmp_path_factory):
    config = TokenizerConfig(kind=request.param, vocab_size=340)
    return tokenizer.train(config, TEXTS, tmp_path_factory.mktemp(request.param))


def random_texts(count):
    rng = random.Random(0)
    alphabet = "ab  \t\n\r\0\u2581é\U0001f600中0<>/s"
    return ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(count)]


def test_every_text_comes_back_and_its_bytes_are_counted(trained):
    for text in NASTY + TEXTS[:5] + random_texts(500):
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.token_bytes[ids].sum() == len(text.encode())
        assert trained.end_of_text not in ids
        assert ids.dtype == np.int32 and ids.ndim == 1


def test_a_batch_is_each_text_encoded(trained):
    texts = NASTY + random_texts(50)
    for ids, text in zip(trained.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, trained.encode(text))


def test_special_ids_have_no_bytes_and_no_text(trained):
    assert trained.token_bytes.shape == (trained.vocab_size,)
    assert trained.token_bytes[trained.end_of_text] == 0
    a, b = trained.encode("a"), trained.encode("b")
    for special in np.flatnonzero(trained.token_bytes == 0):
        assert trained.decode([special, *a, special, *b]) == "ab"


def test_bytes_that_are_not_utf8_decode_to_replacements(trained):
    assert "\ufffd" in trained.decode(trained.encode("\u4e2d")[:1])


def test_half_a_surrogate_pair_is_refused(trained):
    with pytest.raises(Refused, match=r"U\+D800 at character 2 of 3"):
        trained.encode("ab\ud800")


def test_sentencepiece_has_the_size_asked_for_and_pieces_of_spaces(tmp_path):
    trained = tokenizer.train(TokenizerConfig(vocab_size=340), TEXTS, tmp_path)
    assert trained.vocab_size == 340
    assert len(trained.encode("    ")) == 1


def test_digits_are_pieces_of_their_own(tmp_path):
    trained = tokenizer.train(TokenizerConfig(vocab_size=300), ["in 2025, from 2025 to 2025\n" * 500, *TEXTS], tmp_path)
    assert len(trained.encode("2025")) >= 4


def test_loading_gives_the_same_tokenizer_and_hash(tmp_path):
    config = TokenizerConfig(vocab_size=340)
    first = tokenizer.train(config, TEXTS, tmp_path / "first")
    again = tokenizer.train(config, TEXTS, tmp_path / "again")
    other = tokenizer.train(TokenizerConfig(vocab_size=320), TEXTS, tmp_path / "other")
    assert first.hash == again.hash == tokenizer.load(tmp_path / "first").hash != other.hash
    np.testing.assert_array_equal(first.encode(TEXTS[0]), tokenizer.load(tmp_path / "first").encode(TEXTS[0]))


def test_byte_has_257_ids_whatever_is_asked_for(tmp_path):
    trained = tokenizer.train(TokenizerConfig(kind="byte", vocab_size=9999), [], tmp_path)
    assert (trained.vocab_size, trained.end_of_text) == (257, 256)


def test_long_lines_are_trained_on_and_not_dropped(tmp_path):
    # Each word fills more than the longest sentence; a corpus of one line, no part of which may be left out.
    texts = ["zyzzyva " * 1000 + "quuxity " * 1000 + "brown " * 1000]
    trained = tokenizer.train(TokenizerConfig(vocab_size=300), texts, tmp_path)
    assert [len(trained.encode(word)) for word in ("zyzzyva", "quuxity", "brown")] == [1, 1, 1]


def test_an_existing_model_is_used(tmp_path):
    made = tokenizer.train(TokenizerConfig(vocab_size=340), TEXTS, tmp_path / "made")
    path = str(tmp_path / "made" / "sentencepiece.model")
    used = tokenizer.train(TokenizerConfig(path=path), iter(["never read"]), tmp_path / "used")
    assert used.hash == made.hash and used.vocab_size == 340


def test_refusals_of_vocabulary_sizes(tmp_path):
    with pytest.raises(Refused, match=r"vocab_size is 8192, but this corpus has pieces for at most \d+: set"):
        tokenizer.train(TokenizerConfig(vocab_size=8192), TEXTS, tmp_path)
    with pytest.raises(Refused, match=r"vocab_size is 100, but the bytes and characters .* take \d+: set"):
        tokenizer.train(TokenizerConfig(vocab_size=100), TEXTS, tmp_path)
    with pytest.raises(Refused, match="vocab_size is 0"):
        tokenizer.train(TokenizerConfig(vocab_size=0), TEXTS, tmp_path)


def test_refusals_of_kinds_and_paths(tmp_path):
    with pytest.raises(Refused, match='tokenizer.kind is "sentencepeice".* Did you mean "sentencepiece"'):
        tokenizer.check(TokenizerConfig(kind="sentencepeice"))
    with pytest.raises(Refused, match="kind=byte takes no path"):
        tokenizer.check(TokenizerConfig(kind="byte", path="x.model"))
    with pytest.raises(Refused, match="x.model does not exist"):
        tokenizer.check(TokenizerConfig(path=str(tmp_path / "x.model")))
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(Refused, match="junk.model is not a SentencePiece model"):
        tokenizer.check(TokenizerConfig(path=str(tmp_path / "junk.model")))
    with pytest.raises(Refused, match="there is no tokenizer"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "changes text"),  # NFKC, a dummy prefix, trimmed spaces
        ({"byte_fallback": False}, "changes text"),
        ({"normalization_rule_tsv": "a_to_b.tsv"}, "changes text"),  # and keeps its length
        ({"add_dummy_prefix": True}, "changes text"),
        ({"eos_id": -1}, "no </s> piece"),
    ],
)
def test_a_model_that_changes_text_is_refused(tmp_path, options, message):
    lossless = dict(
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, byte_fallback=True
    )
    if "normalization_rule_tsv" in options:
        (tmp_path / "a_to_b.tsv").write_text("61\t62\n")
        options = {"normalization_rule_name": "user_defined", "normalization_rule_tsv": str(tmp_path / "a_to_b.tsv")}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        minloglevel=3,
        **(lossless | options if options else {}),
    )
    (tmp_path / "some.model").write_bytes(model.getvalue())
    with pytest.raises(Refused, match=message):
        tokenizer.check(TokenizerConfig(path=str(tmp_path / "some.model")))
