"""The embedded default model, `demo`: a pretrained Llama small enough to ship in the wheel.

With it every command can be tried, tested and documented without a network or an accelerator. Importing this module
costs nothing: it only locates the packaged files, which `pretrain.py` made.
"""

from pathlib import Path

__all__ = ["base_directory", "calibration_file"]

_HERE = Path(__file__).resolve().parent


def base_directory() -> Path:
    """Return the packaged Hugging Face directory of the base model."""
    return _HERE / "base"


def calibration_file() -> Path:
    """Return the packaged calibration text: documents of the pretraining mixture, see `corpus.py`."""
    return _HERE / "calibration.txt"
