"""How many replicas a pool is to have, from the tokens that its replicas have yet to compute."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qsun.serve.http.wire import DONE_EVENT
from qsun.serve.router.exchange.request import prompt_tokens

METRIC = "outstanding_tokens"


class ByOutstandingTokens:
    """A Serve autoscaling policy. Serve applies the bounds and delays of the pool to what it returns.

    Args:
        tokens: outstanding tokens for each replica.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        outstanding = sum((context.aggregated_metrics or {}).get(METRIC, {}).values())
        return math.ceil(outstanding / self.tokens), {}


class OutstandingTokens:
    """Counts the tokens of requests that run: prompts, and what each may still generate.

    Args:
        prompts_only: of a prefill replica, which generates nothing.
        longest: tokens that a request which leaves its length open may generate.
    Attributes:
        tokens: outstanding now.
    """

    def __init__(self, prompts_only: bool, longest: int = 0):
        self._prompts_only, self._longest = prompts_only, longest
        self.tokens = 0

    @contextmanager
    def counted(self, path: str, body: bytes) -> Iterator["RequestLoad"]:
        """Count a request within the block. body: empty for one that computes nothing."""
        load = RequestLoad(self, self._needed(path, body) if body else 0)
        self.tokens += load.left
        try:
            yield load
        finally:
            self.tokens -= load.left

    def _needed(self, path: str, body: bytes) -> int:
        values: dict[str, Any] = json.loads(body)
        return prompt_tokens(path, values) + (0 if self._prompts_only else int(values.get("max_tokens", self._longest)))


class RequestLoad:
    """The tokens that one request still needs."""

    def __init__(self, replica: OutstandingTokens, tokens: int):
        self._replica, self.left = replica, tokens
        self._line = b""  # the beginning of one that has not ended yet

    def arrived(self, piece: bytes) -> None:
        """Subtract the tokens of a piece of a stream, cut anywhere: one for each event but the last, [DONE]."""
        *lines, unfinished = (self._line + piece).split(b"\n")
        self._line = unfinished[: 2 * len(DONE_EVENT)]
        events = sum(line.startswith(b"data:") and line.strip() != DONE_EVENT.strip() for line in lines)
        tokens = min(self.left, events)
        self.left -= tokens
        self._replica.tokens -= tokens
