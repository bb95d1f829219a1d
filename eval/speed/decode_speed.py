"""`qsun bench speed`: a decode step of SUN (bf16 decode module) against QSUN (int4), and the prefill before both."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from qsun.engine.config import Sampling
from qsun.engine.decode.fixed_slots import budget_for
from qsun.engine.decode.slot_memory import available_after_release
from qsun.engine.decode_batch import DecodeBatch
from qsun.engine.requests import Request
from qsun.engine.row import DecodeRow
from qsun.errors import QsunError
from qsun.eval.load.percentiles import percentile
from qsun.eval.speed.clock import copy_bandwidth, in_turns, seconds_of
from qsun.eval.speed.contenders import DTYPE, SUN, Contenders, kv_bytes, weight_bytes
from qsun.model.architectures import kv_shape
from qsun.progress import Note
from qsun.runtime.seam import prefilled_rows

_WARM_UP = 2  # steps of each contender that are not timed
_PREFILL_CHUNK = 2048  # as generation's default
_COPY_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}  # larger than any last-level cache


@dataclass(frozen=True)
class StepTiming:
    """One decode module at one batch and context.

    Attributes:
        variant, lm_head: decode module, and how its output projection is stored.
        context: tokens that the median step attends to, including its own.
        prefill_ms: time in which the bf16 prefill module reads one prompt of `context` tokens; equal for all variants.
        ttft_ms: prefill_ms and one step of this batch, which gives the first token.
        tpot_ms, tpot_p95_ms: time of a step, which gives every row of the batch one token.
        ratio_to_sun: SUN's TPOT over this one.
        weight_bytes, kv_bytes: bytes that a step must read.
        floor_ms: those bytes at copy bandwidth. bandwidth_percent: floor over TPOT.
        steps: how many were timed.
    """

    variant: str
    lm_head: str
    batch: int
    context: int
    prefill_ms: float
    ttft_ms: float
    tpot_ms: float
    tpot_p95_ms: float
    tokens_per_s: float
    ratio_to_sun: float
    weight_bytes: int
    kv_bytes: int
    floor_ms: float
    bandwidth_percent: float
    steps: int


@dataclass(frozen=True)
class Points:
    """What to measure: every batch at every context, `steps` of each contender, fewer after `seconds` a point.

    prompts: further lengths to time the prefill of, for the curves of `qsun simulate`.
    """

    batches: Sequence[int] = (1, 4, 16, 64)
    contexts: Sequence[int] = (128, 1024)
    steps: int = 32
    seconds: float = 60.0
    prompts: Sequence[int] = ()

    def __post_init__(self) -> None:
        named = {"batches": self.batches, "contexts": self.contexts, "steps": [self.steps], "prompts": self.prompts}
        for name, values in named.items():
            wrong = [value for value in values if value < 1]
            if wrong or not (values or name == "prompts"):
                raise QsunError(f"{name} has {wrong[0] if wrong else 'nothing'}; use whole numbers from 1 up")
        if not self.seconds > 0:
            raise QsunError(f"seconds {self.seconds:g} is out of range; use more than 0")


@torch.no_grad()
def bench_speed(contenders: Contenders, points: Points, note: Note = lambda _: None) -> dict[str, Any]:
    """Time decode steps of all contenders, in turns, at every point.

    Returns:
        {"model", "copy_gb_per_s", "rows": [StepTiming as dict], "prefill": [{"tokens", "ms"}]}. Points that do not
        fit in memory are left out with a note.
    Raises:
        QsunError: a context is longer than the model's positions, or no point fits.
    """
    config = contenders.prefill.config
    limit = config.max_position_embeddings - points.steps - _WARM_UP
    longest = max(*points.contexts, *points.prompts, 1)
    if longest > limit:
        raise QsunError(f"context {longest} leaves no room for the steps; use {limit} or less")
    device = contenders.prefill.device
    bandwidth = copy_bandwidth(device, _COPY_BYTES[device.type])
    note(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    rows: list[StepTiming] = []
    prompts = {n: prefill_seconds(contenders.prefill, n, points.seconds) for n in points.prompts}
    for context in points.contexts:
        prefill = prompts[context] = prefill_seconds(contenders.prefill, context, points.seconds)
        note(f"context {context}: prefill {1000 * prefill:.0f} ms")
        for batch in points.batches:
            needed = sum(_kv_bytes_taken(model, batch, context, points) for model in contenders.decode.values())
            free = _free_with_copies(contenders.decode, batch, device)
            if needed > 0.9 * free:
                note(
                    f"batch {batch}, context {context} left out: KV of {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
                )
                continue
            taken = step_seconds(contenders.decode, batch, context, points)
            found = _rows(contenders, taken, (batch, context), prefill, bandwidth)
            note(f"batch {batch}, context {context}: " + ", ".join(f"{r.variant} {r.tpot_ms:.1f} ms" for r in found))
            rows += found
    if not rows:
        raise QsunError("no point fits in memory; use smaller batches or contexts, or one head")
    curve = [{"tokens": tokens, "ms": 1000 * prompts[tokens]} for tokens in sorted(prompts)]
    result: dict[str, Any] = {"model": contenders.name, "copy_gb_per_s": bandwidth / 1e9}
    return result | {"rows": [asdict(row) for row in rows], "prefill": curve}


def prefill_seconds(model: Any, context: int, seconds: float) -> float:
    """Median time in which the prefill module reads one prompt of `context` tokens; up to three, within `seconds`."""
    device = model.device
    prompt = torch.randint(model.config.vocab_size, (context,)).tolist()

    def read() -> float:
        return seconds_of(lambda: list(prefilled_rows(model, [prompt], _PREFILL_CHUNK)), device)

    first = read()
    taken: list[float] = []
    while len(taken) < 3 and (not taken or first + sum(taken) < seconds):
        taken.append(read())
    return statistics.median(taken)


def step_seconds(models: Mapping[str, Any], batch: int, context: int, points: Points) -> dict[str, list[float]]:
    """Return the seconds of single decode steps of each model; they take turns step by step.

    A step is what `generate` and `qsun serve` do for a token: the decode module over its own cache and the greedy
    choice. The caches hold random keys and values; the middle step attends to `context` tokens.
    """
    device = next(iter(models.values())).device
    filled, steps = _filled_and_steps(context, points)
    batches = {name: filled_batch(model, batch, filled, steps) for name, model in models.items()}
    turns = {name: partial(seconds_of, partial(take_step, decoding), device) for name, decoding in batches.items()}
    return in_turns(turns, points.steps, _WARM_UP, points.seconds)


def take_step(batch: DecodeBatch) -> None:
    """Decode a token for each row, whatever it is."""
    for _ in batch.turns():
        pass


def _filled_and_steps(context: int, points: Points) -> tuple[int, int]:
    """Return the tokens that a row has before its first step, and its steps."""
    return max(0, context - 1 - _WARM_UP - points.steps // 2), points.steps + _WARM_UP


def _kv_bytes_taken(model: Any, batch: int, context: int, points: Points) -> int:
    """Return the bytes of a point's cache: on a GPU, rows and columns are rounded up."""
    return kv_bytes(model.config, 1, budget_for(model, batch, sum(_filled_and_steps(context, points))))


