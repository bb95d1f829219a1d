"""Seconds of a tuning step: a prefill module against the full fine-tune, in turns on the same batches."""

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qsun.data.jsonl import check_no_pipe
from qsun.eval.speed.clock import in_turns, seconds_of
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
    check_no_pipe(data, "training")  # both read it
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
        turns = {how: partial(seconds_of, t.train_step, t.processes.device) for how, t in tuners.items()}
        taken = in_turns(turns, steps, untimed=2)
    sun, full = taken["sun"], taken["full"]
    ratio = statistics.median(a / b for a, b in zip(sun, full, strict=True))
    return {"sun": statistics.median(sun), "full": statistics.median(full), "ratio": ratio, "steps": steps}


def _tuner(decode: str, out: Path, data: Path, config: TuneConfig, device: str | None) -> Tuner:
    job = prepare_tuning(decode, out, data, config, device=device)
    return Tuner(job, Workdir(job.out, job.settings(), resume=False, lock=False), Processes.launched(job.device))
