"""The --device option."""

from qsun.device import default_device
from qsun.errors import QsunError


def check_device(device: str | None) -> None:
    """Raise QsunError for a device that is unknown or not present."""
    if device is None:
        return
    import torch

    kind = default_device(device).type
    if kind not in ("cpu", "cuda"):
        raise QsunError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise QsunError(f"device {device!r}: there is no CUDA device; use --device cpu")
