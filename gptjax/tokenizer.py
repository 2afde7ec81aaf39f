"""Text to token ids and back, exactly: bytes, or a SentencePiece model trained on the corpus.

Both kinds give every text back unchanged, and `token_bytes` says how many UTF-8 bytes each id stands for, so that the
sum over a text's tokens is its length in bytes. Bits per byte rests on that.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import sentencepiece
from etils import epath

from gptjax.errors import Refused, nearest

# SentencePiece writes a space as this character, so it has no piece of its own.
SPACE_SIGN = "\u2581"
# Training drops longer sentences without a word; `_sentences` cuts them instead.
MAX_SENTENCE_BYTES = 4096


@dataclass(frozen=True)
class TokenizerConfig:
    """What turns text into tokens.

    kind: `byte` (256 bytes and end-of-text: always 257 ids) or `sentencepiece`.
    vocab_size: how many ids a SentencePiece model is trained to have. A `byte` tokenizer and a model given by `path`
        are not trained and keep the size they have.
    path: an existing SentencePiece .model file, local or gs://, to use in place of training one.
    """

    kind: str = "sentencepiece"
    vocab_size: int = 4096
    path: str = ""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; 256 is end-of-text."""

    vocab_size = 257
    end_of_text = 256
    token_bytes = np.array([1] * 256 + [0], np.int32)

    def __init__(self, hash: str):
        self.hash = hash

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i != self.end_of_text).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model that gives every text back.

    vocab_size: number of ids. end_of_text: the id that opens every document, and so the one that is predicted where
    one ends; no text encodes to it. token_bytes: int32 [vocab_size], UTF-8 bytes an id stands for, 0 for special ones.
    hash: sha256 of the files it was loaded from.
    """

    def __init__(self, model: bytes, hash: str):
        self._pieces = pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.hash = hash
        self.vocab_size = pieces.vocab_size()
        self.end_of_text = pieces.eos_id()
        special = [pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i) for i in range(self.vocab_size)]
        self.token_bytes = np.array(
            [
                0 if special[i] else 1 if pieces.is_byte(i) else len(_surface(pieces.id_to_piece(i)).encode())
                for i in range(self.vocab_size)
            ],
            np.int32,
        )
        self._space_sign = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text: int32 [tokens]. Refuses half a surrogate pair, which has no UTF-8."""
        _utf8(text)
        if SPACE_SIGN not in text:
            return np.array(self._pieces.encode(text), np.int32)
        # As its three bytes, the sign decodes to itself; as a piece it would come back as a space.
        first, *others = text.split(SPACE_SIGN)
        ids = self._pieces.encode(first)
        for part in others:
            ids += self._space_sign + self._pieces.encode(part)
        return np.array(ids, np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        plain = iter(self._pieces.encode([text for text in texts if SPACE_SIGN not in text], num_threads=-1))
        return [self.encode(text) if SPACE_SIGN in text else np.array(next(plain), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Special ones are silent, and bytes that are not UTF-8 come out as U+FFFD."""
        return self._pieces.decode([int(i) for i in ids if self.token_bytes[i]])


Tokenizer = ByteTokenizer | SentencePieceTokenizer


def check(config: TokenizerConfig):
    """Refuses what `train` can't follow, whatever the corpus: an unknown kind, a model that is missing or lossy."""
    kinds = "byte", "sentencepiece"
    if config.kind not in kinds:
        raise Refused(
            f'tokenizer.kind is "{config.kind}", which is none of {", ".join(kinds)}.{nearest(config.kind, kinds)}'
        )
    if config.path and config.kind == "byte":
        raise Refused(f'tokenizer.path is "{config.path}", but tokenizer.kind=byte takes no path: use sentencepiece.')
    if config.path and not epath.Path(config.path).exists():
        raise Refused(f"tokenizer.path {config.path} does not exist: give a SentencePiece .model file, or no path.")
    if config.path:
        _lossless(epath.Path(config.path).read_bytes(), "", config.path)


def train(config: TokenizerConfig, texts: Iterable[str], folder: epath.PathLike) -> Tokenizer:
    """Writes a tokenizer into `folder` (made if it is missing) and loads it.

    `texts` is read only if there is something to train. Refuses what `check` does, and a vocabulary that the texts
    can't fill.
    """
    check(config)
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config.kind == "sentencepiece":
        model = epath.Path(config.path).read_bytes() if config.path else _trained_model(config.vocab_size, texts)
        (folder / "sentencepiece.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(json.dumps({"kind": config.kind}) + "\n")
    return load(folder)


def load(folder: epath.PathLike) -> Tokenizer:
    """The tokenizer that `train` wrote into `folder`; refused if it isn't there."""
    return from_files(read_files(folder), str(folder))


def read_files(folder: epath.PathLike) -> dict[str, bytes]:
    """The files of a tokenizer's folder, which `from_files` takes."""
    folder = epath.Path(folder)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())} if folder.exists() else {}


def from_files(files: dict[str, bytes], where: str) -> Tokenizer:
    """The tokenizer of some files, found at `where`; refused if one is missing."""
    if "tokenizer.json" not in files:
        raise Refused(f"{where}/tokenizer.json does not exist: there is no tokenizer, so prepare the data there first.")
    content = files["tokenizer.json"]
    if json.loads(content)["kind"] == "byte":
        return ByteTokenizer(hashlib.sha256(content).hexdigest())
    if "sentencepiece.model" not in files:
        raise Refused(
            f"{where}/sentencepiece.model does not exist though tokenizer.json asks for it: prepare the data "
            "there again."
        )
    proto = files["sentencepiece.model"]
    return _lossless(proto, hashlib.sha256(content + proto).hexdigest(), f"{where}/sentencepiece.model")


def _trained_model(vocab_size: int, texts: Iterable[str]) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            # What goes in comes out: no normalization, no added or removed spaces, bytes for rare characters.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # SentencePiece insists on an unknown id; with byte fallback no text reaches it.
            eos_id=0,
            eos_piece="<|end_of_text|>",
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=2,
            minloglevel=3,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _refusal(vocab_size, error) from error
    return model.getvalue()


def _refusal(vocab_size: int, error: Exception) -> Refused:
    size = f"tokenizer.vocab_size is {vocab_size}"
    if most := re.search(r"set it to a value <= (\d+)", str(error)):
        return Refused(f"{size}, but this corpus has pieces for at most {most[1]}: set it to that or less.")
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return Refused(f"{size}, but the bytes and characters of this corpus alone take {least[1]}: set it higher.")
    return Refused(f"{size}, and SentencePiece can't train on this corpus: {error}".replace("\n", " "))


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, cut to the length that training accepts (a character has at most 4 bytes)."""
    size = MAX_SENTENCE_BYTES // 4
    for text in texts:
        for line in text.replace("\0", "\n").splitlines():
            yield from (line[i : i + size] for i in range(0, len(line), size))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"The text has U+{ord(text[error.start]):04X} at character {error.start} of {len(text)}, half a surrogate "
            "pair, which UTF-8 can't hold: give text in UTF-8."
        ) from error


def _surface(piece: str) -> str:
    return piece.replace(SPACE_SIGN, " ")


# What normalization, a dummy prefix, trimmed spaces, special pieces or a missing byte would change.
PROBE = f" a  b \t\r\n\n \0 12 \u00e9 e\u0301 \ufb01 \uff21 \u2028\ufeff \U0001f600 </s><unk><0x41>{SPACE_SIGN} "


def _lossless(model: bytes, hash: str, path: str) -> SentencePieceTokenizer:
    """The tokenizer of a model file, refused if the file is none or if the model changes text."""
    try:
        tokenizer = SentencePieceTokenizer(model, hash)
    except (RuntimeError, ValueError, OSError) as error:
        raise Refused(f"{path} is not a SentencePiece model: give a .model file that SentencePiece wrote.") from error
    if tokenizer.end_of_text < 0:
        raise Refused(f"{path} has no </s> piece (eos_id is -1), and every document opens with one: train it again.")
    ids = tokenizer.encode(PROBE)
    bytes_in, bytes_out = len(PROBE.encode()), int(tokenizer.token_bytes[ids].sum())
    if tokenizer.decode(ids) != PROBE or bytes_in != bytes_out:
        raise Refused(
            f"{path} changes text (a probe of {bytes_in} bytes came back as {len(tokenizer.decode(ids).encode())}, "
            f"counted as {bytes_out}): train it with normalization_rule_name=identity, add_dummy_prefix=false, "
            "remove_extra_whitespaces=false and byte_fallback=true."
        )
    return tokenizer
