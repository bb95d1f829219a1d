"""Tables and pictures of `qsun simulate`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qsun.eval.output.table import Table
from qsun.eval.simulate.compared_systems import CONVENTIONAL, KINDS
from qsun.eval.simulate.curves import QSUN, SUN
from qsun.eval.simulate.sweep import where_ratio
from qsun.figure import new_figure, tidy

_STYLES: dict[str, dict[str, Any]] = {
    kind: {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.8, "label": label}
    for kind, color, marker, label in (
        (CONVENTIONAL, "#52606d", "s", "conventional"),
        (SUN, "#f0883e", "o", "SUN, bf16"),
        (QSUN, "#1f6feb", "D", "QSUN, int4"),
    )
}
_DOUBLE = 2.0
_WORKER_COLUMNS = {"tokens/s": "{steady_tokens_per_s:.1f}", "a worker": "{tokens_per_s_per_decode_worker:.1f}"}
_POINT_COLUMNS = (
    {"skew": "{skew:.4g}", "rate": "{rate:.4g}", "system": "{system}", "workers": "{decode_workers}"}
    | _WORKER_COLUMNS
    | {"TTFT p50": "{ttft_ms[p50]:.1f}", "TTFT p99": "{ttft_ms[p99]:.1f}"}
    | {"TPOT p50": "{tpot_ms[p50]:.2f}", "TPOT p99": "{tpot_ms[p99]:.2f}"}
    | {"goodput": "{goodput:.1%}", "busy": "{utilisation:.0%}", "batch": "{mean_batch:.1f}"}
)
_CAPACITY_COLUMNS = (
    {"skew": "{skew:g}", "system": "{system}", "rate": "{rate:.4g}"}
    | _WORKER_COLUMNS
    | {"TPOT ms": "{tpot_ms[mean]:.2f}", "TPOT p99": "{tpot_ms[p99]:.2f}", "busy": "{utilisation:.0%}"}
    | {"x conv.": "{ratio:.2f}", "same TPOT": "{ratio_same_tpot:.2f}", "needs": "{workers_needed:d}"}
)


def report_text(result: Mapping[str, Any]) -> str:
    """Return lines for a terminal."""
    rows = result["rows"]
    lines = _capacity_lines(rows) if "needed_rate" in rows[0] else [Table.of(rows, _POINT_COLUMNS).text()]
    return "\n".join([result["setting"], f"steps: {result['curves']}", *lines])


def report_figure(result: Mapping[str, Any]) -> Any:
    """Draw the picture that goes with the table."""
    figure = (_capacity_figure if "needed_rate" in result["rows"][0] else _points_figure)(result)
    figure.suptitle(f"{result['setting']}\nsteps: {result['curves']}", fontsize=9)
    return figure


def _capacity_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each system's capacity at each skew, and where the ratios reach 2."""
    served = [row for row in rows if row["rate"]]
    lines = [Table.of(served, _CAPACITY_COLUMNS).text()]
    for row in rows:
        if not row["rate"]:
            needs = f" with these workers; it needs {row['workers_needed']}" if row["workers_needed"] else ""
            why = f": {row['misfit']}" if row["misfit"] else ""
            lines.append(f"{row['system']} at skew {row['skew']:g} meets the SLO at no rate{needs}{why}")
    lines.append(f"needs: fewest decode workers that serve {rows[0]['needed_rate']:.4g} requests/s within the SLO")
    return lines + [_where(rows, kind) for kind in (SUN, QSUN)]


def _where(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    skew = where_ratio(rows, kind, _DOUBLE)
    known = [row for row in rows if row["system"] == kind and row["ratio_same_tpot"] is not None]
    if skew is not None:
        return f"{kind}: {_DOUBLE:.1f}x conventional with mean TPOT within 5% from skew {skew:.2f}"
    if not known:
        return f"{kind}: no ratio, because a system meets the SLO, or this one the conventional TPOT, at no rate"
    best = max(known, key=lambda row: row["ratio_same_tpot"])
    return f"{kind}: never {_DOUBLE:.1f}x here; at most {best['ratio_same_tpot']:.2f}x, at skew {best['skew']:g}"


def _capacity_figure(result: Mapping[str, Any]) -> Any:
    """Draw throughput of a decode worker, its ratio to the conventional system, and workers needed, by skew."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in result["rows"] if row["rate"]]
    figure = new_figure(12, 4.0)
    throughput, ratio, needed = figure.subplots(1, 3)
    for kind, style in _STYLES.items():
        mine = [row for row in rows if row["system"] == kind]
        skews = [row["skew"] for row in mine]
        throughput.plot(skews, [row["tokens_per_s_per_decode_worker"] for row in mine], **style)
        needed.plot(skews, _numbers(mine, "workers_needed"), **style)
        if kind != CONVENTIONAL:
            for key, look in (("ratio_same_tpot", style), ("ratio", _dotted(kind))):
                ratio.plot(skews, _numbers(mine, key), **look)
    ratio.axhline(1.0, color=_STYLES[CONVENTIONAL]["color"], linewidth=1)
    ratio.axhline(_DOUBLE, color="0.6", linewidth=1, linestyle="--")
    throughput.set_title("tokens/s of a decode worker at capacity", fontsize=10)
    ratio.set_title("over conventional, TPOT within 5%\n(dotted: any TPOT within the SLO)", fontsize=10)
    needed.set_title(f"decode workers needed for {result['rows'][0]['needed_rate']:.3g} requests/s", fontsize=10)
    needed.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (throughput, ratio, needed):
        axes.set_xlabel("Zipf skew over models (0: uniform)")
    tidy(throughput, ratio, needed)
    throughput.legend(fontsize=9)
    return figure


def _points_figure(result: Mapping[str, Any]) -> Any:
    """Draw throughput, TPOT, TTFT and goodput by rate, for the first skew."""
    rows = [row for row in result["rows"] if row["skew"] == result["rows"][0]["skew"]]
    figure = new_figure(13, 3.8)
    throughput, tpot, ttft, goodput = panels = figure.subplots(1, 4)
    for kind in KINDS:
        mine = [row for row in rows if row["system"] == kind]
        rates, style = [row["rate"] or 0.0 for row in mine], _STYLES[kind]
        throughput.plot(rates, [row["tokens_per_s_per_decode_worker"] for row in mine], **style)
        goodput.plot(rates, [100 * row["goodput"] for row in mine], **style)
        for axes, key in ((tpot, "tpot_ms"), (ttft, "ttft_ms")):
            shown = [(rate, row[key]) for rate, row in zip(rates, mine, strict=True) if row[key]]
            axes.plot([rate for rate, _ in shown], [found["p50"] for _, found in shown], **style)
            axes.plot([rate for rate, _ in shown], [found["p99"] for _, found in shown], **_dotted(kind))
    ttft.set_yscale("log")
    titles = ("tokens/s of a decode worker", "TPOT, ms (dotted: p99)", "TTFT, ms (dotted: p99)", "% within the SLO")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("requests/s")
    tidy(throughput, tpot, goodput)
    tidy(ttft, from_zero=False)
    throughput.legend(fontsize=9)
    return figure


def _numbers(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return a column of the rows, with gaps where there is no value."""
    return [math.nan if row[key] is None else row[key] for row in rows]


def _dotted(kind: str) -> dict[str, Any]:
    return {"color": _STYLES[kind]["color"], "linestyle": ":", "linewidth": 1.2}
