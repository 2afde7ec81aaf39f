"""Hugging Face's tokenizer.json, read by the `tokenizers` library: byte-level files, and files with byte fallback.

Truncation, padding, templates and dropout of a file are ignored, and the text of a special token is encoded like other
text. A file that changes text is refused: by its structure where possible, by a probe, and finally by counting the
bytes of each text that is encoded.
"""

import array
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.errors import Refused, shown
from gptjax.runtime import optional, untrusted
from gptjax.tokenizers import exact
from gptjax.tokenizers.exact import SPACE_SIGN

MODELS = "BPE", "Unigram"
MAX_VOCAB = 1 << 22
REMEDY = "give a tokenizer.json that Hugging Face's tokenizers wrote"
# The only lossless normalizers: a space as the sign that decoding turns back, and bytes as characters.
SPACE_TO_SIGN = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SIGN}
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# The characters that stand for bytes in a byte-level vocabulary: printable ones stand for themselves, others follow in
# order from U+0100.
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {byte: byte for byte in PRINTED} | dict(enumerate(sorted({*range(256)} - {*PRINTED}), 0x100))


class OwnIds(NamedTuple):
    """The ids that a model's own files give to special tokens, where the tokens' names say nothing or another id."""

    end: int | None = None  # ends a text
    begin: int | None = None  # opens a text
    opens: bool = False  # whether the tokenizer puts `begin` before each text, without a template in tokenizer.json


def own_ids(found: dict, where: str) -> OwnIds:
    """Checks carried ids. Raises: Refused."""
    kinds = {"end": int, "begin": int, "opens": bool}
    if not found.keys() <= kinds.keys():
        raise Refused(f"{where} is damaged (its own_ids are {shown(found)}): {REMEDY}.")
    untrusted.check_types(found, {key: kinds[key] for key in found}, where, REMEDY)
    return OwnIds(**found)


