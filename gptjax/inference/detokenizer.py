"""The continuation of a prompt as it is drawn: tokens, and the text that no later token can change."""

UNSURE = 3  # a character has at most 4 bytes, and until the last byte comes each may decode to U+FFFD


class Continuation:
    """The continuation of one row.

    tokens: the tokens drawn, without the end of the text, and with the token in which a stop string ends.
    finish: why the row is done: `stop` (the text or a stop string ended it), `length`, or "" while the row goes on.
    """

    def __init__(self, tokenizer, max_tokens: int, stop: tuple[str, ...] = ()):
        self.tokens, self.finish = [], ""
        self._tokenizer, self._max_tokens, self._stop = tokenizer, max_tokens, stop
        self._given = 0

    def push(self, tokens: list[int]) -> None:
        """Appends the next tokens; after the end of the row they are dropped."""
        for token in tokens:
            if self.finish:
                return
            if token in self._tokenizer.ends:
                self.finish = "stop"
                return
            self.tokens.append(token)
            if self._stop and self._stops_at(self._whole_characters()) >= 0:
                self.finish = "stop"
            elif len(self.tokens) == self._max_tokens:
                self.finish = "length"

    def text(self) -> str:
        """The text before the first stop string. Until the row is done, a tail that may start a stop string waits."""
        text = self._tokenizer.decode(self.tokens) if self.finish else self._whole_characters()
        end = self._stops_at(text)
        if end < 0:
            end = len(text)
            if not self.finish:
                tails = range(min(end, max((len(stop) for stop in self._stop), default=1) - 1), 0, -1)
                end -= next((n for n in tails if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
        return text[:end]

    def news(self) -> str:
        """The text since the last call."""
        text = self.text()
        start, self._given = self._given, len(text)
        return text[start:]

    def _whole_characters(self) -> str:
        text = self._tokenizer.decode(self.tokens)
        open_end = text[-UNSURE:]
        return text[: len(text) - (len(open_end) - len(open_end.rstrip("\ufffd")))]

    def _stops_at(self, text: str) -> int:
        return min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=-1)
