"""Texts to train tokenizers on, and tokenizers of two families made by the library that reads their files."""

import json

import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [f"def f{i}(x):\n    return x + {i}  # the quick brown fox, étude {i}\n" for i in range(200)]
SIGN = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level_alphabet():
    return pre_tokenizers.ByteLevel.alphabet()


def gpt_2():
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=byte_level_alphabet(), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def llama_2(prepend=False):
    """SentencePiece's BPE with bytes to fall back to; the whole text is one word."""
    trained = library.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", SIGN)
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *BYTES])}
    for token in model["vocab"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    made = library.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SIGN)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SIGN), replace]) if prepend else replace
    made.decoder = decoders.Sequence([decoders.Replace(SIGN, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def llama_2_json(folder):
    """Saves `llama_2` with the space and the opening of its published form, as `transformers` does."""
    from transformers import PreTrainedTokenizerFast  # only the tests marked parity have it

    made = llama_2(prepend=True)
    first, back = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([first, decoders.ByteFallback(), decoders.Fuse(), back])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
