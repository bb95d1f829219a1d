"""The report of a run, report.json, and its picture of the error of each layer."""

from pathlib import Path
from typing import Any

from qsun.figure import new_figure, save_figure
from qsun.model.architectures import BLOCKS
from qsun.model.manifest import write_json


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write report.json and errors.png beside the module."""
    write_json(directory / "report.json", report)
    if report["layers"]:
        plot_errors(report, directory / "errors.png")


def plot_errors(report: dict[str, Any], path: Path) -> None:
    """Plot the relative output error of each layer over its block, one line for each kind of layer."""
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, list[tuple[int, float]]] = {}
    for layer in report["layers"]:
        block, _, name = layer["name"].removeprefix(BLOCKS).partition(".")
        place = int(block) if block.isdigit() else len(report["block_errors"])
        kinds.setdefault(name.rpartition(".")[2] or block, []).append((place, layer["error"]))
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for kind, points in kinds.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.2, label=kind)
    whole = [(index, error) for index, error in enumerate(report["block_errors"]) if error is not None]
    if whole:
        axes.plot(*zip(*whole, strict=True), color="black", linestyle="--", linewidth=1.2, label="hidden states")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder block")
    axes.set_ylabel("relative squared error of the output")
    config = report["config"]
    kind = "sym" if config["sym"] else "asym"
    axes.set_title(
        f"{report['base']}: {config['method']}, {config['bits']} bits {kind}, group {config['group_size']}"
        f" ({report['bits_per_weight']:.2f} bits a weight)"
    )
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    save_figure(figure, path)
