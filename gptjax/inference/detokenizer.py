"""What follows a prompt, as it comes: tokens, and their text as far as nothing that may come can change it."""

UNSURE = 3  # a character's bytes are at most 4, and before the last of them each may be shown as U+FFFD


class Continuation:
    """Of one row.

    tokens: those made; without the end of the text, and with the token in which a stop string ends.
    finish: why there will be no more: `stop` (the text has ended, or a stop string has come), `length`, or "" for now.
    """

    def __init__(self, tokenizer, max_tokens: int, stop: tuple[str, ...] = ()):
        self.tokens, self.finish = [], ""
        self._tokenizer, self._max_tokens, self._stop = tokenizer, max_tokens, stop
        self._given = 0

    def push(self, tokens: list[int]) -> None:
        """Takes what was made next; after the row's end nothing is taken."""
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
        """All of it before the first stop string; while there may be more, without what may begin one."""
        text = self._tokenizer.decode(self.tokens) if self.finish else self._whole_characters()
        end = self._stops_at(text)
        if end < 0:
            end = len(text)
            if not self.finish:
                begun = range(min(end, max((len(stop) for stop in self._stop), default=1) - 1), 0, -1)
                end -= next((n for n in begun if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
        return text[:end]

    def news(self) -> str:
        """What of the text was not told yet."""
        text = self.text()
        told, self._given = self._given, len(text)
        return text[told:]

    def _whole_characters(self) -> str:
        text = self._tokenizer.decode(self.tokens)
        open_end = text[-UNSURE:]
        return text[: len(text) - (len(open_end) - len(open_end.rstrip("\ufffd")))]

    def _stops_at(self, text: str) -> int:
        return min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=-1)
