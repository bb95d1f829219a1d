"""A row's tokens as text that can be shown while it grows: whole characters, and nothing that a stop string cuts.

Like tokenizers.DecodeStream, which does not give the rest of a row that ends inside a character, and which tokenizers
written in Python do not have.
"""

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a character of several tokens, not all of them here
_PATIENCE = 16  # tokens that give no text, after which they are read no more: each token would read all of them again


class RowText:
    """Text of one row.

    Args:
        tokenizer: of the model.
        stops: strings that end the row; the text ends before the first of them.
        skip_special_tokens: leave special tokens out of the text; stops that have one in them are then never found.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], skip_special_tokens: bool = True):
        self._tokenizer, self._stops, self._skip = tokenizer, stops, skip_special_tokens
        self._tokens: list[int] = []
        self._window, self._read = 0, 0  # tokens before _window are done; those before _read give context
        self._sent = 0
        self.text = ""

    def add(self, token: int, may_stop: bool = True) -> bool:
        """Take a token. Returns whether a stop string is complete; may_stop: look for one."""
        self._tokens.append(token)
        before, now = self._decode(self._window, self._read), self._decode(self._window, len(self._tokens))
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            self._window, self._read = self._read, len(self._tokens)
            return self._extend(now[len(before) :], may_stop)
        if len(self._tokens) - self._read <= _PATIENCE:
            return False
        if now == before:  # special tokens, one after another
            del self._tokens[self._read :]
            return False
        return self._split(before, now, may_stop)

    def _split(self, before: str, now: str, may_stop: bool) -> bool:
        """Take the text of many tokens that do not end it; the last ones may still become a character."""
        for place in range(len(self._tokens) - 4, len(self._tokens) - 8, -1):
            done = self._decode(self._window, place)
            if done + self._decode(place, len(self._tokens)) == now:
                self._window = self._read = place
                return self._extend(done[len(before) :], may_stop)
        return False

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=self._skip)

    def _extend(self, new: str, may_stop: bool) -> bool:
        known = len(self.text)
        self.text += new
        if not may_stop:
            return False
        # each from where it would end in the new text: one that was complete before, when none was looked for, is past
        places = [self.text.find(stop, max(known - len(stop) + 1, 0)) for stop in self._stops]
        found = [place for place in places if place >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def fresh(self) -> str:
        """Return unsent text, without an end that may begin a stop string."""
        held = max((n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        return self._give(max(len(self.text) - held, self._sent))

    def rest(self, stopped: bool) -> str:
        """Return all unsent text at the end of the row."""
        if not stopped:
            now = self._decode(self._window, len(self._tokens))
            self.text += now[len(self._decode(self._window, self._read)) :]
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        piece, self._sent = self.text[self._sent : end], end
        return piece
