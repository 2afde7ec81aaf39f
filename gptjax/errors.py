"""The orderly ends of a command: refused input, a failure that a sentence explains, and a request to stop."""

import difflib
import reprlib
from collections.abc import Iterable


class Refused(Exception):
    """Input that can't be used: a flag, key, value, path, mesh or file.

    The message is one sentence that names the key or file, both numbers, and what to do. The command line prints it
    and exits with code 2. Raise it before anything is computed or written.
    """


class Failed(Exception):
    """A run that can't go on, or must not.

    The message is one sentence that says at which step and why, and what to do. The command line prints it and exits
    with code 1. Raise it on all processes alike, with nothing half-written.
    """


TRY_AGAIN = 75  # exit code; EX_TEMPFAIL in sysexits.h. The launchers run the command again.


class Preempted(Exception):
    """The run was asked to stop, and can resume. The message says by whom; the exit code is TRY_AGAIN."""


def nearest(word: str, words: Iterable[str]) -> str:
    """` Did you mean "x"?` for the closest of `words`, or an empty string when none is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""


class _Short(reprlib.Repr):
    """Cuts the repr of a value short. Python refuses to print very large numbers, so their bits are given."""

    maxstring = maxother = maxlong = 80

    def repr_int(self, number: int, level: int) -> str:
        return f"a number of {number.bit_length()} bits" if number.bit_length() > 128 else repr(number)


def shown(value) -> str:
    """A value of any kind and size, short enough for a sentence."""
    return _Short().repr(value)


def one_line(text: str) -> str:
    """A message that is safe on a terminal: on one line, without control characters, and short."""
    text = f"{text[:1500]} … {text[-500:]}" if len(text) > 2000 else text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
