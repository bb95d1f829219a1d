"""What the engine shows of itself: events as they happen, and a snapshot."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from qsun.adapters.pool import AdapterPool
from qsun.engine.decode_batch import DecodeBatch
from qsun.engine.prefilling import LoadedModule, PrefillTask
from qsun.engine.prefix_cache import PrefixCache
from qsun.engine.requests import Request
from qsun.engine.row import DecodeRow


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
        adapters, adapter_bytes: LoRA adapters in memory; adapter_loads, adapter_evictions: so far.
        finished_per_second: requests, recently. drafted, accepted: tokens of speculation, and those that were right.
    """

    models: dict[str, ModelState] = field(default_factory=dict)
    kv_budget_tokens: int = 0
    prefix_bytes: int = 0
    prefix_hits: int = 0
    prefix_lookups: int = 0
    adapters: int = 0
    adapter_bytes: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    finished_per_second: float = 0.0
    drafted: int = 0
    accepted: int = 0

    @property
    def waiting(self) -> int:
        return sum(model.waiting for model in self.models.values())


def model_states(
    modules: Iterable[LoadedModule],
    waiting: Callable[[str], int],
    prefilling: Sequence[PrefillTask],
    decoding: Sequence[DecodeRow],
) -> dict[str, ModelState]:
    """Count by model. waiting: gives a model's requests in the queue."""
    states = {}
    for owner in modules:
        tasks = [task for task in prefilling if task.request.model == owner.name]
        rows = [row for row in decoding if row.request.model == owner.name]
        kv_tokens = sum(task.done for task in tasks) + sum(row.request.prefix_tokens + row.count for row in rows)
        states[owner.name] = ModelState(waiting(owner.name), len(tasks), len(rows), kv_tokens, owner.leaving)
    return states


def engine_state(
    models: dict[str, ModelState],
    budget_tokens: int,
    known: PrefixCache,
    adapters: AdapterPool,
    batches: Sequence[DecodeBatch],
    rate: float,
) -> EngineState:
    """Put a snapshot together. rate: finished requests per second."""
    return EngineState(
        models=models,
        kv_budget_tokens=budget_tokens,
        prefix_bytes=known.bytes,
        prefix_hits=known.hits,
        prefix_lookups=known.lookups,
        adapters=len(adapters),
        adapter_bytes=adapters.size_bytes,
        adapter_loads=adapters.loads,
        adapter_evictions=adapters.evictions,
        finished_per_second=rate,
        drafted=sum(batch.drafted for batch in batches),
        accepted=sum(batch.accepted for batch in batches),
    )


class EngineWatch:
    """Receives events in the engine's thread; this one ignores them. Seconds are since arrival, or of the work."""

    def refused(self, requests: Sequence[Request]) -> None: ...

    def admitted(self, request: Request, seconds: float) -> None: ...

    def prefilled(self, tokens: int, seconds: float) -> None: ...

    def step(self, rows: int, seconds: float) -> None: ...

    def token(self, request: Request, count: int, seconds: float) -> None: ...

    def removed(self, model: str) -> None: ...

    def finished(self, request: Request, outcome: str, tokens: int, seconds: float) -> None: ...