def filled_batch(model: Any, batch: int, filled: int, steps: int) -> DecodeBatch:
    """Return rows with random keys and values of `filled` tokens each, and room for `steps` more."""
    device = model.device
    layers, heads, width = kv_shape(model.config)
    drawn = [torch.randn(2, heads, filled, width, device=device).to(DTYPE) for _ in range(layers)]
    tokens = torch.randint(model.config.vocab_size, (batch, filled + 1)).tolist()
    rows = [DecodeRow(Request(str(i), "", tuple(row), Sampling(max_new_tokens=steps))) for i, row in enumerate(tokens)]
    decoding = DecodeBatch(model, budget_for(model, batch, filled + steps))
    decoding.cache.reserve([filled + steps] * batch)
    for row in rows:
        decoding.add(row, [(layer[0], layer[1]) for layer in drawn])
    return decoding


def _rows(
    contenders: Contenders, taken: Mapping[str, list[float]], point: tuple[int, int], prefill: float, bandwidth: float
) -> list[StepTiming]:
    batch, context = point
    medians = {name: statistics.median(times) for name, times in taken.items()}
    kv = kv_bytes(contenders.prefill.config, batch, context)
    found = []
    for name, median in medians.items():
        weights = weight_bytes(contenders.decode[name], batch)
        floor = (weights + kv) / bandwidth
        found.append(
            StepTiming(
                variant=name,
                lm_head=contenders.head[name],
                batch=batch,
                context=context,
                prefill_ms=1000 * prefill,
                ttft_ms=1000 * (prefill + median),
                tpot_ms=1000 * median,
                tpot_p95_ms=1000 * percentile(taken[name], 0.95),
                tokens_per_s=batch / median,
                ratio_to_sun=medians[SUN] / median,
                weight_bytes=weights,
                kv_bytes=kv,
                floor_ms=1000 * floor,
                bandwidth_percent=100 * floor / median,
                steps=len(taken[name]),
            )
        )
    return found


def _free_with_copies(models: Mapping[str, Any], batch: int, device: torch.device) -> int:
    """Return the free memory after a first step of this batch, which makes dequantized copies on a CPU."""
    if device.type == "cpu":
        for model in models.values():
            take_step(filled_batch(model, batch, 0, 1))
    return available_after_release(device)