class HuggingFaceTokenizer:
    """A tokenizer.json that reproduces every text; `tokenizer.py` lists the members of each kind."""

    def __init__(self, content: bytes, hash: str, names: Iterable[str], path: str, own: OwnIds = OwnIds()):
        """Raises: Refused, for a file of another format, or with a structure that changes text."""
        file = untrusted.json_object(content, path, REMEDY)
        self.opening = opening(file, path)
        file = _switched_off(file, path)
        byte_level, signs = _spelling(file, path)
        self.hash, self._path = hash, path
        self._tokenizer = _loaded(file, path)
        self._tokenizer.encode_special_tokens = True  # their text is encoded like other text
        self._added = self._tokenizer.get_added_tokens_decoder()
        pieces = self._tokenizer.get_vocab(with_added_tokens=True)
        known = {token.content: i for i, token in self._added.items() if token.special}
        self.special, self.vocab_size = exact.special_ids(known, names, _size(pieces, path))
        if strange := [i for i in (own.end, own.begin) if i not in (None, *self.special.values())]:
            raise Refused(f"{path} has no special token with the id {strange[0]}, which config.json names: {REMEDY}.")
        self.end_of_text = exact.end_of_text(self.special, path) if own.end is None else own.end
        if own.opens and own.begin is not None:
            self.opening = self.opening or [own.begin]
        if strange := [i for i in self.opening if i not in self.special.values()]:
            raise Refused(
                f"{path} has a post_processor that puts {strange[0]} before a text, which must be special: {REMEDY}."
            )
        self.ends: tuple[int, ...] = (self.end_of_text,)
        self.prefix = ""
        begins = [known[name] for name in exact.BEGINS if name in known]  # excludes names from a config
        self.begin = [*self.opening, *begins, self.end_of_text][0] if own.begin is None else own.begin
        self._bytes = [b""] * self.vocab_size
        for piece, i in pieces.items():
            if i not in self._added:
                self._bytes[i] = _byte_level(piece) if byte_level else _fallen_back(piece, signs)
            elif not self._added[i].special:
                self._bytes[i] = piece.encode()
        missing = 256 - len({self._bytes[i] for i in pieces.values()} & {bytes([byte]) for byte in range(256)})
        if missing:
            raise Refused(
                f"{path} has no tokens for {missing} of the 256 bytes, and so none for rare characters: train it with "
                "initial_alphabet=ByteLevel.alphabet()."
            )
        self.token_bytes = np.array([len(content) for content in self._bytes], np.int32)
        self._space_sign = [pieces.get(f"<0x{byte:02X}>", 0) for byte in SPACE_SIGN.encode()] if signs else None

    def encode(self, text: str) -> np.ndarray:
        """Raises: Refused, if the ids would not reproduce the text."""
        size = len(exact.utf8(text))
        return self._counted(self._ids(text), text, size)

    def encode_batch(self, texts: list[str], threads: int = -1) -> list[np.ndarray]:
        if threads == 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # for the rest of this process, which is a worker
        sizes = [len(exact.utf8(text)) for text in texts]
        encoded = zip(self._all_ids(texts), texts, sizes, strict=True)
        return [self._counted(ids, text, size) for ids, text, size in encoded]

    def encode_sampled(self, text: str, seed: int, alpha: float) -> np.ndarray:
        raise Refused(
            "tokenizer.kind=huggingface draws encodings by a generator that takes no seed, so they can't be drawn "
            "again: use sentencepiece."
        )

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")

    def _ids(self, text: str) -> np.ndarray:
        return next(self._all_ids([text]))

    def _all_ids(self, texts: list[str]) -> Iterator[np.ndarray]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:  # a panic of Rust, for example a regex that takes too long
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise Refused(
                    f"{self._path} can't be used ({' '.join(str(error).split())[:200]}): {REMEDY}."
                ) from error
            raise
        # Takes half the time of NumPy with a list.
        return (np.frombuffer(array.array("i", encoding.ids), np.int32) for encoding in encodings)

    def _counted(self, ids: np.ndarray, text: str, size: int) -> np.ndarray:
        """Returns the ids if they stand for `size` bytes. Otherwise cuts the text where it may be misread and encodes
        the parts. (Special tokens stand for no bytes.)"""
        if self.token_bytes[ids].sum() == size:
            return ids
        ids = np.concatenate(list(self._cut(text)))
        if (counted := self.token_bytes[ids].sum()) != size:
            raise Refused(f"{self._path} changes text (of {size} bytes it leaves {counted}): use another tokenizer.")
        return ids

    def _cut(self, text: str) -> Iterator[np.ndarray]:
        """Yields ids of parts. Cuts within anything that looks like a special token or a byte's piece, which a Unigram
        model would match. Writes the space sign as its bytes, since its piece would decode to a space."""
        names = [re.escape(name) for name in self.special if name in text]
        looks_like = re.compile("|".join(f"(?={name})" for name in (*names, BYTE_PIECE.pattern)))
        for number, part in enumerate(text.split(SPACE_SIGN) if self._space_sign else [text]):
            if number:
                yield np.array(self._space_sign, np.int32)
            cuts = [0, *(match.start() + 1 for match in looks_like.finditer(part)), len(part)]
            yield from (self._ids(part[start:stop]) for start, stop in itertools.pairwise(cuts))


def lossless(
    content: bytes, hash: str, names: Iterable[str], path: str, own: OwnIds = OwnIds()
) -> HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json. Raises: Refused, for another format, or if the tokenizer changes text."""
    tokenizer = HuggingFaceTokenizer(content, hash, names, path, own)
    added = "".join(f"{token.content} {token.content}a" for token in tokenizer._added.values())
    for text in (exact.PROBE, f"Aa{exact.PROBE}{added}"):
        exact.probe(tokenizer, text, path, REMEDY)
    return tokenizer


def _switched_off(file: dict, path: str) -> dict:
    """A tokenizer.json with only the parts that a text's own tokens need. Raises: Refused, if parts are missing."""
    if type(file.get("model")) is not dict:
        raise Refused(f"{path} must be a tokenizer.json (its model is {shown(file.get('model'))}): {REMEDY}.")
    off = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    kept = {"normalizer": file.get("normalizer"), "pre_tokenizer": file.get("pre_tokenizer")}
    return file | kept | off | {"model": file["model"] | {"dropout": None}}


