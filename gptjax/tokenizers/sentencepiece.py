"""SentencePiece: models trained on the corpus to be exact, or given models, refused if they change text."""

import functools
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import sentencepiece

from gptjax.errors import Refused
from gptjax.runtime import untrusted
from gptjax.tokenizers import exact, segmentation
from gptjax.tokenizers.exact import SPACE_SIGN

# Training silently drops longer sentences; `_sentences` cuts them instead.
MAX_SENTENCE_BYTES = 4096
MODELS = "bpe", "unigram"
REMEDY = (
    "train it with normalization_rule_name=identity, add_dummy_prefix=false, remove_extra_whitespaces=false and "
    "byte_fallback=true"
)
# Fields of a model's protobuf message: its normalizers, and in them the table that SentencePiece trusts unchecked.
NORMALIZERS, CHARSMAP = (3, 5), 2


class SentencePieceTokenizer:
    """A SentencePiece model that reproduces every text; `tokenizer.py` lists the members of each kind."""

    def __init__(self, model: bytes, hash: str, names: Iterable[str] = (), where: str = ""):
        self._pieces = pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.hash = hash
        size = pieces.vocab_size()
        control = {pieces.id_to_piece(i): i for i in range(size) if pieces.is_control(i)}
        self.special, self.vocab_size = exact.special_ids(control, names, size)
        self.end_of_text = pieces.eos_id() if pieces.eos_id() >= 0 else exact.end_of_text(self.special, where)
        self.ends: tuple[int, ...] = (self.end_of_text,)
        self.prefix = ""
        self.opening = [pieces.bos_id()] if pieces.bos_id() >= 0 else []  # set in Llama 2's; unset in ours
        self.begin = [*self.opening, self.end_of_text][0]
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for i in range(size):
            if pieces.is_byte(i):
                self.token_bytes[i] = 1
            elif not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i)):
                self.token_bytes[i] = len(pieces.id_to_piece(i).replace(SPACE_SIGN, " ").encode())
        sign = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]
        self._space_sign = np.array(sign, np.int32)

    def encode(self, text: str) -> np.ndarray:
        exact.utf8(text)
        return self._encode(text)

    def encode_batch(self, texts: list[str], threads: int = -1) -> list[np.ndarray]:
        plain = []
        for text in texts:
            exact.utf8(text)
            if SPACE_SIGN not in text:
                plain.append(text)
        encoded = self._pieces.encode(plain, num_threads=threads, return_type="numpy")
        if len(plain) == len(texts):
            return encoded
        encoded = iter(encoded)
        return [self._encode(text) if SPACE_SIGN in text else next(encoded) for text in texts]

    def encode_sampled(self, text: str, seed: int, alpha: float) -> np.ndarray:
        """Draws an exact encoding of a text, determined by `seed`.

        alpha: for BPE the share of merges left out (Provilkov et al. 2020); for unigram the exponent of a
        segmentation's probability, so that 0 draws evenly (Kudo 2018).
        """
        exact.utf8(text)
        return np.array(self._segmentation.draw(text, alpha, seed), np.int32)

    @functools.cached_property
    def _segmentation(self) -> segmentation.Merges | segmentation.Lattice:
        return segmentation.of_model(self._pieces.serialized_model_proto())

    def _encode(self, text: str) -> np.ndarray:
        if SPACE_SIGN not in text:
            return self._pieces.encode(text, return_type="numpy")
        # The sign's three bytes decode to the sign; its piece would decode to a space.
        parts = [self._pieces.encode(part, return_type="numpy") for part in text.split(SPACE_SIGN)]
        signs = [self._space_sign] * len(parts)
        return np.concatenate([ids for pair in zip(signs, parts, strict=True) for ids in pair][1:])

    def decode(self, ids: Iterable[int]) -> str:
        return self._pieces.decode([int(i) for i in ids if self.token_bytes[i]])


def lossless(model: bytes, hash: str, names: Iterable[str], path: str) -> SentencePieceTokenizer:
    """The tokenizer of a model file. Raises: Refused, for another format, or if the model changes text."""
    try:
        if table := _normalization_table(model):
            raise Refused(f"{path} changes text (by a table of {len(table)} bytes): {REMEDY}.")
        tokenizer = SentencePieceTokenizer(model, hash, names, path)
        exact.probe(tokenizer, exact.PROBE, path, REMEDY)
    except (IndexError, RuntimeError, ValueError, OSError) as error:
        raise Refused(f"{path} must be a SentencePiece model: give a .model file that SentencePiece wrote.") from error
    return tokenizer


def _normalization_table(model: bytes) -> bytes:
    """The table of a model's normalizers. Raises: ValueError, if `model` can't be parsed as protobuf."""
    specs = [content for number, content in untrusted.protobuf_fields(model) if number in NORMALIZERS]
    fields = [field for spec in specs for field in untrusted.protobuf_fields(spec)]
    return b"".join(content for number, content in fields if number == CHARSMAP)


def train(
    texts: Iterable[str], *, vocab_size: int, model: str, split_digits: bool, control_symbols: list[str]
) -> bytes:
    """Trains a model that reproduces every text and has vocab_size ids; returns its file.

    Raises: Refused; and whatever reading `texts` raises.
    """
    file, failures = io.BytesIO(), []
    # Set only if there are some, since a model file records its options, which enter its hash.
    options: dict[str, Any] = {"control_symbols": control_symbols} if control_symbols else {}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, failures),
            model_writer=file,
            model_type=model,
            vocab_size=vocab_size,
            # Exact text: no normalization, no added or removed spaces, bytes for rare characters.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            split_digits=split_digits,
            # SentencePiece insists on an unknown id; with byte fallback no text reaches it.
            eos_id=0,
            eos_piece=exact.END_OF_TEXT,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=2,
            minloglevel=3,
            **options,
        )
    except (RuntimeError, ValueError) as error:
        if failures:
            raise failures[0] from None
        raise _refusal(vocab_size, error) from error
    return file.getvalue()


def _refusal(vocab_size: int, error: Exception) -> Refused:
    size = f"tokenizer.vocab_size is {vocab_size}"
    if most := re.search(r"set it to a value <= (\d+)", str(error)):
        return Refused(f"{size}, but this corpus has pieces for at most {most[1]}: set it to that or less.")
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return Refused(f"{size}, but the bytes and characters of this corpus alone take {least[1]}: set it higher.")
    return Refused(f"{size}, and SentencePiece can't train on this corpus: {error}".replace("\n", " "))


def _sentences(texts: Iterable[str], failures: list) -> Iterator[str]:
    """Yields lines, cut to the length that training accepts (a character has at most 4 bytes).

    Exceptions of reading are added to `failures`, since SentencePiece turns them into a RuntimeError.
    """
    size = MAX_SENTENCE_BYTES // 4
    try:
        for text in texts:
            for line in text.replace("\0", "\n").splitlines():
                yield from (line[i : i + size] for i in range(0, len(line), size))
    except (Exception, KeyboardInterrupt) as failure:
        failures.append(failure)
        raise
