"""Finds calls of tools in an answer while it grows."""

import secrets
from dataclasses import dataclass, field
from typing import Any

from qsun.serve.api.tools.formats import ToolFormat


@dataclass(frozen=True)
class Call:
    """A call that the model made. arguments: a JSON object in a string."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolParser:
    """Splits the text of one answer into content and calls, without the spaces around calls.

    What looks like a call and is not one stays content.

    Args:
        most: calls that the client takes; later ones are dropped.
    Attributes:
        calls_before_content: how many calls came before the first content.
    """

    def __init__(self, form: ToolFormat, most: int | None = None):
        self._form, self._most = form, most
        self._held = ""  # not given out yet
        self._inside = False
        self._opening = ""
        self._begun = self._called = False  # content or a call came already; the last thing was a call
        self._count = self.calls_before_content = 0
        self._said = False  # content came already, be it spaces

    def feed(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
        """Take more text, all of it with `last`. Returns the content and the calls that are certain by now."""
        self._held += text
        content, calls = "", list[Call]()
        while True:
            if not self._inside:
                content += self._outside(last)
                if not self._inside:
                    break
            end = self._held.find(self._form.closes) if self._form.closes else -1
            if end < 0 and not last:
                break
            inside, self._held = self._cut(end)
            found = self._form.read(inside)
            self._inside, self._begun = False, True
            if found is None:
                content += self._opening + inside[self._kept :] + (self._form.closes if end >= 0 else "")
            else:
                taken = self._take(found)
                calls += taken
                self._called = True
                if not (self._said or content):
                    self.calls_before_content += len(taken)
        self._said |= bool(content)
        return content, calls

    @property
    def _kept(self) -> int:
        return len(self._opening) if self._form.keeps_opening else 0

    def _cut(self, end: int) -> tuple[str, str]:
        if end < 0:
            return self._held, ""
        return self._held[:end], self._held[end + len(self._form.closes) :]

    def _outside(self, last: bool) -> str:
        """Return content up to where a call begins, or may begin."""
        if self._called:
            self._held = self._held.lstrip()
            self._called = not self._held
        if self._form.at_start and self._begun:
            return self._give(len(self._held))
        start = len(self._held) - len(self._held.lstrip())
        places = [(self._held.find(opening), opening) for opening in self._form.opens]
        found = [(place, opening) for place, opening in places if place >= 0]
        if self._form.at_start:
            found = [(place, opening) for place, opening in found if place == start]
        if found:
            place, self._opening = min(found)
            content = self._give(place)
            if not self._form.keeps_opening:
                self._held = self._held[len(self._opening) :]
            self._inside = True
            return content.rstrip()
        return self._give(len(self._held) - (0 if last else self._uncertain(start)))

    def _uncertain(self, start: int) -> int:
        """Return how many characters at the end may begin a call."""
        if self._form.at_start and start < len(self._held):
            rest = self._held[start:]
            return len(self._held) if any(opening.startswith(rest) for opening in self._form.opens) else 0
        longest = max(map(len, self._form.opens))
        partial = (n for n in range(longest - 1, 0, -1) if any(o[:n] == self._held[-n:] for o in self._form.opens))
        certain = self._held[: len(self._held) - next(partial, 0)]
        return len(self._held) - len(certain.rstrip())

    def _give(self, end: int) -> str:
        content, self._held = self._held[:end], self._held[end:]
        self._begun |= bool(content.strip())
        return content

    def _take(self, found: list[tuple[str, str]]) -> list[Call]:
        room = len(found) if self._most is None else max(0, self._most - self._count)
        self._count += len(found)
        return [Call(name, arguments) for name, arguments in found[:room]]
