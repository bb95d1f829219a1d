"""How long a decode step and a prefill take: measured or computed curves for a simulation.

A curve is linear in the batch and in the context between measured points. Below the smallest batch or context it is
constant; above the largest it continues the line of the last two points, and `Curves.beyond` is true. A prompt shorter
than the shortest measured one follows the line of the first two points, but not below 0.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsun.errors import QsunError
from qsun.eval.speed.model_shapes import ModelShape, known_shape

SUN, QSUN = "sun", "qsun"
COMPUTED = "computed:"
_COPY_BYTES_PER_S = 4.3e12  # an H200's copy, as measured; see docs/kernels.md
_BF16_FLOPS = 989e12  # dense peak of an H100 or H200, as NVIDIA states it
_INT4_BYTES = 0.516  # of a weight in groups of 128: 4 bits and a bf16 scale
_KEPT_SHARE = 0.9  # of a GPU's memory for weights and KV; activations and the runtime need the rest


class DoesNotFit(QsunError):
    """A decode worker's memory cannot hold its modules, or a request; with fewer models a worker it may."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a decode module's weights, and of one token's keys and values."""

    weight_bytes: float
    kv_bytes: float


@dataclass(frozen=True)
class Curves:
    """Times of one machine.

    Attributes:
        step: (variant, batch of 1 or more, mean context) -> seconds of a decode step, which gives each row one token.
            Contexts include the step's own token.
        prefill: tokens -> seconds in which a prefill worker reads this many tokens of one prompt in one pass;
            prefill(0) is the fixed cost of a pass, charged only if a prompt is read in pieces.
        source: where the curves come from, for reports; says if nothing was measured.
        largest: variant -> (batch, context) up to which `step` was measured; empty without a limit.
        footprints: variant -> memory, if known.
        group: (prompts, tokens of the longest) -> seconds of one pass that reads them side by side, if measured.
    """

    step: Callable[[str, int, float], float]
    prefill: Callable[[int], float]
    source: str
    largest: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    footprints: Mapping[str, Footprint] = field(default_factory=dict)
    group: Callable[[int, int], float] | None = None

    def side_by_side(self, prompts: int, tokens: int) -> float:
        """Return the seconds of a pass over several whole prompts, padded to `tokens` each.

        If that was not measured, it is the time of one prompt of all their tokens, which overestimates attention.
        """
        if tokens == 0:
            return 0.0
        return self.prefill(prompts * tokens) if self.group is None else self.group(prompts, tokens)

    def chunk(self, tokens: int, done: int) -> float:
        """Return the seconds of a pass over the next `tokens` of a prompt after `done` tokens."""
        if tokens == 0:
            return 0.0
        if done == 0:
            return self.prefill(tokens)
        return self.prefill(done + tokens) - self.prefill(done) + self.prefill(0)

    def beyond(self, variant: str, batch: int, context: float) -> bool:
        """Return whether this is larger than anything that was measured."""
        limit = self.largest.get(variant, (math.inf, math.inf))
        return batch > limit[0] or context > limit[1]

    def kv_tokens(self, variant: str, memory_bytes: float, modules: int = 1) -> int:
        """Return the tokens of KV that fit beside the weights of `modules` decode modules.

        Raises:
            DoesNotFit: the memory cannot hold the weights.
            QsunError: the curves have no footprint of this variant.
        """
        known = self.footprints.get(variant)
        if known is None:
            raise QsunError(f"curves of {self.source} do not know the bytes of {variant}; give --kv-tokens")
        left = _KEPT_SHARE * memory_bytes - modules * known.weight_bytes
        if left < known.kv_bytes:
            needed = modules * known.weight_bytes / _KEPT_SHARE / 1e9
            raise DoesNotFit(
                f"memory of {memory_bytes / 1e9:.1f} GB cannot hold {modules} x {variant}; "
                f"use more than {needed:.1f} GB or fewer models a worker"
            )
        return int(left / known.kv_bytes)


def load_curves(source: str) -> Curves:
    """Load the curves of a speed.json of `qsun bench speed`, or compute those of "computed:MODEL".

    Raises:
        QsunError: no such file or model, or a file that lacks something.
    """
    if source.startswith(COMPUTED):
        return computed_curves(source.removeprefix(COMPUTED))
    path = Path(source)
    if not path.exists() or path.is_dir():
        raise QsunError(f"curves {source} do not exist; give a speed.json of qsun bench speed, or {COMPUTED}MODEL")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return measured_curves(result)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QsunError(f"curves {source} are not JSON ({error}); give a speed.json of qsun bench speed") from None
    except (KeyError, TypeError) as error:
        raise QsunError(f"curves {source} lack {error}; give a speed.json of qsun bench speed") from None


