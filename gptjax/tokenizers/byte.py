"""Bytes of UTF-8 as tokens."""

from collections.abc import Iterable

import numpy as np

from gptjax.errors import Refused
from gptjax.tokenizers import exact


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; 256 is end-of-text, and special tokens come after it."""

    begin = end_of_text = 256
    opening, prefix = (), ""

    def __init__(self, hash: str, names: Iterable[str] = ()):
        self.hash = hash
        self.ends: tuple[int, ...] = (self.end_of_text,)
        self.special, self.vocab_size = exact.special_ids({exact.END_OF_TEXT: self.end_of_text}, names, 257)
        self.token_bytes = (np.arange(self.vocab_size) < 256).astype(np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(exact.utf8(text), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str], threads: int = -1) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_sampled(self, text: str, seed: int, alpha: float) -> np.ndarray:
        raise Refused("tokenizer.kind=byte has one encoding of a text, so none can be drawn: use sentencepiece.")

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < self.end_of_text).decode(errors="replace")
