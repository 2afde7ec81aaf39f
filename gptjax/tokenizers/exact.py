"""Rules for every kind of tokenizer: text comes back exactly, special ids come from no text, and errors say why."""

import re
from collections.abc import Iterable

import numpy as np

from gptjax.errors import Refused

# SentencePiece and its followers write a space as this character, which therefore has no piece of its own.
SPACE_SIGN = "\u2581"
END_OF_TEXT = "<|end_of_text|>"
# Names of the end-of-text token in published tokenizers.
ENDS = END_OF_TEXT, "<|endoftext|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
# Names of the token that opens a text in published tokenizers that have one.
BEGINS = "<|begin_of_text|>", "<s>", "<bos>"
# Reserved ids, by their names here and in Llama 3's file.
RESERVED = re.compile(r"<\|reserved_(special_token_)?\d+\|>")
# Text that normalization, a dummy prefix, trimmed spaces, special pieces or a missing byte would change.
PROBE = f" a  b \t\r\n\n \0 12 \u00e9 e\u0301 \ufb01 \uff21 \u2028\ufeff \U0001f600 </s><unk><0x41>{SPACE_SIGN} "


def reserved(count: int) -> list[str]:
    """The names of `count` reserved ids."""
    return [f"<|reserved_{number}|>" for number in range(count)]


def special_ids(known: dict[str, int], names: Iterable[str], size: int) -> tuple[dict[str, int], int]:
    """Returns the ids of the special tokens by name, and the size of the vocabulary with them.

    A name that the vocabulary lacks takes the first reserved id, or a new id at the end if none is left.

    Args:
      known: the special tokens that the vocabulary has.
      names: the special tokens that it must have.
      size: ids of the vocabulary.
    """
    special = dict(sorted(known.items(), key=lambda item: item[1]))
    free = [name for name in special if RESERVED.fullmatch(name) and name not in set(names)]
    for name in names:
        if name not in special:
            special[name] = special.pop(free.pop(0)) if free else size
            size = max(size, special[name] + 1)
    return special, size


def end_of_text(special: dict[str, int], path: str) -> int:
    """The id that opens every document. Raises: Refused, if no special token has a known name."""
    for name in ENDS:
        if name in special:
            return special[name]
    raise Refused(
        f"{path} has no special token for the end of a text (none of {', '.join(ENDS)}), and every document opens with "
        f"one: add one by tokenizer.special_tokens={END_OF_TEXT}."
    )


def utf8(text: str) -> bytes:
    """Encodes a text. Raises: Refused, for half a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"The text has U+{ord(text[error.start]):04X} at character {error.start} of {len(text)}, half a surrogate "
            "pair, which UTF-8 can't hold: give text in UTF-8."
        ) from error


def probe(tokenizer, text: str, path: str, remedy: str) -> None:
    """Refuses a tokenizer that does not reproduce `text`, or counts its bytes wrong."""
    ids: np.ndarray = tokenizer.encode(text)
    back = tokenizer.decode(ids)
    bytes_in, bytes_out = len(text.encode()), int(tokenizer.token_bytes[ids].sum())
    if text != back or bytes_in != bytes_out:
        raise Refused(
            f"{path} changes text (a probe of {bytes_in} bytes came back as {len(back.encode())}, counted as "
            f"{bytes_out}): {remedy}."
        )
