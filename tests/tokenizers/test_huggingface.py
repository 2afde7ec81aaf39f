"""tokenizer.json files of each family, made by the library that reads them."""

import json
import sys

import numpy as np
import pytest
import tokenizers as library
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tokenizer_files import BYTES, SIGN, TEXTS, byte_level_alphabet, gpt_2, llama_2
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptjax.errors import Refused
from gptjax.tokenizers import tokenizer
from gptjax.tokenizers.tokenizer import TokenizerConfig

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LOOK_ALIKES = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<s>",
    "<unk>",
    "<0x41>",
    "<0xE2>",
    SIGN,
    "   ",
    "<|pad|>",
    "e\u0301",
]


def llama_3():
    """Merges are passed over for whole words; the special tokens are added ones, with a template that adds one."""
    made = library.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=byte_level_alphabet(), show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"])
    made.post_processor = processors.TemplateProcessing(
        "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))]
    )
    return made


def neox():
    """Runs of spaces are added tokens, and ids have a hole below the last one."""
    file = json.loads(gpt_2().to_str())
    added = dict(single_word=False, lstrip=False, rstrip=False, normalized=True, special=False)
    file["added_tokens"] += [added | dict(id=348 + n, content=" " * n) for n in (2, 3, 4)]
    file["added_tokens"].append(file["added_tokens"][0] | dict(id=353, content="<|pad|>"))
    last = max(file["model"]["vocab"], key=file["model"]["vocab"].get)
    file["model"]["vocab"][last] = 511
    return library.Tokenizer.from_str(json.dumps(file))


def unigram():
    """Its model takes any piece that a text has for a piece: those of bytes and the special ones too."""
    trained = library.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"][1:]
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, 0.0) for piece in BYTES)]
    made = library.Tokenizer(models.Unigram(special + [tuple(piece) for piece in pieces], 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


FAMILIES = {made.__name__: made for made in (gpt_2, llama_3, neox, llama_2, unigram)}


def file_of(made, folder, **changes):
    """Its tokenizer.json, with what is not about tokens switched on."""
    made.enable_truncation(3)
    made.enable_padding(length=7)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(made.to_str()) | changes))
    return TokenizerConfig(kind="huggingface", path=str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(ours, the library's own)"""
    folder, made = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]()
    ours = tokenizer.train(file_of(made, folder), iter(["never read"]), folder / "ours")
    made.no_truncation(), made.no_padding()
    return ours, made


def check_exact(ours, text):
    ids = ours.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert ours.decode(ids) == text
    assert ours.token_bytes[ids].sum() == len(text.encode())
    assert not np.isin(ids, list(ours.special.values())).any()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.lists(st.text(max_size=8) | st.sampled_from(LOOK_ALIKES), max_size=6).map("".join))
@example(text="".join(LOOK_ALIKES) * 2)
@example(text="x" * 10_000)
def test_every_text_comes_back_and_its_bytes_are_counted(pair, text):
    check_exact(pair[0], text)


def test_ids_are_those_of_the_library(pair):
    ours, own = pair
    for text in TEXTS[:20]:
        np.testing.assert_array_equal(ours.encode(text), own.encode(text, add_special_tokens=False).ids)


def test_a_batch_is_each_text_encoded(pair):
    texts = [*TEXTS[:20], *LOOK_ALIKES, "", "".join(LOOK_ALIKES)]
    for ids, text in zip(pair[0].encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, pair[0].encode(text))


def test_sizes_and_special_tokens(tmp_path):
    found = {}
    for name, made in FAMILIES.items():
        (tmp_path / name).mkdir()
        ours = tokenizer.train(file_of(made(), tmp_path / name), [], tmp_path / name / "ours")
        found[name] = ours.vocab_size, ours.end_of_text, len(ours.special)
        assert ours.begin == {"llama_3": 350, "llama_2": 1, "unigram": 1}.get(name, ours.end_of_text)
        assert ours.token_bytes.shape == (ours.vocab_size,)
        assert not ours.token_bytes[list(ours.special.values())].any()
    size = llama_2().get_vocab_size()
    assert found["gpt_2"] == (350, 0, 1) and found["llama_3"] == (353, 351, 3) and found["neox"] == (512, 0, 2)
    assert found["llama_2"] == (size, 2, 3) and found["unigram"][1:] == (2, 3)


def test_named_special_tokens_are_found_or_made(tmp_path):
    config = file_of(llama_3(), tmp_path)
    named = TokenizerConfig(kind="huggingface", path=config.path, special_tokens="<|end_of_text|>, <fim>, <other>")
    ours = tokenizer.train(named, [], tmp_path / "ours")
    assert ours.special == {"<|begin_of_text|>": 350, "<|end_of_text|>": 351, "<fim>": 352, "<other>": 353}
    assert ours.vocab_size == 354
    check_exact(ours, "<fim><other><|end_of_text|>")
    assert ours.decode([353, *ours.encode("a"), 352]) == "a"
    again = tokenizer.load(tmp_path / "ours")
    assert (again.special, again.hash) == (ours.special, ours.hash)
    assert tokenizer.train(config, [], tmp_path / "without").hash != ours.hash


def test_a_name_that_a_config_adds_opens_no_text(tmp_path):
    """Its embedding has learned nothing; and a run that has such names goes on with what it began with."""
    path = file_of(gpt_2(), tmp_path).path
    ours = tokenizer.train(TokenizerConfig("huggingface", path=path, special_tokens="<s>, </x>"), [], tmp_path / "ours")
    assert "<s>" in ours.special and ours.begin == ours.end_of_text


