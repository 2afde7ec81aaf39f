import collections
import errno
import io
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizer_files import TEXTS

from gptjax.checkpoints import manifest
from gptjax.errors import Refused
from gptjax.tokenizers import tokenizer
from gptjax.tokenizers.tokenizer import TokenizerConfig

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
    "<|fim_prefix|><|fim_middle|><|fim_suffix|><|reserved_0|><|reserved_1|>",
    "1234567890",
    "\u4e2d\u6587\u0627\u0644",
    "x" * 10_000,
]


FIM = "<|fim_prefix|>,<|fim_middle|>,<|fim_suffix|>"
CONFIGS = {
    "byte": TokenizerConfig(kind="byte"),
    "byte with special tokens": TokenizerConfig(kind="byte", special_tokens=FIM),
    "bpe": TokenizerConfig(vocab_size=340),
    "bpe with special tokens": TokenizerConfig(vocab_size=340, special_tokens=FIM, num_reserved=2, split_digits=False),
    "unigram": TokenizerConfig(vocab_size=298, model="unigram", special_tokens=FIM),
}


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request, tmp_path_factory):
    return tokenizer.train(CONFIGS[request.param], TEXTS, tmp_path_factory.mktemp("tokenizer"))


def random_texts(count):
    rng = random.Random(0)
    alphabet = "ab  \t\n\r\0\u2581é\U0001f600中0<>/s"
    return ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(count)]


def test_every_text_comes_back_and_its_bytes_are_counted(trained):
    for text in NASTY + TEXTS[:5] + random_texts(500):
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.token_bytes[ids].sum() == len(text.encode())
        assert not np.isin(ids, list(trained.special.values())).any()
        assert ids.dtype == np.int32 and ids.ndim == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.lists(st.text(max_size=8) | st.sampled_from(NASTY[:-1]), max_size=5).map("".join))
def test_any_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.token_bytes[ids].sum() == len(text.encode())
    assert not np.isin(ids, list(trained.special.values())).any()


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
    for encode in (trained.encode, lambda text: trained.encode_batch([text])):
        with pytest.raises(Refused, match=r"U\+D800 at character 2 of 3"):
            encode("ab\ud800")


def test_sentencepiece_has_the_size_asked_for_and_pieces_of_spaces(tmp_path):
    trained = tokenizer.train(TokenizerConfig(vocab_size=340), TEXTS, tmp_path)
    assert trained.vocab_size == 340
    assert len(trained.encode("    ")) == 1


def test_what_opens_a_text(trained, tmp_path):
    """End-of-text, but for a model that was trained elsewhere and has a token for it, as Llama 2's."""
    assert trained.begin == trained.end_of_text and not trained.opening
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=400, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, byte_fallback=True, allow_whitespace_only_pieces=True,
        minloglevel=3, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(file.getvalue())
    theirs = tokenizer.existing(str(tmp_path / "tokenizer.model"))
    assert (theirs.begin, theirs.opening, theirs.end_of_text) == (1, [1], 2)


def test_digits_are_pieces_of_their_own(tmp_path):
    trained = tokenizer.train(TokenizerConfig(vocab_size=300), ["in 2025, from 2025 to 2025\n" * 500, *TEXTS], tmp_path)
    assert len(trained.encode("2025")) >= 4
    whole = TokenizerConfig(vocab_size=300, split_digits=False)
    trained = tokenizer.train(whole, ["in 2025, from 2025 to 2025\n" * 500, *TEXTS], tmp_path)
    assert len(trained.encode("2025")) < 4


def test_special_and_reserved_tokens_have_ids_by_name(tmp_path):
    names = FIM.split(",")
    made = {name: tokenizer.train(config, TEXTS, tmp_path / name) for name, config in CONFIGS.items()}
    end = {"<|end_of_text|>": 256}
    assert (made["byte"].special, made["byte"].vocab_size) == (end, 257)
    special = made["byte with special tokens"]
    assert special.special == end | {name: 257 + i for i, name in enumerate(names)} and special.vocab_size == 260
    ours = made["bpe with special tokens"]
    reserved = ["<|reserved_0|>", "<|reserved_1|>"]
    assert list(ours.special.items()) == list(
        zip(["<|end_of_text|>", *names, *reserved], [0, 2, 3, 4, 5, 6], strict=True)
    )
    assert ours.vocab_size == len(ours.token_bytes) == 340
    for one in made.values():
        assert one.special["<|end_of_text|>"] == one.end_of_text


