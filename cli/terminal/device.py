"""The --device and --threads options."""

from typing import TYPE_CHECKING

from qsun.device import default_device
from qsun.errors import QsunError

if TYPE_CHECKING:
    import torch


def check_device(device: str | None) -> None:
    """Raise QsunError for a device that is unknown or not present."""
    if device is None:
        return
    import torch

    kind, index = (wanted := default_device(device)).type, wanted.index or 0
    if kind not in ("cpu", "cuda"):
        raise QsunError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise QsunError(f"device {device!r}: there is no CUDA device; use --device cpu")
    if kind == "cuda" and index >= (count := torch.cuda.device_count()):
        last = f" to cuda:{count - 1}" if count > 1 else ""
        raise QsunError(f"device {device!r} is out of range; CUDA devices found: {count}; use cuda:0{last}")


def use_device(device: str | None, threads: int = 0) -> "torch.device":
    """Return the device to compute on, and take so many CPU threads; 0: as torch chooses. Raises as `check_device`."""
    check_device(device or None)
    import torch

    if threads:
        torch.set_num_threads(threads)
    return default_device(device)
