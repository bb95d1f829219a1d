"""Memory: this process's peak, what the machine has left, and giving freed pages back."""

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun.errors import OutOfMemory

if TYPE_CHECKING:
    import torch

_TRIM_EVERY = 16


def human_bytes(count: float) -> str:
    """Return a number of bytes with three digits and a unit: 1.21 GB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


@contextmanager
def clear_out_of_memory(
    needed_bytes: int | None = None,
    instead: str = "fewer --samples, or a shorter --seq-len",
    gpu_bytes: int | None = None,
) -> Iterator[None]:
    """Turn every library's way to say that memory ran out into OutOfMemory.

    needed_bytes, gpu_bytes: as estimated before, of RAM and on a GPU. instead: what needs less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises a RuntimeError, on a GPU its OutOfMemoryError
        if not isinstance(error, MemoryError) and not re.search(
            "out of memory|can't allocate memory|ALLOC_FAILED", str(error)
        ):
            raise
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        estimate = gpu_bytes if type(error).__name__ == "OutOfMemoryError" else needed_bytes
        needed = "" if estimate is None else f", about {human_bytes(estimate)} are needed in all"
        raise OutOfMemory(
            f"memory ran out{f' asking for {asked[1]} more' if asked else ''}{needed}; use a machine with more, or "
            f"{instead}"
        ) from None


def peak_rss_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    try:
        # Not psutil, which has no peak on Linux, nor getrusage: its maximum goes over fork and exec to a child.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(device: "torch.device | None" = None) -> int:
    """Return what is free on a GPU, or what the machine can give without swapping, within this cgroup."""
    if device is not None and device.type == "cuda":
        import torch  # takes seconds, and the rest of this module does without

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    machine: int = psutil.virtual_memory().available
    return min(machine, cgroup_available_bytes() or machine)


def cgroup_available_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a container's limit leaves (cgroup v2), counting cached files as free; None without a limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        files = sum(int(stat.get(name, 0)) for name in ("inactive_file", "active_file"))
        return None if limit == "max" else max(1, int(limit) - used + files)
    except (OSError, ValueError):
        return None


def release_sometimes(count: int) -> None:
    """`release_freed` at every 16th step: batches of many shapes leave holes in the heap, which grow for hundreds."""
    if count % _TRIM_EVERY == 0:
        release_freed()


def release_freed() -> None:
    """Return freed heap to the system: glibc keeps it, in pieces that a later block's larger tensors may not fit."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library, such as musl
        return None
