"""How many replicas a pool is to have, from the tokens that its replicas have yet to compute."""

import math
from typing import Any

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
