"""Memory: this process's peak, what the machine has left, and giving freed pages back."""

import ctypes
import os
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:
        # Not getrusage: Linux carries its maximum over fork and exec, so a child would report its parent's peak.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Memory that can be taken without swapping, as Linux estimates it; elsewhere the free pages."""
    try:
        found = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(found.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        name = "SC_AVPHYS_PAGES"
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") if name in os.sysconf_names else 4 << 30


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
