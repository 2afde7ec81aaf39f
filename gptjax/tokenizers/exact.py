"""What every kind of tokenizer promises: text that comes back, ids that no text gives, and words for what breaks it."""

import re
from collections.abc import Iterable

import numpy as np

from gptjax.errors import Refused

# SentencePiece, and what follows it, writes a space as this character, so that it has no piece of its own.
SPACE_SIGN = "\u2581"
END_OF_TEXT = "<|end_of_text|>"
# What others call it.
ENDS = END_OF_TEXT, "<|endoftext|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
# What those open a text with who have another token for it.
BEGINS = "<|begin_of_text|>", "<s>", "<bos>"
# Ids kept for later, by their names here and in Llama 3's file.
RESERVED = re.compile(r"<\|reserved_(special_token_)?\d+\|>")
# What normalization, a dummy prefix, trimmed spaces, special pieces or a missing byte would change.
PROBE = f" a  b \t\r\n\n \0 12 \u00e9 e\u0301 \ufb01 \uff21 \u2028\ufeff \U0001f600 </s><unk><0x41>{SPACE_SIGN} "


def reserved(count: int) -> list[str]:
    """The names of so many ids that are kept for later."""
    return [f"<|reserved_{number}|>" for number in range(count)]


def special_ids(known: dict[str, int], names: Iterable[str], size: int) -> tuple[dict[str, int], int]:
    """(ids of the special tokens by name, size of the vocabulary with them).

    known: those that the vocabulary of `size` ids has. Of `names`, one that it doesn't know takes the first reserved
    id, and where none is left a new one at the end.
    """
    special = dict(sorted(known.items(), key=lambda item: item[1]))
    free = [name for name in special if RESERVED.fullmatch(name) and name not in set(names)]
    for name in names:
        if name not in special:
            special[name] = special.pop(free.pop(0)) if free else size
            size = max(size, special[name] + 1)
    return special, size


def end_of_text(special: dict[str, int], path: str) -> int:
    """The id that opens every document. Raises: Refused, where no special token is known as one."""
    for name in ENDS:
        if name in special:
            return special[name]
    raise Refused(
        f"{path} has no special token for the end of a text (none of {', '.join(ENDS)}), and every document opens with "
        f"one: add one by tokenizer.special_tokens={END_OF_TEXT}."
    )


def utf8(text: str) -> bytes:
    """Raises: Refused, for half a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"The text has U+{ord(text[error.start]):04X} at character {error.start} of {len(text)}, half a surrogate "
            "pair, which UTF-8 can't hold: give text in UTF-8."
        ) from error


def probe(tokenizer, text: str, path: str, remedy: str) -> None:
    """Refuses a tokenizer that does not give `text` back, or counts its bytes otherwise."""
    ids: np.ndarray = tokenizer.encode(text)
    back = tokenizer.decode(ids)
    bytes_in, bytes_out = len(text.encode()), int(tokenizer.token_bytes[ids].sum())
    if text != back or bytes_in != bytes_out:
        raise Refused(
            f"{path} changes text (a probe of {bytes_in} bytes came back as {len(back.encode())}, counted as "
            f"{bytes_out}): {remedy}."
        )