def measured_curves(result: Mapping[str, Any]) -> Curves:
    """Return curves through the medians of a result of `bench_speed`."""
    points: dict[str, dict[int, dict[int, float]]] = {}
    for row in result["rows"]:
        by_batch = points.setdefault(row["variant"], {}).setdefault(row["context"], {})
        by_batch[row["batch"]] = row["tpot_ms"] / 1000
    if not points:
        raise QsunError("curves have no rows; run qsun bench speed again")
    grids = {variant: StepGrid(by_context) for variant, by_context in points.items()}
    prompts = {row["context"]: row["prefill_ms"] / 1000 for row in result["rows"]}
    prompts |= {row["tokens"]: row["ms"] / 1000 for row in result.get("prefill", [])}
    smallest = {
        row["variant"]: Footprint(row["weight_bytes"], row["kv_bytes"] / row["batch"] / row["context"])
        for row in sorted(result["rows"], key=lambda row: -row["batch"])
    }

    def step(variant: str, batch: int, context: float) -> float:
        if variant not in grids:
            raise QsunError(f"variant {variant!r} was not measured; the curves have {', '.join(grids)}")
        return grids[variant].at(batch, context)

    return Curves(
        step,
        prompt_line(prompts),
        f"{result['model']}, measured on {result['machine']}",
        {variant: grid.largest for variant, grid in grids.items()},
        smallest,
    )


class StepGrid:
    """Seconds of a step at measured batches and contexts; `largest` of both. Contexts may lack the large batches."""

    def __init__(self, by_context: Mapping[int, Mapping[int, float]]):
        self._contexts = sorted(by_context)
        self._batches = [sorted(by_context[context]) for context in self._contexts]
        self._seconds = [[by_context[c][b] for b in sorted(by_context[c])] for c in self._contexts]
        self.largest = (min(batches[-1] for batches in self._batches), float(self._contexts[-1]))

    def at(self, batch: int, context: float) -> float:
        """Interpolate in the batch at the two neighbouring contexts, then in the context."""
        if len(self._contexts) == 1:
            return _line(self._batches[0], self._seconds[0], batch)
        upper = min(max(bisect_right(self._contexts, context), 1), len(self._contexts) - 1)
        pair = [_line(self._batches[i], self._seconds[i], batch) for i in (upper - 1, upper)]
        return _line(self._contexts[upper - 1 : upper + 1], pair, context)


def _line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Interpolate linearly; constant below the first point, never falling above the last."""
    if x <= xs[0] or len(xs) == 1:
        return ys[0]
    upper = min(bisect_right(xs, x), len(xs) - 1)
    slope = (ys[upper] - ys[upper - 1]) / (xs[upper] - xs[upper - 1])
    if x > xs[-1]:
        slope = max(0.0, slope)
        return ys[-1] + slope * (x - xs[-1])
    return ys[upper - 1] + slope * (x - xs[upper - 1])


def prompt_line(points: Mapping[int, float]) -> Callable[[int], float]:
    """Return a line through measured prefill times; with one point, proportional to the tokens."""
    tokens = sorted(points)
    seconds = [points[n] for n in tokens]
    if len(tokens) == 1:
        return lambda n: seconds[0] * n / tokens[0]
    slope = max(0.0, (seconds[1] - seconds[0]) / (tokens[1] - tokens[0]))
    at_none = max(0.0, seconds[0] - slope * tokens[0])
    xs, ys = [0, *tokens], [at_none, *seconds]
    return lambda n: _line(xs, ys, n)


def computed_curves(name: str) -> Curves:
    """Return lower bounds for an H200 from bytes and operations. They are NOT measured; no kernel reaches them.

    A step reads every weight and all keys and values once at copy bandwidth; a prefill takes the longer of that and its
    operations at peak. Blocks are in bf16 or int4 (group 128), the head in bf16.
    """
    shape = known_shape(name)
    blocks, head = _weights(shape)
    kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    weight_bytes = {SUN: 2 * (blocks + head), QSUN: _INT4_BYTES * blocks + 2 * head}
    attention = 2 * 2 * shape.layers * shape.heads * shape.head_dim  # operations for one token on one earlier token

    def step(variant: str, batch: int, context: float) -> float:
        if variant not in weight_bytes:
            raise QsunError(f"variant {variant!r} is not computed; use {' or '.join(weight_bytes)}")
        return (weight_bytes[variant] + batch * context * kv_bytes) / _COPY_BYTES_PER_S

    def prefill(tokens: int) -> float:
        operations = 2.0 * blocks * tokens + attention * tokens * tokens / 2
        return max(2 * blocks / _COPY_BYTES_PER_S, operations / _BF16_FLOPS)

    footprints = {variant: Footprint(size, kv_bytes) for variant, size in weight_bytes.items()}
    return Curves(step, prefill, f"{name} on an H200, COMPUTED floors, not measured", {}, footprints)


def _weights(shape: ModelShape) -> tuple[int, int]:
    """Return the number of weights of all blocks, and of the head."""
    return shape.layers * sum(N * K for N, K in shape.linear_layers().values()), shape.vocab * shape.hidden
