"""The compared systems: conventional disaggregation, SUN and QSUN, on the same number of decode workers.

Conventional: every decode worker belongs to one model and holds its fine-tuned decode module in bf16. SUN: every decode
worker serves all models with the shared bf16 module. QSUN: the same with the module in int4.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qsun.errors import QsunError
from qsun.eval.load.workload import TracedRequest
from qsun.eval.simulate.curves import QSUN, SUN, Curves
from qsun.eval.simulate.system import LEAST, DecodeWorker, System

CONVENTIONAL = "conventional"
KINDS = (CONVENTIONAL, SUN, QSUN)
ASSIGNMENTS = ("load", "equal")
_PREFILL_UTILISATION = 0.5


@dataclass(frozen=True)
class Deployment:
    """What all systems have in common.

    Attributes:
        max_batch: rows of a decode worker.
        kv_tokens: tokens of KV of a decode worker; None: what `memory_bytes` leaves beside its weights, or no limit.
        memory_bytes: of a decode worker. int4 weights leave more of it for KV, several modules less.
        prefill_workers: of each model; None: enough that each model's are busy half of the time.
        prefill_tokens: above 0 there are no prefill workers: decode workers are qsun's in-process engines, which read
            this many prompt tokens a step, queue fairly and attend to as many tokens as their longest row has.
        assignment: of decode workers to models in the conventional system: by expected "load", or "equal" numbers.
        policy: of the router, in every system.
        qsun_variant: step curve of QSUN: "qsun", or "qsun+head" with an int4 head.
    """

    max_batch: int = 64
    kv_tokens: int | None = None
    memory_bytes: float | None = None
    prefill_workers: int | None = None
    prefill_tokens: int = 0
    assignment: str = "load"
    policy: str = LEAST
    transfer_ms: float = 0.0
    step_overhead_ms: float = 0.0
    qsun_variant: str = QSUN

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and not 0 < self.memory_bytes < math.inf:
            raise QsunError(
                f"memory of {self.memory_bytes / 1e9:g} GB is out of range; use more than 0, or leave it out"
            )

    def system(
        self, kind: str, workers: int, shares: Mapping[str, float], prefill: Mapping[str, int], curves: Curves
    ) -> System:
        """Return one of KINDS with `workers` decode workers, and prefill workers unless decode workers read prompts."""
        if kind not in KINDS:
            raise QsunError(f"system {kind!r} is not known; use one of {', '.join(KINDS)}")
        if workers < 1:
            raise QsunError(f"decode workers {workers} is out of range; use 1 or more")
        parts = assign(shares, workers, self.assignment) if kind == CONVENTIONAL else [tuple(shares)] * workers
        decode = tuple(self._worker(kind, models, curves) for models in parts)
        return System(
            kind, decode, {} if self.prefill_tokens else prefill, self.policy, self.transfer_ms, self.step_overhead_ms
        )

    def _worker(self, kind: str, models: tuple[str, ...], curves: Curves) -> DecodeWorker:
        variant = self.qsun_variant if kind == QSUN else SUN
        turns = kind == CONVENTIONAL and len(models) > 1
        kv_tokens = self.kv_tokens
        if kv_tokens is None and self.memory_bytes is not None:
            kv_tokens = curves.kv_tokens(variant, self.memory_bytes, len(models) if turns else 1)
        engine = self.prefill_tokens > 0
        return DecodeWorker(
            models,
            variant,
            turns,
            self.max_batch,
            kv_tokens=kv_tokens,
            prefill_tokens=self.prefill_tokens,
            fair=engine,
            padded=engine,
        )

    def prefill_for(
        self, trace: Sequence[TracedRequest], shares: Mapping[str, float], curves: Curves
    ) -> dict[str, int]:
        """Prefill workers of each model for a trace; the same whatever decodes."""
        if self.prefill_workers is not None:
            return dict.fromkeys(shares, self.prefill_workers)
        seconds = dict.fromkeys(shares, 0.0)
        for request in trace:
            seconds[request.model] += curves.chunk(request.prompt_tokens - 1, 0)
        span = trace[-1].arrival - trace[0].arrival
        if span <= 0:
            raise QsunError("all requests arrive at once, so prefill workers cannot be matched; give --prefill-workers")
        return {model: max(1, math.ceil(busy / span / _PREFILL_UTILISATION)) for model, busy in seconds.items()}


def assign(shares: Mapping[str, float], workers: int, how: str = "load") -> list[tuple[str, ...]]:
    """Return the models of each decode worker in the conventional system.

    With at least one worker a model, "load" gives each model one and every further worker to the model with the highest
    share per worker; "equal" gives equal numbers, the remainder to the largest shares. With fewer workers than models,
    some hold several models, which take turns: "load" packs the largest shares first, each where the sum is smallest;
    "equal" deals the models round-robin.
    """
    if how not in ASSIGNMENTS:
        raise QsunError(f"assignment {how!r} is not known; use {' or '.join(ASSIGNMENTS)}")
    ranked = sorted(shares, key=lambda model: -shares[model])
    if workers < len(ranked):
        return _packed(shares, ranked, workers, how)
    count = dict.fromkeys(ranked, 1)
    for number in range(workers - len(ranked)):
        neediest = max(ranked, key=lambda model: shares[model] / count[model])
        count[ranked[number % len(ranked)] if how == "equal" else neediest] += 1
    return [(model,) for model in ranked for _ in range(count[model])]


def _packed(shares: Mapping[str, float], ranked: Sequence[str], workers: int, how: str) -> list[tuple[str, ...]]:
    held: list[list[str]] = [[] for _ in range(workers)]
    for number, model in enumerate(ranked):
        least = min(held, key=lambda models: (sum(shares[m] for m in models), len(models)))
        (held[number % workers] if how == "equal" else least).append(model)
    return [tuple(models) for models in held]
