"""Tables and pictures of `qsun simulate`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsun.eval.simulate.compared_systems import CONVENTIONAL, KINDS
from qsun.eval.simulate.curves import QSUN, SUN
from qsun.eval.simulate.sweep import where_ratio

Row = Mapping[str, Any]
_LABELS = {CONVENTIONAL: "conventional", SUN: "SUN, bf16", QSUN: "QSUN, int4"}
_COLOURS = {CONVENTIONAL: "#52606d", SUN: "#f0883e", QSUN: "#1f6feb"}
_MARKERS = {CONVENTIONAL: "s", SUN: "o", QSUN: "D"}
_DOUBLE = 2.0


def table(result: Mapping[str, Any]) -> str:
    """Lines for a terminal."""
    rows = result["rows"]
    lines = _capacity_table(rows) if "needed_rate" in rows[0] else _points_table(rows)
    return f"{result['setting']}\nsteps: {result['curves']}\n{lines}"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Save the picture that goes with the table."""
    (_plot_capacity if "needed_rate" in result["rows"][0] else _plot_points)(result, path)


def _points_table(rows: Sequence[Row]) -> str:
    """A line for each system at each rate and skew."""
    lines = [
        f"{'skew':>5}{'rate':>9} {'system':<13}{'workers':>8}{'tokens/s':>10}{'a worker':>10}"
        f"{'TTFT p50':>10}{'p99 ms':>10}{'TPOT p50':>10}{'p99 ms':>9}{'goodput':>9}{'busy':>6}{'batch':>7}"
    ]
    for row in rows:
        ttft, tpot = row["ttft_ms"], row["tpot_ms"] or {"p50": 0.0, "p99": 0.0}
        lines.append(
            f"{_number(row['skew']):>5}{_number(row['rate']):>9} {row['system']:<13}{row['decode_workers']:>8}"
            f"{row['steady_tokens_per_s']:>10.1f}{row['tokens_per_s_per_decode_worker']:>10.1f}{ttft['p50']:>10.1f}"
            f"{ttft['p99']:>10.1f}{tpot['p50']:>10.2f}{tpot['p99']:>9.2f}{row['goodput']:>9.1%}{row['utilisation']:>6.0%}"
            f"{row['mean_batch']:>7.1f}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "trace" if value is None else f"{value:.4g}"


def _capacity_table(rows: Sequence[Row]) -> str:
    """A line for each system at each skew, and where the ratios reach 2."""
    lines = [
        f"{'skew':>5} {'system':<13}{'rate':>9}{'tokens/s':>10}{'a worker':>10}{'TPOT ms':>9}{'p99 ms':>9}{'busy':>6}"
        f"{'x conv.':>9}{'same TPOT':>11}{'needs':>7}"
    ]
    for row in rows:
        if not row["rate"]:
            lines.append(f"{row['skew']:>5g} {row['system']:<13}  keeps the SLO at no rate")
            continue
        tpot = row["tpot_ms"] or {"mean": 0.0, "p99": 0.0}
        lines.append(
            f"{row['skew']:>5g} {row['system']:<13}{row['rate']:>9.4g}{row['steady_tokens_per_s']:>10.1f}"
            f"{row['tokens_per_s_per_decode_worker']:>10.1f}{tpot['mean']:>9.2f}{tpot['p99']:>9.2f}"
            f"{row['utilisation']:>6.0%}{_ratio(row['ratio']):>9}{_ratio(row['ratio_same_tpot']):>11}"
            f"{row['workers_needed']:>7}"
        )
    lines.append(f"needs: fewest decode workers that serve {rows[0]['needed_rate']:.4g} requests/s within the SLO")
    lines += [_where(rows, kind) for kind in (SUN, QSUN)]
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _where(rows: Sequence[Row], kind: str) -> str:
    skew = where_ratio(rows, kind, _DOUBLE)
    known = [row for row in rows if row["system"] == kind and row["ratio_same_tpot"] is not None]
    if skew is not None:
        return f"{kind}: {_DOUBLE:.1f}x conventional with mean TPOT within 5% from skew {skew:.2f}"
    if not known:
        return f"{kind}: no ratio, as a system keeps the SLO, or this one the conventional TPOT, at no rate"
    best = max(known, key=lambda row: row["ratio_same_tpot"])
    return f"{kind}: {_DOUBLE:.1f}x nowhere here; most is {best['ratio_same_tpot']:.2f}x at skew {best['skew']:g}"


def _plot_capacity(result: Mapping[str, Any], path: Path) -> None:
    """Throughput of a decode worker, its ratio to the conventional system, and workers needed, all against skew."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in result["rows"] if row["rate"]]
    figure = Figure(figsize=(12, 4.0), layout="constrained")
    throughput, ratio, needed = figure.subplots(1, 3)
    for kind in KINDS:
        mine = [row for row in rows if row["system"] == kind]
        style = _style(kind)
        skews = [row["skew"] for row in mine]
        throughput.plot(skews, [row["tokens_per_s_per_decode_worker"] for row in mine], **style)
        needed.plot(skews, [row["workers_needed"] for row in mine], **style)
        if kind != CONVENTIONAL:
            dotted = {"color": _COLOURS[kind], "linestyle": ":", "linewidth": 1.2}
            for key, look in (("ratio_same_tpot", style), ("ratio", dotted)):
                ratio.plot(skews, [math.nan if row[key] is None else row[key] for row in mine], **look)
    ratio.axhline(1.0, color=_COLOURS[CONVENTIONAL], linewidth=1)
    ratio.axhline(_DOUBLE, color="0.6", linewidth=1, linestyle="--")
    throughput.set_title("tokens/s of a decode worker at capacity", fontsize=10)
    ratio.set_title("over conventional, TPOT within 5%\n(dotted: any TPOT within the SLO)", fontsize=10)
    needed.set_title(f"decode workers needed for {result['rows'][0]['needed_rate']:.3g} requests/s", fontsize=10)
    needed.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (throughput, ratio, needed):
        axes.set_xlabel("Zipf skew over models (0: uniform)")
        _plain(axes)
    throughput.legend(fontsize=9)
    _save(figure, result, path)


def _plot_points(result: Mapping[str, Any], path: Path) -> None:
    """Throughput, TPOT, TTFT and goodput against the rate, for the first skew."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["skew"] == result["rows"][0]["skew"]]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    throughput, tpot, ttft, goodput = figure.subplots(1, 4)
    for kind in KINDS:
        mine = [row for row in rows if row["system"] == kind]
        rates, style = [row["rate"] or 0.0 for row in mine], _style(kind)
        throughput.plot(rates, [row["tokens_per_s_per_decode_worker"] for row in mine], **style)
        goodput.plot(rates, [100 * row["goodput"] for row in mine], **style)
        for axes, key in ((tpot, "tpot_ms"), (ttft, "ttft_ms")):
            shown = [(rate, row[key]) for rate, row in zip(rates, mine, strict=True) if row[key]]
            axes.plot([rate for rate, _ in shown], [found["p50"] for _, found in shown], **style)
            axes.plot(
                [r for r, _ in shown], [f["p99"] for _, f in shown], color=_COLOURS[kind], linestyle=":", linewidth=1.2
            )
    ttft.set_yscale("log")
    titles = ("tokens/s of a decode worker", "TPOT, ms (dotted: p99)", "TTFT, ms (dotted: p99)", "% within the SLO")
    for axes, title in zip((throughput, tpot, ttft, goodput), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("requests/s")
        _plain(axes, from_zero=axes is not ttft)
    throughput.legend(fontsize=9)
    _save(figure, result, path)


def _style(kind: str) -> dict[str, Any]:
    return {
        "color": _COLOURS[kind],
        "marker": _MARKERS[kind],
        "markersize": 5,
        "linewidth": 1.8,
        "label": _LABELS[kind],
    }


def _plain(axes: Any, from_zero: bool = True) -> None:
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, result: Mapping[str, Any], path: Path) -> None:
    figure.suptitle(f"{result['setting']}\nsteps: {result['curves']}", fontsize=9)
    figure.savefig(path, dpi=130, metadata={"Software": None})
