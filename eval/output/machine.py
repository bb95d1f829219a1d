"""The machine that a measurement was made on."""

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe where `device` is, for a result: "machine" in one line, cores, operating system and torch."""
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
    }


def _processor() -> str:
    name = platform.processor() or "CPU"
    with suppress(OSError, IndexError):  # Python knows the model's name on no Linux
        name = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("model name\t: ")[1].partition("\n")[0]
    threads = torch.get_num_threads()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"
