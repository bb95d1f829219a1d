"""Where a computation runs and in which dtype, when the user does not say."""

from typing import TYPE_CHECKING

from qsun.config import DTYPES, check_one_of
from qsun.errors import QsunError

if TYPE_CHECKING:
    import torch

_WIDE = 512


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


def compute_dtype(name: str, device: "torch.device", stored: "torch.dtype | None", width: int = 0) -> "torch.dtype":
    """Return the dtype of this name. "auto" is what is stored on a GPU; on a CPU it is float32, but for wide bfloat16
    models where the CPU multiplies bfloat16.

    width: the model's hidden size. Narrow models gain nothing (docs/tuning.md).
    """
    import torch

    if name != "auto":
        return named_dtype(name)
    fast = device.type != "cpu" or (stored == torch.bfloat16 and width >= _WIDE and multiplies_bfloat16())
    return stored if fast and stored is not None else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_dtype(name: str, device: "torch.device") -> "torch.dtype | None":
    """Return the dtype to load a module in; None is the stored one, "auto" on a GPU."""
    return None if name == "auto" and device.type != "cpu" else compute_dtype(name, device, None)