def test_a_name_given_later_takes_a_reserved_id_or_a_new_one(tmp_path):
    config = CONFIGS["bpe with special tokens"]
    made = tokenizer.train(config, TEXTS, tmp_path / "made")
    later = TokenizerConfig(path=str(tmp_path / "made"), special_tokens="<a>,<|fim_middle|>,<b>,<c>")
    used = tokenizer.train(later, [], tmp_path / "used")
    assert used.special == {key: made.special[key] for key in ["<|end_of_text|>", *FIM.split(",")]} | {
        "<a>": 5, "<b>": 6, "<c>": 340,
    }  # fmt: skip
    assert used.vocab_size == len(used.token_bytes) == tokenizer.expected_vocab_size(later) == 341
    assert used.decode([5, *used.encode("x"), 340]) == "x" and used.hash != made.hash
    assert tokenizer.load(tmp_path / "used").special == used.special


@pytest.mark.parametrize("names, words", [
    ("<a>,,<b>", 'special_tokens="<a>,,<b>" has an empty name'),
    ("<a>, <a>", 'special_tokens="<a>, <a>" has "<a>" 2 times'),
])  # fmt: skip
def test_names_that_are_none_are_refused(names, words):
    with pytest.raises(Refused) as refusal:
        tokenizer.check(TokenizerConfig(special_tokens=names))
    assert words in str(refusal.value)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_drawn_encodings_are_exact_and_depend_on_the_seed_alone(tmp_path, model):
    ours = tokenizer.train(TokenizerConfig(vocab_size=296, model=model), TEXTS, tmp_path)
    text = "".join(TEXTS[:20]) + "\u2581é\u4e2d" + TEXTS[0]

    def draw(seed):
        return ours.encode_sampled(text, seed, 0.2)

    alone = [draw(seed) for seed in range(24)]
    with ThreadPoolExecutor(1) as other:
        np.testing.assert_array_equal(other.submit(draw, 7).result(), alone[7])
    for ids in alone:
        assert ours.decode(ids) == text and ours.token_bytes[ids].sum() == len(text.encode())
    assert len({tuple(ids) for ids in alone}) == 24
    np.testing.assert_array_equal(draw((1 << 32) - 1), draw((1 << 32) - 1))


@pytest.mark.parametrize("model, alpha", [("bpe", 0.3), ("unigram", 0.3)])
def test_encodings_are_drawn_as_sentencepiece_draws_them(tmp_path, model, alpha):
    """Frequencies of the encodings of a word by both: two samples of 4,000 differ by chance in some 4 % of draws."""
    ours = tokenizer.train(TokenizerConfig(vocab_size=296, model=model), TEXTS, tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(next(tmp_path.glob("*.model"))))
    text, count = TEXTS[0][:12], 4000

    def frequencies(draw):
        return collections.Counter(tuple(draw(index)) for index in range(count))

    def distance(one, other):
        return sum(abs(one[ids] - other[ids]) for ids in one | other) / count

    def drawn(_):
        return theirs.encode(text, enable_sampling=True, alpha=alpha, nbest_size=-1)

    theirs_found = frequencies(drawn)
    found = frequencies(lambda seed: ours.encode_sampled(text, seed, alpha).tolist())
    assert len(found) > 3 and distance(found, theirs_found) < 0.1


def test_bytes_have_one_encoding(tmp_path):
    with pytest.raises(Refused, match="kind=byte has one encoding"):
        tokenizer.train(TokenizerConfig(kind="byte"), [], tmp_path).encode_sampled("a", 0, 0.1)


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
    for path in (tmp_path / "made", tmp_path / "made" / "sentencepiece.model"):
        config = TokenizerConfig(path=str(path))
        used = tokenizer.train(config, iter(["never read"]), tmp_path / "used")
        assert used.hash == made.hash and used.vocab_size == tokenizer.expected_vocab_size(config) == 340
    (tmp_path / "made" / "tokenizer.json").unlink()
    assert tokenizer.existing(str(tmp_path / "made")).vocab_size == 340


def test_what_is_asked_for_again_is_not_parsed_again(tmp_path):
    made = tokenizer.train(TokenizerConfig(kind="byte"), [], tmp_path)
    assert tokenizer.load(tmp_path) is made
    other = tokenizer.train(TokenizerConfig(kind="byte", special_tokens="<a>"), [], tmp_path)
    assert tokenizer.load(tmp_path) is other and other.vocab_size == made.vocab_size + 1