@pytest.mark.parametrize("id", [65, 5000])
def test_a_template_of_what_is_no_special_token_is_refused(tmp_path, id):
    opening = {"id": "A", "ids": [id], "tokens": ["A"]}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "A", "type_id": 0}}], "pair": []}
    file = json.loads(gpt_2().to_str()) | {"post_processor": template | {"special_tokens": {"A": opening}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(Refused, match=f"puts {id} before a text, which must be special"):
        tokenizer.check(TokenizerConfig(kind="huggingface", path=str(tmp_path)))


def test_a_folder_may_be_given(tmp_path):
    config = file_of(gpt_2(), tmp_path)
    made = tokenizer.train(config, [], tmp_path / "made")
    for folder in (tmp_path, tmp_path / "made"):
        config = TokenizerConfig(kind="huggingface", path=str(folder))
        assert tokenizer.train(config, [], tmp_path / "again").hash == made.hash


def test_dropout_in_the_file_is_off(tmp_path):
    config = file_of(gpt_2(), tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    ours = tokenizer.train(config, [], tmp_path / "ours")
    assert len({tuple(ours.encode(TEXTS[0])) for _ in range(20)}) == 1


def word_piece():
    made = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return made


def changed(make, **attributes):
    def made():
        changed = make()
        for name, value in attributes.items():
            setattr(changed, name, value)
        return changed

    return made


def without_bytes():
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False))
    return made


def without_end():
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=byte_level_alphabet(), show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


@pytest.mark.parametrize("make, words", [
    (word_piece, "by its normalizer 'BertNormalizer'"),
    (changed(word_piece, normalizer=None), "neither byte-level nor has byte_fallback"),
    (lambda: llama_2(prepend=True), "by its normalizer 'Prepend'): take that out"),
    (changed(gpt_2, normalizer=normalizers.NFC()), "by its normalizer 'NFC'"),
    (changed(llama_2, normalizer=normalizers.Replace("q", "z")), "by its normalizer 'Replace'"),
    (changed(gpt_2, pre_tokenizer=pre_tokenizers.ByteLevel()), "set add_prefix_space to false"),
    (changed(unigram, pre_tokenizer=pre_tokenizers.Metaspace()), "set prepend_scheme to never"),
    (changed(gpt_2, pre_tokenizer=pre_tokenizers.Whitespace()), "neither byte-level nor has byte_fallback"),
    (changed(gpt_2, pre_tokenizer=pre_tokenizers.Sequence([
        pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])), "leaves"),
    (without_bytes, "has no tokens for"),
    (without_end, "no special token for the end of a text"),
])  # fmt: skip
def test_a_file_that_changes_text_is_refused(tmp_path, make, words):
    with pytest.raises(Refused) as refusal:
        tokenizer.check(file_of(make(), tmp_path))
    assert words in str(refusal.value) and str(tmp_path / "tokenizer.json") in str(refusal.value)


def test_text_that_a_file_drops_is_refused_when_it_comes(tmp_path):
    """What no probe can foresee."""
    drop = pre_tokenizers.Split("rare word", "removed")
    made = changed(
        gpt_2, pre_tokenizer=pre_tokenizers.Sequence([drop, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    )()
    ours = tokenizer.train(file_of(made, tmp_path), [], tmp_path / "ours")
    with pytest.raises(Refused, match=r"changes text \(of 13 bytes it leaves 4\)"):
        ours.encode_batch(["common", "one rare word"[:13]])


@pytest.mark.parametrize("content, words", [
    (b"", "damaged (Expecting value"),
    (b"{}", "must be a tokenizer.json (its model is None)"),
    (b'{"model": {}}', "neither byte-level nor"),
    (b'{"model": {"byte_fallback": true}}', "must be a tokenizer.json ("),
])  # fmt: skip
def test_what_is_no_tokenizer_json_is_refused(tmp_path, content, words):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(Refused) as refusal:
        tokenizer.check(TokenizerConfig(kind="huggingface", path=str(tmp_path / "tokenizer.json")))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "id, words", [(1 << 31, "a largest id of 2147483648, and 4194303 is the most"), (7, "350 tokens and 349 ids")]
)
def test_ids_that_can_not_be_are_refused(tmp_path, id, words):
    file = json.loads(gpt_2().to_str())
    vocab = file["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = id
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(Refused, match=words):
        tokenizer.check(TokenizerConfig(kind="huggingface", path=str(tmp_path)))


def test_a_regex_without_end_is_refused(tmp_path):
    split = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    made = changed(
        gpt_2, pre_tokenizer=pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    )()
    ours = tokenizer.train(file_of(made, tmp_path), [], tmp_path / "ours")
    for encode in (ours.encode, lambda text: ours.encode_batch([text])):
        with pytest.raises(Refused, match=r"huggingface.json can't be used \(.*retry-limit"):
            encode("x" * 30)


def test_a_missing_unknown_token_is_refused(tmp_path):
    file = json.loads(unigram().to_str())
    file["model"]["unk_id"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(Refused, match="unk_id"):
        tokenizer.check(TokenizerConfig(kind="huggingface", path=str(tmp_path)))


def test_no_encoding_is_drawn(pair):
    with pytest.raises(Refused, match="takes no seed"):
        pair[0].encode_sampled("text", 0, 0.1)


def test_it_is_asked_for_where_the_package_is_missing(tmp_path, monkeypatch):
    config = file_of(gpt_2(), tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Refused, match=r"pip install 'gptjax\[data\]'"):
        tokenizer.check(config)
