"""A request that is decoding: what it feeds next, and the one rule by which it ends."""

from collections.abc import Set
from dataclasses import dataclass

import torch

from qsun.engine.requests import Request
from qsun.runtime.row_text import RowText


@dataclass(eq=False)
class Row:
    """A row of a decode batch.

    Attributes:
        text: None where none is wanted. cached: prompt tokens that came from the prefix cache.
        token: to be fed next. count: tokens chosen so far. random: of this request alone; None where it is greedy.
    """

    request: Request
    text: RowText | None = None
    cached: int = 0
    token: int = 0
    count: int = 0
    random: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.token = self.request.tokens[-1]
        if self.request.sampling.temperature > 0:
            self.random = torch.Generator().manual_seed(self.request.sampling.seed)

    def show(self, eos: Set[int]) -> tuple[str, str]:
        """Return the text that the chosen token lets us show, and why the row ends with it ("" where it goes on)."""
        sampling = self.request.sampling
        ends = self.token in eos and not sampling.ignore_eos
        stopped = self.text is not None and not ends and self.text.add(self.token)
        last = self.count == sampling.max_new_tokens
        finish = "eos" if ends else "stop" if stopped else "length" if last else ""
        text = "" if self.text is None else self.text.rest(stopped) if finish else self.text.fresh()
        return text, finish