def test_refusals_of_vocabulary_sizes(tmp_path):
    with pytest.raises(Refused, match=r"vocab_size is 8192, but this corpus has pieces for at most \d+: set"):
        tokenizer.train(TokenizerConfig(vocab_size=8192), TEXTS, tmp_path)
    with pytest.raises(Refused, match=r"vocab_size is 100, but the bytes and characters .* take \d+: set"):
        tokenizer.train(TokenizerConfig(vocab_size=100), TEXTS, tmp_path)
    with pytest.raises(Refused, match="vocab_size is 0"):
        tokenizer.train(TokenizerConfig(vocab_size=0), TEXTS, tmp_path)


@pytest.mark.parametrize("failure", [Refused("x is damaged"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_reading_the_texts_raises_comes_out_as_itself(tmp_path, failure):
    def texts():
        yield from TEXTS
        raise failure

    with pytest.raises(type(failure)) as raised:
        tokenizer.train(TokenizerConfig(vocab_size=300), texts(), tmp_path / "tokenizer")
    assert raised.value is failure and not (tmp_path / "tokenizer").exists()


def test_refusals_of_kinds_and_paths(tmp_path):
    with pytest.raises(Refused, match='tokenizer.kind="sentencepeice".* Did you mean "sentencepiece"'):
        tokenizer.check(TokenizerConfig(kind="sentencepeice"))
    with pytest.raises(Refused, match='tokenizer.model="bep".* Did you mean "bpe"'):
        tokenizer.check(TokenizerConfig(model="bep"))
    with pytest.raises(Refused, match="num_reserved=-1 must not be negative"):
        tokenizer.check(TokenizerConfig(num_reserved=-1))
    with pytest.raises(Refused, match="kind=huggingface needs tokenizer.path"):
        tokenizer.check(TokenizerConfig(kind="huggingface"))
    tokenizer.train(TokenizerConfig(kind="byte"), [], tmp_path / "bytes")
    with pytest.raises(Refused, match="bytes is of kind byte, and tokenizer.kind is sentencepiece"):
        tokenizer.check(TokenizerConfig(path=str(tmp_path / "bytes")))
    with pytest.raises(Refused, match="kind=byte takes no path"):
        tokenizer.check(TokenizerConfig(kind="byte", path="x.model"))
    with pytest.raises(Refused, match="x.model does not exist"):
        tokenizer.check(TokenizerConfig(path=str(tmp_path / "x.model")))
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(Refused, match="junk.model must be a SentencePiece model"):
        tokenizer.check(TokenizerConfig(path=str(tmp_path / "junk.model")))
    with pytest.raises(Refused, match="does not exist: prepare the data there first"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("content, words", [
    (b"", "is damaged (Expecting value"),
    (b"3", "is damaged (3 is not an object)"),
    (b"{}", "is damaged (its kind is None)"),
    (b'{"kind": "byte", "special_tokens": [1]}', "is damaged (its special_tokens are [1])"),
    (b'{"kind": ["byte"]}', "is damaged (its kind is ['byte'])"),
    (b'{"kind": "byte", "ends": [257]}', "is damaged (its ends are [257])"),
    (b'{"kind": "byte", "ends": 3}', "is damaged (ends is 3, not of type list)"),
    (b"[" * 100_000, "is damaged ("),
    (b"\xff", "is damaged ('utf-8' codec"),
    (b" " * (41 << 20), "must have at most 41943040 bytes, and has more"),
])  # fmt: skip
def test_a_damaged_description_is_refused(tmp_path, content, words):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(Refused) as refusal:
        tokenizer.load(tmp_path)
    assert f"{tmp_path}/tokenizer.json {words}" in str(refusal.value)


def test_the_largest_tokenizer_has_room_in_a_manifest():
    assert tokenizer.MAX_BYTES * 4 / 3 < 0.9 * manifest.MAX_BYTES


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"changes text \(by a table of \d+ bytes\)"),  # NFKC; SentencePiece itself never sees it
        ({"byte_fallback": False}, "changes text"),
        ({"normalization_rule_tsv": "a_to_b.tsv"}, "changes text"),  # by a table, and keeps its length
        ({"add_dummy_prefix": True}, "changes text"),
        ({"eos_id": -1}, "no special token for the end of a text .* add one by tokenizer.special_tokens="),
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
