"""What `qsun bench speed` shows of its rows: a table and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsun.eval.speed.contenders import QSUN, QSUN_HEAD, SUN

_LABELS = {SUN: "SUN, bf16", QSUN: "QSUN, head bf16", QSUN_HEAD: "QSUN, head quantized"}
_STYLES: dict[str, dict[str, Any]] = {SUN: {"color": "black"}, QSUN: {"color": "C0"}, QSUN_HEAD: {"color": "C1"}}


def table(result: dict[str, Any]) -> str:
    """Lines for a terminal: one row a variant and point."""
    lines = [
        f"{result['model']} on {result['machine']}, torch {result['torch']}, copy {result['copy_gb_per_s']:.1f} GB/s",
        f"{'variant':<11}{'lm_head':<8}{'batch':>6}{'context':>8}{'TTFT ms':>10}{'TPOT ms':>9}{'p95 ms':>9}"
        f"{'tokens/s':>10}{'x SUN':>7}{'weights GB':>11}{'KV GB':>7}{'floor ms':>9}{'% copy':>7}{'steps':>6}",
    ]
    lines += [
        f"{row['variant']:<11}{row['lm_head']:<8}{row['batch']:>6}{row['context']:>8}{row['ttft_ms']:>10.1f}"
        f"{row['tpot_ms']:>9.2f}{row['tpot_p95_ms']:>9.2f}{row['tokens_per_s']:>10.1f}{row['ratio_to_sun']:>7.2f}"
        f"{row['weight_bytes'] / 1e9:>11.3f}{row['kv_bytes'] / 1e9:>7.3f}{row['floor_ms']:>9.2f}"
        f"{row['bandwidth_percent']:>7.1f}{row['steps']:>6}"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def plot_speed(result: dict[str, Any], path: Path) -> None:
    """Save `speed_figure`."""
    speed_figure(result).savefig(path, dpi=130, metadata={"Software": None})


def speed_figure(result: Mapping[str, Any]) -> Any:
    """TPOT against batch (upper row) and times as fast as SUN (lower), measured and by bytes; a panel per context."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    contexts = sorted({row["context"] for row in rows})
    figure = Figure(figsize=(1.5 + 3.6 * len(contexts), 6.5), layout="constrained")
    panels = figure.subplots(2, len(contexts), squeeze=False, sharex=True)
    for column, context in enumerate(contexts):
        above, below = panels[0][column], panels[1][column]
        here = [row for row in rows if row["context"] == context]
        floors = {row["batch"]: row["floor_ms"] for row in here if row["variant"] == SUN}
        for variant in dict.fromkeys(row["variant"] for row in here):
            mine = [row for row in here if row["variant"] == variant]
            _lines(above, below, mine, floors)
        above.set_title(f"context {context}")
        below.set_xscale("log", base=2)
        below.set_xticks(list(floors), [str(batch) for batch in floors])
        below.set_xlabel("batch")
        for axes in (above, below):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("TPOT, ms (median; bar to p95)")
    panels[1][0].set_ylabel("times as fast as SUN\n(dashed: by bytes)")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"{result['model']}, {result['machine']}", fontsize=10)
    return figure


def _lines(above: Any, below: Any, rows: list[dict[str, Any]], sun_floors: dict[int, float]) -> None:
    batches, medians = [row["batch"] for row in rows], [row["tpot_ms"] for row in rows]
    tails = [row["tpot_p95_ms"] - row["tpot_ms"] for row in rows]
    variant = rows[0]["variant"]
    style = _STYLES[variant]
    above.errorbar(
        batches,
        medians,
        [[0] * len(tails), tails],
        label=_LABELS[variant],
        marker="o",
        capsize=3,
        linewidth=1.6,
        **style,
    )
    below.plot(batches, [row["ratio_to_sun"] for row in rows], marker="o", linewidth=1.6, **style)
    below.plot(
        batches, [sun_floors[row["batch"]] / row["floor_ms"] for row in rows], linestyle="--", linewidth=1, **style
    )
