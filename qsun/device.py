"""Where a computation runs and in which dtype, when the user does not say."""

from typing import TYPE_CHECKING

from qsun.config import DTYPES, check_one_of
from qsun.errors import QsunError

if TYPE_CHECKING:
    import torch


def default_device(device: "str | torch.device | None" = None) -> "torch.device":
    """Return the named device; by default a GPU if available, else the CPU. Raises QsunError for an unknown name."""
    import torch  # takes seconds, and `qsun --help` needs none of it

    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise QsunError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from None


def named_dtype(name: str) -> "torch.dtype":
    """Return the dtype of this name, one that activations can have. Raises QsunError for any other name."""
    import torch

    check_one_of("dtype", name, DTYPES[1:])
    found: torch.dtype = getattr(torch, name)
    return found


def compute_dtype(name: str, device: "torch.device", stored: "torch.dtype | None") -> "torch.dtype":
    """Return the dtype of this name; "auto" is float32 on a CPU and what is stored on a GPU."""
    import torch

    if name != "auto":
        return named_dtype(name)
    return torch.float32 if device.type == "cpu" or stored is None else stored


def load_dtype(name: str, device: "torch.device") -> "torch.dtype | None":
    """Return the dtype to load a module in; None is the stored one, "auto" on a GPU."""
    return None if name == "auto" and device.type != "cpu" else compute_dtype(name, device, None)
