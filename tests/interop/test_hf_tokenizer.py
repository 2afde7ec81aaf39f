"""Tokenizers converted from Hugging Face's files into ours and back, compared with the libraries' own results."""

import io
import json
import os
import pathlib

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from support.tokenizer_files import TEXTS, gpt_2, llama_2, llama_2_json
from tokenizers import decoders, normalizers, pre_tokenizers

from gptjax.errors import Refused
from gptjax.interop.huggingface import tokenizer as hf_tokenizer
from gptjax.tokenizers import tokenizer
from gptjax.tokenizers.tokenizer import TokenizerConfig

CODE = [*TEXTS, pathlib.Path(os.__file__).read_text(encoding="utf-8")]
TEXT = "def f(x):\n    return  x + 12  # naïve étude, 東京 😀\n"


def trained(folder, **options):
    """Trains a SentencePiece model like Llama 2's, which puts a space before every text."""
    file, options = io.BytesIO(), {"model_type": "bpe", "byte_fallback": True} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=400, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=3, hard_vocab_limit=False, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


def test_a_byte_level_tokenizer_is_carried_as_it_is(tmp_path):
    gpt_2().save(str(tmp_path / "tokenizer.json"))
    taken = hf_tokenizer.read_tokenizer(tmp_path, 400, [])
    assert not taken.note and taken.files["huggingface.json"] == (tmp_path / "tokenizer.json").read_bytes()
    assert taken.tokenizer.vocab_size == 400  # ids that no text has fill the rest of the embedding
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert taken.tokenizer.encode(TEXT).tolist() == theirs.encode(TEXT).ids
    files, ends, note = hf_tokenizer.tokenizer_files(taken.files, taken.tokenizer, 64)
    assert not note and ends == dict.fromkeys(("bos_token_id", "eos_token_id"), taken.tokenizer.end_of_text)
    assert library.Tokenizer.from_buffer(files["tokenizer.json"]).get_vocab() == theirs.get_vocab()


def test_nfc_and_a_leading_space_are_left_out_with_a_note(tmp_path):
    made = gpt_2()
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.save(str(tmp_path / "tokenizer.json"))
    taken = hf_tokenizer.read_tokenizer(tmp_path, 350, [])
    assert taken.note == ("tokenizer.json normalizes text by NFC and puts a space before every text; this is left out.")
    assert taken.tokenizer.encode(" e\u0301").tolist() != made.encode("e\u0301").ids
    assert taken.tokenizer.encode(" " + TEXT).tolist() == made.encode(TEXT).ids
    assert taken.tokenizer.decode(taken.tokenizer.encode("e\u0301")) == "e\u0301"


def test_sentencepiece_without_its_space(tmp_path):
    theirs = trained(tmp_path)
    taken = hf_tokenizer.read_tokenizer(tmp_path, 512, [])
    assert taken.note == "tokenizer.model adds or removes spaces; this step is left out."
    assert taken.tokenizer.encode(" " + TEXT).tolist() == theirs.encode(TEXT)
    assert taken.tokenizer.decode(taken.tokenizer.encode(TEXT)) == TEXT


ODD = ["x", " x", "  two  spaces ", "naïve e\u0301tude", "東京 😀", "\n\tdef f():\n", "a\u2581b", "", "</s> <s>x", TEXT]


def written(folder, files):
    from transformers import AutoTokenizer

    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def mistral_json(folder):
    from transformers import PreTrainedTokenizerFast

    made = llama_2()
    made.normalizer, made.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    last = decoders.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), last])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def normalized_json(folder):
    from transformers import PreTrainedTokenizerFast

    made = gpt_2()
    made.normalizer, made.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=True)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>").save_pretrained(folder)


@pytest.mark.parity
@pytest.mark.parametrize("make", [llama_2_json, mistral_json, normalized_json])
def test_what_goes_out_reads_as_what_came(make, tmp_path):
    """`transformers` encodes and decodes alike before and after; prompts get the same ids here and there."""
    from transformers import AutoTokenizer

    make(tmp_path / "theirs")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    taken = hf_tokenizer.read_tokenizer(tmp_path / "theirs", 512, [])
    files, _, _ = hf_tokenizer.tokenizer_files(taken.files, taken.tokenizer, 64)
    back = written(tmp_path / "back", files)
    for text in ODD:
        ids = theirs(text)["input_ids"]
        assert back(text)["input_ids"] == ids, text
        assert back.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True), text
        if "\u2581" not in text and "\u0301" not in text and "<s>" not in text:
            prompt = tokenizer.encode_prompt(taken.tokenizer, text).tolist()
            assert [*taken.tokenizer.opening, *prompt] == ids, text


@pytest.mark.parity
def test_a_sentencepiece_model_goes_out_with_its_space_and_its_opening(tmp_path):
    """Compares with SentencePiece itself: `transformers` 5 differs on texts that begin with a space."""
    theirs = trained(tmp_path)
    taken = hf_tokenizer.read_tokenizer(tmp_path, 512, [])
    files, ends, _ = hf_tokenizer.tokenizer_files(taken.files, taken.tokenizer, 64)
    back = written(tmp_path / "back", files)
    assert ends == {"bos_token_id": 1, "eos_token_id": 2}
    for text in (text for text in ODD if "\u2581" not in text and "<s>" not in text):
        ids = theirs.encode(text)
        assert back(text)["input_ids"] == [1, *ids] and tokenizer.encode_prompt(taken.tokenizer, text).tolist() == ids
        assert back.decode([1, *ids], skip_special_tokens=True) == theirs.decode(ids) == text


