"""Pictures: one way to make them and one way to save them."""

from pathlib import Path
from typing import IO, Any


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure; sizes in inches."""
    from matplotlib.figure import Figure  # takes a second to import

    return Figure(figsize=(width, height), layout="constrained")


def tidy(*panels: Any, from_zero: bool = True) -> None:
    """Give axes a faint grid and no frame; `from_zero`: the y axis starts at 0."""
    for axes in panels:
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, target: Path | IO[bytes]) -> None:
    """Write a PNG that names no software version, so that equal numbers give equal bytes."""
    figure.savefig(target, format="png", dpi=130, metadata={"Software": None})
