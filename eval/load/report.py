"""Results of a load: rates, latencies, goodput and errors, as numbers, text and a picture."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsun.eval.load.client import NOT_SENT, Record
from qsun.eval.load.percentiles import spread
from qsun.eval.load.service_level import ServiceLevel
from qsun.eval.output.table import Table
from qsun.figure import new_figure, tidy

_TIMES = {
    "ttft_ms": "TTFT from due time",
    "ttft_from_send_ms": "TTFT from send",
    "tpot_ms": "TPOT",
    "e2e_ms": "end to end",
    "lag_ms": "sent late by",
}
_TIME_COLUMNS = {"ms": "{label}"} | {point: f"{{{point}:.2f}}" for point in ("mean", "p50", "p90", "p99")}
_MODEL_COLUMNS = {
    "model": "{model}",
    "requests": "{requests}",
    "complete": "{complete}",
    "tokens/s": "{tokens_per_s:.1f}",
    "TTFT p50": "{ttft_ms[p50]:.2f}",
    "TPOT p50": "{tpot_ms[p50]:.2f}",
    "goodput": "{goodput:.1%}",
}
_BINS = 60


def load_summary(rounds: Sequence[Sequence[Record]], level: ServiceLevel, decode_workers: int) -> dict[str, Any]:
    """Summarize one server's records after the warm-up, overall and by model, all rounds together.

    Rates are over `seconds`: from the first measured arrival to the end of the last complete answer, or to the last
    arrival if that is later; waiting for a request that fails does not count. `steady_tokens_per_s` is over the time
    from the first to the last arrival, with an answer's tokens spread evenly over its time.
    """
    counted = [[record for record in records if not record.warm_up] for records in rounds]
    spans = [(records[0].arrival, records[-1].arrival) for records in counted]
    ends = [max(record.arrival if record.error else record.ended or record.arrival for record in r) for r in counted]
    seconds = max(math.fsum(end - begin for end, (begin, _) in zip(ends, spans, strict=True)), 1e-9)
    measured = [record for records in counted for record in records]
    found = _of(measured, level, seconds)
    inside = math.fsum(_tokens(records, *span) for records, span in zip(rounds, spans, strict=True))
    sending = math.fsum(last - first for first, last in spans)
    found["steady_tokens_per_s"] = inside / sending if sending > 0 else None
    found["tokens_per_s_per_decode_worker"] = found["tokens_per_s"] / decode_workers
    found["decode_workers"] = decode_workers
    models = sorted({record.model for record in measured})
    found["models"] = {m: _of([r for r in measured if r.model == m], level, seconds) for m in models}
    return found


def _of(records: Sequence[Record], level: ServiceLevel, seconds: float) -> dict[str, Any]:
    complete = [record for record in records if not record.error]
    kept = level.count((r.ttft_ms, r.tpot_ms) for r in complete if r.ttft_ms is not None)
    tokens = sum(record.output_tokens for record in complete)
    found: dict[str, Any] = {
        "requests": len(records),
        "complete": len(complete),
        "not_sent": sum(record.error == NOT_SENT for record in records),
        "errors": dict(Counter(record.error for record in records if record.error)),
        "seconds": seconds,
        "requests_per_s": len(complete) / seconds,
        "output_tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in complete),
        "goodput": kept / len(records),
        "goodput_requests_per_s": kept / seconds,
    }
    for name in _TIMES:
        source = records if name == "lag_ms" else complete
        found[name] = spread([value for record in source if (value := getattr(record, name)) is not None])
    return found


def _tokens(records: Sequence[Record], begin: float, end: float) -> float:
    """Return the tokens of complete answers from `begin` to `end`."""
    total = 0.0
    for record in records:
        if record.error or record.first is None or record.last is None:
            continue
        if record.last <= record.first:
            total += record.output_tokens * (begin <= record.first < end)
        else:
            inside = max(0.0, min(record.last, end) - max(record.first, begin))
            total += record.output_tokens * inside / (record.last - record.first)
    return total


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float | None]:
    """Divide one server's summary by the other's; None where a value is missing. For times, below 1 is better."""
    pairs: dict[str, tuple[float | None, float | None]] = {
        "tokens_per_s": (ours["tokens_per_s"], theirs["tokens_per_s"]),
        "goodput": (ours["goodput"], theirs["goodput"]),
    }
    for name in ("ttft_ms", "tpot_ms"):
        for point in ("p50", "p99"):
            mine, other = ((side[name] or {}).get(point) for side in (ours, theirs))
            pairs[f"{name}_{point}"] = (mine, other)
    return {name: mine / other if mine is not None and other else None for name, (mine, other) in pairs.items()}


def geometric_means(rounds: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Average each ratio over the rounds that have it; a round in which everything failed makes the mean 0."""
    found: dict[str, float | None] = {}
    for name in rounds[0]:
        values = [value for one in rounds if (value := one[name]) is not None]
        if not values or 0 in values:
            found[name] = 0.0 if values else None
        else:
            found[name] = math.exp(math.fsum(map(math.log, values)) / len(values))
    return found


