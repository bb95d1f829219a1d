"""Seconds of a tuning step: a prefill module against the full fine-tune, in turns on the same batches."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch

from qsun.model.output_dir import Workdir
from qsun.tuning.config import TuneConfig
from qsun.tuning.job import prepare_tuning
from qsun.tuning.processes import Processes
from qsun.tuning.tuner import Tuner

_BASELINES: dict[str, Literal["none", "full"]] = {"sun": "none", "full": "full"}


def compare_tuning(
    decode: str,
    data: Path,
    steps: int = 30,
    batch_size: int = 32,
    device: str | None = None,
) -> dict[str, Any]:
    """Time forward, backward and optimizer step of both, in turns.

    Args:
        decode: decode module; a quantized one is compared with the full fine-tune of its base.
    Returns:
        {"sun", "full": median seconds of a step, "ratio": SUN over full fine-tune, the median of the pairs, "steps"}.
    """
    with tempfile.TemporaryDirectory() as folder:
        tuners = {
            how: _tuner(
                decode,
                Path(folder) / how,
                data,
                TuneConfig(steps=steps + 2, batch_size=batch_size, baseline=baseline),
                device,
            )
            for how, baseline in _BASELINES.items()
        }
        taken: dict[str, list[float]] = {how: [] for how in tuners}
        for _ in range(steps + 2):
            for how, tuner in tuners.items():
                started = time.perf_counter()
                tuner.train_step()
                _finish(tuner.processes.device)
                taken[how].append(time.perf_counter() - started)
    sun, full = (taken[how][2:] for how in ("sun", "full"))  # the first steps allocate what the others reuse
    ratio = statistics.median(a / b for a, b in zip(sun, full, strict=True))
    return {"sun": statistics.median(sun), "full": statistics.median(full), "ratio": ratio, "steps": steps}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tuner(decode: str, out: Path, data: Path, config: TuneConfig, device: str | None) -> Tuner:
    job = prepare_tuning(decode, out, data, config, device=device)
    return Tuner(job, Workdir(job.out, job.settings(), resume=False, lock=False), Processes.launched(job.device))
