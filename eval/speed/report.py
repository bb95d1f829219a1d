"""Table and picture of `qsun bench speed`."""

from collections.abc import Mapping
from typing import Any

from qsun.eval.output.table import Table
from qsun.eval.speed.contenders import QSUN, QSUN_HEAD, SUN
from qsun.figure import new_figure, tidy

_STYLES: dict[str, dict[str, Any]] = {
    SUN: {"color": "black", "label": "SUN, bf16"},
    QSUN: {"color": "C0", "label": "QSUN, head bf16"},
    QSUN_HEAD: {"color": "C1", "label": "QSUN, head quantized"},
    **{f"{QSUN}-{bits}bit": {"color": f"C{bits}", "label": f"QSUN, {bits} bits"} for bits in (2, 3, 8)},
}
_COLUMNS = {
    **{name: f"{{{name}}}" for name in ("variant", "lm_head", "batch", "context")},
    "TTFT ms": "{ttft_ms:.1f}",
    "TPOT ms": "{tpot_ms:.2f}",
    "p95 ms": "{tpot_p95_ms:.2f}",
    "tokens/s": "{tokens_per_s:.1f}",
    "x SUN": "{ratio_to_sun:.2f}",
    "weights MB": "{weight_mb:.0f}",
    "KV MB": "{kv_mb:.0f}",
    "floor ms": "{floor_ms:.2f}",
    "% of copy": "{bandwidth_percent:.0f}",
}


def speed_table(result: Mapping[str, Any]) -> Table:
    """Return one row a variant and point."""
    sizes = ({"weight_mb": row["weight_bytes"] / 1e6, "kv_mb": row["kv_bytes"] / 1e6} for row in result["rows"])
    return Table.of([row | size for row, size in zip(result["rows"], sizes, strict=True)], _COLUMNS)


def report_text(result: Mapping[str, Any]) -> str:
    """Return lines for a terminal."""
    copy = f"copy {result['copy_gb_per_s']:.1f} GB/s"
    return f"{result['model']} on {result['machine']}, torch {result['torch']}, {copy}\n{speed_table(result).text()}"


def speed_figure(result: Mapping[str, Any]) -> Any:
    """Draw TPOT by batch (upper row) and the speed-up over SUN (lower), measured and by bytes; a panel a context."""
    rows = result["rows"]
    contexts = sorted({row["context"] for row in rows})
    figure = new_figure(1.5 + 3.6 * len(contexts), 6.5)
    panels = figure.subplots(2, len(contexts), squeeze=False, sharex=True)
    for column, context in enumerate(contexts):
        above, below = panels[0][column], panels[1][column]
        here = [row for row in rows if row["context"] == context]
        floors = {row["batch"]: row["floor_ms"] for row in here if row["variant"] == SUN}
        for variant in dict.fromkeys(row["variant"] for row in here):
            _draw([row for row in here if row["variant"] == variant], _STYLES[variant], above, below, floors)
        above.set_title(f"context {context}")
        below.set_xscale("log", base=2)
        below.set_xticks(list(floors), [str(batch) for batch in floors])
        below.set_xlabel("batch")
        tidy(above, below)
    panels[0][0].set_ylabel("TPOT, ms (median; bar to p95)")
    panels[1][0].set_ylabel("times as fast as SUN\n(dashed: by bytes)")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"{result['model']}, {result['machine']}", fontsize=10)
    return figure


def _draw(
    rows: list[Mapping[str, Any]], style: dict[str, Any], above: Any, below: Any, floors: Mapping[int, float]
) -> None:
    """Draw one variant; floors: SUN's by batch."""
    batches, medians = [row["batch"] for row in rows], [row["tpot_ms"] for row in rows]
    tails = [row["tpot_p95_ms"] - row["tpot_ms"] for row in rows]
    by_bytes = [floors[row["batch"]] / row["floor_ms"] for row in rows]
    above.errorbar(batches, medians, [[0] * len(tails), tails], marker="o", capsize=3, linewidth=1.6, **style)
    below.plot(batches, [row["ratio_to_sun"] for row in rows], marker="o", linewidth=1.6, color=style["color"])
    below.plot(batches, by_bytes, linestyle="--", linewidth=1, color=style["color"])
