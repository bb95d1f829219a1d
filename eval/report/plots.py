"""The pictures of an evaluation, each as PNG bytes."""

import io
from collections.abc import Mapping
from typing import Any

from qsun.eval.report.summary import Report
from qsun.eval.speed.report import speed_figure
from qsun.figure import new_figure, save_figure, tidy

_COLORS = ["#9aa5b1", "#52606d", "#f0883e", "#2f81f7", "#1f6feb", "#8957e5", "#bf4b8a", "#3fb950", "#d29922", "#a40e26"]


def draw_plots(report: Report) -> dict[str, bytes]:
    """Return PNG bytes by name (accuracy, bits, speed), those that the report has numbers for."""
    made = {}
    if report["accuracy"]:
        made["accuracy"] = _accuracy(report)
        if len(set(report["bits"].values())) > 2:
            made["bits"] = _bits(report)
    if report.get("speed"):
        made["speed"] = _png(speed_figure(report["speed"]))
    return made


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    save_figure(figure, buffer)
    return buffer.getvalue()


def _accuracy(report: Report) -> bytes:
    tasks, names = list(report["accuracy"]), report["variants"]
    figure = new_figure(min(10.5, max(6.0, 0.32 * len(names) * len(tasks) + 2)), 4.2)
    axes = figure.subplots()
    width = 0.84 / len(names)
    for number, name in enumerate(names):
        shown = [
            (place, report["accuracy"][task][name])
            for place, task in enumerate(tasks)
            if name in report["accuracy"][task]
        ]
        at = [place + (number - (len(names) - 1) / 2) * width for place, _ in shown]
        axes.bar(
            at,
            [100 * cell["rate"] for _, cell in shown],
            width * 0.92,
            yerr=[196 * cell["stderr"] for _, cell in shown],
            color=_COLORS[number % len(_COLORS)],
            label=name,
            capsize=2,
            error_kw={"linewidth": 0.9},
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 105)
    axes.set_ylabel("%, with 95% intervals")
    tidy(axes)
    axes.legend(fontsize=8, ncols=min(4, len(names)), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    return _png(figure)


def _bits(report: Report) -> bytes:
    """Draw the last column of the accuracy table by bits, one line for variants that differ only in bits."""
    cells = report["accuracy"].get("mean") or next(iter(report["accuracy"].values()))
    lines: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for name, cell in cells.items():
        bits = report["bits"][name]
        if bits < 16:
            family = " ".join(word for word in name.split() if word != f"int{bits}")
            lines.setdefault(family, []).append((bits, cell))
    figure = new_figure(5.4, 3.8)
    axes = figure.subplots()
    for name, style in ((n, s) for n, s in zip(cells, ("-.", ":", "--", "-"), strict=False) if report["bits"][n] == 16):
        axes.axhline(100 * cells[name]["rate"], color="0.45", linewidth=1, linestyle=style, label=name)
    for number, (family, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        axes.errorbar(
            [bits for bits, _ in points],
            [100 * cell["rate"] for _, cell in points],
            [196 * cell["stderr"] for _, cell in points],
            marker="o",
            capsize=3,
            color=_COLORS[(number + 2) % len(_COLORS)],
            label=family,
        )
    axes.set_xticks(sorted({bits for points in lines.values() for bits, _ in points}))
    axes.set_xlabel("bits of a decode weight")
    axes.set_ylabel("%, mean of tasks")
    axes.set_ylim(0, 105)
    tidy(axes)
    axes.legend(fontsize=8)
    return _png(figure)
