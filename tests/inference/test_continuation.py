import pytest

from gptjax.inference.detokenizer import Continuation
from gptjax.tokenizers.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer("")


def pushed(content: bytes, stop=(), size=1, max_tokens=1000, end=True):
    """Pushes the content by `size` bytes; returns the news after each push, and the row."""
    row, pieces = Continuation(TOKENIZER, max_tokens, stop), []
    ids = [*content] + [TOKENIZER.end_of_text] * end
    for at in range(0, len(ids), size):
        row.push(ids[at : at + size])
        pieces.append(row.news())
    return pieces, row


def test_only_whole_characters_are_told():
    pieces, row = pushed("aé😀z".encode())
    assert pieces == ["a", "", "é", "", "", "", "😀", "z", ""]
    assert row.finish == "stop" and row.text() == "aé😀z"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("content", [b"\xf0\x9f\x98", b"a\xff\xff\xff\xff\xffb\xc3", "\ufffd\ufffdx".encode()])
def test_bytes_that_are_no_text_come_out_as_they_are_decoded_whole(content, size):
    pieces, row = pushed(content, size=size)
    assert "".join(pieces) == content.decode(errors="replace") == row.text()


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_text_ends_before_the_first_stop_string(size):
    """Whichever ends first; and what may begin one is held back until it is none."""
    pieces, row = pushed(b"one, two, t three four", ("three", "t th"), size)
    assert "".join(pieces) == "one, two, " and row.finish == "stop"
    assert bytes(row.tokens) == b"one, two, t th"  # with the token in which it ends, and no more
    pieces, row = pushed(b"abababac", ("ababac", "zz"), size)
    assert "".join(pieces) == "ab"
    pieces, row = pushed(b"aab", ("b", "ab", "aab"), size)
    assert "".join(pieces) == ""


def test_what_is_held_back_is_told_at_the_end():
    assert pushed(b"the en", ("end",))[0] == ["t", "h", "", "e ", "", "", "en"]
    pieces, row = pushed(b"the en", ("end",), end=False, max_tokens=6)
    assert "".join(pieces) == "the en" and row.finish == "length"


def test_a_row_takes_nothing_after_its_end():
    pieces, row = pushed(b"abcdef", max_tokens=3, size=4)
    assert "".join(pieces) == "abc" and row.tokens == [*b"abc"] and row.finish == "length"
    _, row = pushed(b"abc", ("c",), max_tokens=3)
    assert row.finish == "stop"
