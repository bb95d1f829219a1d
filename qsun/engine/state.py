"""What the engine tells those who watch it: events as they happen, and a snapshot after every step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qsun.engine.requests import Request


@dataclass(frozen=True)
class ModelState:
    """Requests of one model by where they are, and the tokens of KV that they hold."""

    waiting: int = 0
    prefilling: int = 0
    decoding: int = 0
    kv_tokens: int = 0
    leaving: bool = False


@dataclass(frozen=True)
class EngineState:
    """A snapshot.

    Attributes:
        models: by name. kv_budget_tokens: most rows x columns.
        prefix_bytes, prefix_hits, prefix_lookups: of the prefix cache, the last two in prompt tokens.
        finished_per_second: requests, of late.
    """

    models: dict[str, ModelState] = field(default_factory=dict)
    kv_budget_tokens: int = 0
    prefix_bytes: int = 0
    prefix_hits: int = 0
    prefix_lookups: int = 0
    finished_per_second: float = 0.0

    @property
    def waiting(self) -> int:
        return sum(model.waiting for model in self.models.values())


class EngineWatch:
    """Called in the engine's thread; does nothing. Seconds are since the request arrived, or of the work."""

    def refused(self, requests: Sequence[Request]) -> None: ...

    def admitted(self, request: Request, seconds: float) -> None: ...

    def prefilled(self, tokens: int, seconds: float) -> None: ...

    def step(self, rows: int, seconds: float) -> None: ...

    def token(self, request: Request, count: int, seconds: float) -> None: ...

    def finished(self, request: Request, outcome: str, tokens: int, seconds: float) -> None: ...
