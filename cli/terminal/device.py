"""The --device option."""

from qsun.errors import QsunError


def check_device(device: str | None) -> None:
    """Raise QsunError for a device that is unknown or not present."""
    if device is None:
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise QsunError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise QsunError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise QsunError(f"device {device!r}: there is no CUDA device; use --device cpu")
