"""Drafts of a row's next tokens without a draft model: what followed the same tokens the last time they were there.

Answers repeat themselves and their prompts, code and tool calls more than most. The shared decode module checks a
draft of several tokens in the step that would have computed one, and keeps what it would have written itself.
Source: prompt lookup decoding (Saxena 2023), in transformers and vLLM as n-gram speculation.
"""

from collections.abc import Sequence

_LENGTHS = (4, 3, 2)  # tokens that must be there again; the longest that are decide
_LONGEST_PAUSE = 32
_REMEMBERED = 4096  # tokens of a prompt, its last: looking at more would hold up the rows that decode meanwhile


class Drafts:
    """Of one row.

    Args:
        tokens: the prompt. most: tokens of a draft.
    """

    def __init__(self, tokens: Sequence[int], most: int):
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where what followed some tokens begins
        self._most = self._length = most
        self._misses, self._pause, self._drafted_at = 0, 0, 0
        for token in tokens[-_REMEMBERED:]:
            self.add(token)

    def add(self, token: int) -> None:
        """Take the next token of the row, of its prompt or its answer."""
        for length in _LENGTHS:
            if len(self._tokens) >= length:
                self._after[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def propose(self, room: int) -> list[int]:
        """Return at most `room` tokens that may follow; none where nothing repeats, or drafts were wrong lately."""
        if self._pause:
            self._pause -= 1
            return []
        keys = (tuple(self._tokens[-length:]) for length in _LENGTHS)
        start = next((self._after[key] for key in keys if key in self._after), None)
        if start is None:
            return []
        known, self._drafted_at = self._tokens[start:], len(self._tokens)
        for place in range(min(room, self._length) - len(known)):  # a loop goes on as it went
            known.append(known[place])
        return known[: max(0, min(room, self._length))]

    def judge(self, draft: Sequence[int]) -> int:
        """Compare a draft with what came: the next ones get longer or shorter, and rarer while they are wrong.

        Returns how many of its tokens were right.
        """
        came = self._tokens[self._drafted_at :]
        pairs = zip(draft, came, strict=False)  # fewer came where the row ended
        right = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(draft), len(came)))
        if right:
            self._misses = 0
            self._length = min(self._most, 2 * self._length if right == len(draft) else right + 1)
        else:
            self._misses += 1
            self._length = max(1, self._length // 2)
            self._pause = min(_LONGEST_PAUSE, 1 << self._misses)
        return right
