"""A request that is decoding: what it feeds next, and the one rule by which it ends."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsun.engine.requests import Request, TokenLogprob
from qsun.runtime.tokens.drafts import Drafts
from qsun.runtime.tokens.row_text import RowText
from qsun.runtime.tokens.sampling import LogitShaping


@dataclass(eq=False)
class DecodeRow:
    """A row of a decode batch.

    Attributes:
        text: None where none is wanted. cached: prompt tokens that came from the prefix cache.
        token: to be fed next. count: tokens chosen so far. random: of this request alone; None where it is greedy.
        shaping: None until the first token is chosen, and where nothing changes the logits.
        drafts: None where it feeds one token a step. finish: why it ended; "" while it runs.
    """

    request: Request
    text: RowText | None = None
    cached: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    token: int = 0
    count: int = 0
    random: torch.Generator | None = None
    shaping: LogitShaping | None = None
    drafts: Drafts | None = None
    finish: str = ""

    def __post_init__(self) -> None:
        self.token = self.request.tokens[-1]
        if self.request.sampling.temperature > 0:
            self.random = torch.Generator().manual_seed(self.request.sampling.seed)

    def draft(self, most: int) -> list[int]:
        """Return tokens that may follow the next one to be fed; it never ends in one that could not be chosen."""
        left = self.request.sampling.max_new_tokens - self.count - 1
        return [] if self.drafts is None else self.drafts.propose(min(most, left))

    def shape(self, logits: Tensor, eos: Set[int]) -> str:
        """Change (vocabulary,) float32 logits in place. Returns what went wrong, or ""."""
        sampling = self.request.sampling
        try:
            if self.shaping is None:
                self.shaping = LogitShaping(
                    self.request.tokens,
                    logits,
                    repetition_penalty=sampling.repetition_penalty,
                    frequency_penalty=sampling.frequency_penalty,
                    presence_penalty=sampling.presence_penalty,
                    bias=dict(sampling.logit_bias),
                    min_new_tokens=sampling.min_new_tokens,
                    ends={*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos)},
                    constraint=sampling.constraint,
                )
            self.shaping.apply(logits)
        except Exception as error:  # a constraint is the caller's own code, and must not end other requests
            return f"{type(error).__name__}: {error}"
        return "" if bool(logits.max() > float("-inf")) else "the request's settings allow no token here"

    def advance(self, token: int) -> str:
        """Take a chosen token, to be fed next. Returns what went wrong, or ""."""
        self.token, self.count = token, self.count + 1
        if self.drafts is not None:
            self.drafts.add(token)
        try:
            if self.shaping is not None:
                self.shaping.advance(token)
        except Exception as error:  # see `shape`
            return f"{type(error).__name__}: {error}"
        return ""

    def show(self, eos: Set[int]) -> tuple[str, str]:
        """Return the text that the chosen token lets us show, and why the row ends with it ("" where it goes on)."""
        sampling = self.request.sampling
        ends = self.token in eos and not sampling.ignore_eos
        stops = self.token in sampling.stop_token_ids
        stopped = False
        if self.text is not None and not ends and not stops:
            stopped = self.text.add(self.token, self.count >= sampling.min_new_tokens)
        last = self.count == sampling.max_new_tokens
        finish = "eos" if ends else "stop" if stops or stopped else "length" if last else ""
        text = "" if self.text is None else self.text.rest(stopped) if finish else self.text.fresh()
        return text, finish


def decoding_row(
    request: Request, cached: int, scores: tuple[TokenLogprob, ...], tokenizer: Any | None, speculate: int
) -> DecodeRow:
    """Return the row of a request whose prompt has been read. cached: see above. speculate: most tokens of a draft."""
    sampling, text = request.sampling, None
    if sampling.detokenize and tokenizer is not None:
        text = RowText(tokenizer, sampling.stop, sampling.skip_special_tokens)
    drafts = Drafts(request.tokens, speculate) if speculate and sampling.max_new_tokens > 1 else None
    return DecodeRow(request, text, cached, scores, drafts=drafts)