@pytest.mark.parity
@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_our_sentencepiece_goes_out_with_the_same_ids(model, tmp_path):
    from transformers import PreTrainedTokenizerFast

    settings = TokenizerConfig(vocab_size=600, model=model, special_tokens="<|user|>", num_reserved=2)
    ours = tokenizer.train(settings, CODE, tmp_path / "ours")
    files, ends, note = hf_tokenizer.tokenizer_files(tokenizer.read_files(tmp_path / "ours"), ours, 64)
    assert (not note or model == "unigram") and ends["eos_token_id"] == ours.end_of_text
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT).tolist()
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert theirs.convert_tokens_to_ids("<|user|>") == ours.special["<|user|>"]
    back = hf_tokenizer.read_tokenizer(tmp_path, 600, [])
    assert not back.note and np.array_equal(back.tokenizer.encode(TEXT), ours.encode(TEXT))


def test_one_that_would_give_other_ids_is_left_out(tmp_path, monkeypatch):
    ours = tokenizer.train(TokenizerConfig(vocab_size=600), CODE, tmp_path / "ours")
    monkeypatch.setattr(
        hf_tokenizer, "_pieces", lambda content, known: [hf_tokenizer._bytes(tokenizer.ByteTokenizer(""))]
    )
    files, _, note = hf_tokenizer.tokenizer_files(tokenizer.read_files(tmp_path / "ours"), ours, 64)
    assert files == {} and "wrote no tokenizer: a tokenizer.json would give other ids for 9" in note


def test_a_folder_without_a_valid_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(Refused, match="tokenizer.model must be a SentencePiece model"):
        hf_tokenizer.read_tokenizer(tmp_path, 400, [])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece"}}))
    with pytest.raises(Refused, match="tokenizer.json"):
        hf_tokenizer.read_tokenizer(tmp_path, 400, [])
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(Refused, match="has no tokenizer.json and no tokenizer.model"):
        hf_tokenizer.read_tokenizer(tmp_path, 200, [])
    assert hf_tokenizer.read_tokenizer(tmp_path, 300, []).tokenizer.vocab_size == 300


DEEPSEEK = ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]


def published(folder, special, config=None, **changes):
    """A byte-level tokenizer.json without a template, whose first ids are these special tokens."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(made.to_str()) | changes))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("special, config, ends, begin, found", [
    (DEEPSEEK, {"add_bos_token": True}, [1], 0, (0, 1, True)),
    (["<|startoftext|>", "<|endoftext|>"], {"add_bos_token": True}, [1], 0, (0, 1, True)),
    (["<|startoftext|>", "<|endoftext|>"], {}, [1], 0, (0, 1, False)),
    (["<|startoftext|>", "</s>"], {"bos_token": "<|startoftext|>", "add_bos_token": True}, [1], None, (0, 1, True)),
    (["[BOS]", "[EOS]"], {"bos_token": {"content": "[BOS]"}}, [1], None, (0, 1, False)),
    (["[EOS]"], None, [0], None, (0, 0, False)),
    (["<|im_start|>", "<|im_end|>"], None, [1], None, (1, 1, False)),
    (["</s>", "<|im_end|>"], None, [1], None, (1, 1, False)),  # a name that the files do not confirm
    (["<|endoftext|>", "<|im_end|>"], None, [1, 0], 0, (0, 0, False)),
    (["<s>", "</s>"], None, [1], 0, (0, 1, False)),
])  # fmt: skip
def test_the_ids_of_the_files_decide(tmp_path, special, config, ends, begin, found):
    """Ids in config.json and generation_config.json, then tokenizer_config.json; names are the last resort."""
    published(tmp_path, special, config)
    taken = hf_tokenizer.read_tokenizer(tmp_path, 400, ends, begin)
    known = taken.tokenizer
    assert (known.begin, known.end_of_text, bool(known.opening)) == found
    assert tokenizer.from_files(taken.files, "here").begin == known.begin  # as a checkpoint gives them back
    files, ids, _ = hf_tokenizer.tokenizer_files(taken.files, known, 64)
    assert ids["bos_token_id"] == known.begin
    theirs = library.Tokenizer.from_buffer(files["tokenizer.json"])
    assert theirs.encode("a").ids == [*known.opening, *known.encode("a").tolist()]


def test_a_saved_truncation_does_not_go_out(tmp_path):
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padded = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    published(tmp_path, ["<|endoftext|>"], truncation=cut, padding=padded)
    assert len(library.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids) == 8
    taken = hf_tokenizer.read_tokenizer(tmp_path, 400, [])
    files, *_ = hf_tokenizer.tokenizer_files(taken.files, taken.tokenizer, 64)
    for text in (TEXT, "a"):
        assert (
            library.Tokenizer.from_buffer(files["tokenizer.json"]).encode(text).ids
            == taken.tokenizer.encode(text).tolist()
        )