def load_text(summary: Mapping[str, Any], level: ServiceLevel) -> str:
    """Return lines for a terminal."""
    lines = [
        f"{summary['complete']} of {summary['requests']} requests complete in {summary['seconds']:.1f} s, "
        f"{summary['not_sent']} not sent",
        f"{summary['requests_per_s']:.2f} requests/s, {summary['tokens_per_s']:.1f} output tokens/s, "
        f"{summary['tokens_per_s_per_decode_worker']:.1f} for each of {summary['decode_workers']} decode workers",
        f"goodput {summary['goodput']:.1%}, {summary['goodput_requests_per_s']:.2f} requests/s "
        f"(TTFT <= {level.ttft_ms:g} ms, TPOT <= {level.tpot_ms:g} ms)",
    ]
    times = [summary[name] | {"label": label} for name, label in _TIMES.items() if summary[name]]
    models = [row | {"model": model} for model, row in summary["models"].items()]
    lines += [Table.of(times, _TIME_COLUMNS).text(), Table.of(models, _MODEL_COLUMNS).text()]
    lines += [f"error: {kind}: {count}" for kind, count in sorted(summary["errors"].items())]
    return "\n".join(lines)


def write_records(records: Sequence[Record], path: Path) -> None:
    """Write one line a request, as `qsun simulate --trace` reads them."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            times = {name: getattr(record, name) for name in _TIMES}
            file.write(json.dumps(vars(record) | times) + "\n")


def load_figure(named: Mapping[str, Sequence[Record]], title: str) -> Any:
    """Draw the distributions of TTFT and TPOT, and tokens/s over time; one colour a server."""
    figure = new_figure(12, 3.8)
    ttft, tpot, over_time = figure.subplots(1, 3)
    for number, (name, records) in enumerate(named.items()):
        complete = [record for record in records if not record.error and not record.warm_up]
        style = {"color": ("#1f6feb", "#f0883e")[number % 2], "linewidth": 1.6, "label": name}
        for axes, key in ((ttft, "ttft_ms"), (tpot, "tpot_ms")):
            values = sorted(value for record in complete if (value := getattr(record, key)) is not None)
            if values:
                axes.step(values, [100 * (i + 1) / len(values) for i in range(len(values))], where="post", **style)
        end = max((record.last or 0.0 for record in records), default=0.0)
        if end > 0:
            width = end / _BINS
            edges = [i * width for i in range(_BINS)]
            rates = [_tokens(records, edge, edge + width) / width for edge in edges]
            over_time.step(edges, rates, where="post", **style)
    for axes, label in ((ttft, "TTFT from due time, ms"), (tpot, "TPOT, ms")):
        axes.set_xlabel(label)
        axes.set_ylabel("% of requests")
        axes.set_ylim(0, 100)
    over_time.set_xlabel("seconds from the start")
    over_time.set_ylabel("output tokens/s")
    tidy(ttft, tpot, over_time)
    if len(named) > 1:
        ttft.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
