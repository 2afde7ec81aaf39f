"""The one exception that means "your input, not our program"."""

import difflib
from collections.abc import Iterable


class Refused(Exception):
    """Input that can't be used: a flag, key, value, path, mesh or file.

    The message is one sentence that names the key or file, both numbers, and what to do. The command line prints it
    and exits with code 2. Raise it before anything is computed or written.
    """


def nearest(word: str, words: Iterable[str]) -> str:
    """` Did you mean "x"?` for the closest of `words`, or an empty string when none is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