def opening(file: dict, path: str) -> list[int]:
    """The ids that a file's template puts before a text. Raises: Refused, for a damaged template."""
    try:
        ids = []
        for part in _parts(file.get("post_processor")):
            if part["type"] == "TemplateProcessing":
                for piece in itertools.takewhile(lambda piece: "SpecialToken" in piece, part["single"]):
                    ids += part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    except (KeyError, TypeError) as error:
        raise Refused(f"{path} has a post_processor without {error}: {REMEDY}.") from error
    if not all(type(i) is int and 0 <= i < MAX_VOCAB for i in ids):
        raise Refused(f"{path} has a post_processor that puts {shown(ids)} before a text: {REMEDY}.")
    return ids


def _spelling(file: dict, path: str) -> tuple[bool, bool]:
    """Whether pieces are spelled in characters that stand for bytes, and otherwise whether a sign stands for a space.

    Raises: Refused, for a part of the file that changes text.
    """

    def changes(what: str, remedy: str) -> Refused:
        return Refused(f"{path} changes text ({what}): {remedy}.")

    normalizers, pre_tokenizers = (list(_parts(file[key])) for key in ("normalizer", "pre_tokenizer"))
    for part in normalizers:
        if part.get("type") not in ("Sequence", "ByteLevel") and part != SPACE_TO_SIGN:
            name = shown(part.get("type"))
            raise changes(
                f"by its normalizer {name}", "take that out of the file, if it was trained without, or use another"
            )
    for part in pre_tokenizers:
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space") is not False:
            raise changes("ByteLevel puts a space before it", "set add_prefix_space to false in the file")
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never":
            raise changes("Metaspace puts a space before it", "set prepend_scheme to never in the file")
    byte_level = any(part.get("type") == "ByteLevel" for part in normalizers + pre_tokenizers)
    if not byte_level and file["model"].get("byte_fallback") is not True:
        raise changes("it is neither byte-level nor has byte_fallback, and loses rare characters", "use one that is")
    signs = SPACE_TO_SIGN in normalizers or any(part.get("type") == "Metaspace" for part in pre_tokenizers)
    return byte_level, signs and not byte_level


def _parts(value) -> Iterator[dict]:
    """Yields the dicts with a type in nested JSON."""
    if type(value) is dict:
        yield from [value] if "type" in value else []
        value = list(value.values())
    for inner in value if type(value) is list else []:
        yield from _parts(inner)


def _loaded(file: dict, path: str):
    """The library's tokenizer. Raises: Refused."""
    library = optional.package("tokenizers", "tokenizer.kind=huggingface")
    try:
        tokenizer = library.Tokenizer.from_str(json.dumps(file))
    except Exception as error:  # the library raises no other class
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{path} must be a tokenizer.json ({reason}): {REMEDY}.") from error
    if (model := type(tokenizer.model).__name__) not in MODELS:
        raise Refused(f"{path} has a {model} model, which does not give text back: use BPE or Unigram.")
    return tokenizer


def _size(pieces: dict[str, int], path: str) -> int:
    """The largest id + 1. Raises: Refused, if ids are missing, too large, or shared by two pieces."""
    size = max(pieces.values(), default=-1) + 1
    if not 0 < size <= MAX_VOCAB:
        raise Refused(f"{path} has a largest id of {size - 1}, and {MAX_VOCAB - 1} is the most: {REMEDY}.")
    if len(set(pieces.values())) < len(pieces):
        raise Refused(f"{path} has {len(pieces)} tokens and {len(set(pieces.values()))} ids: {REMEDY}.")
    return size


def _byte_level(piece: str) -> bytes:
    try:
        return piece.translate(BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # not spelled in bytes, so it occurs in no text
        return piece.encode()


def _fallen_back(piece: str, signs: bool) -> bytes:
    if byte := BYTE_PIECE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return (piece.replace(SPACE_SIGN, " ") if signs else piece).encode()
