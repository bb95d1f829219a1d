"""The walk: quantize a model one decoder block at a time, straight from its files, in bounded memory.

    plan -> for each block: load, quantize, keep the packed tensors in OUT.partial -> join -> read back and check -> OUT

Nothing but hidden states is carried from block to block, so memory does not grow with depth. A killed run is continued
by recomputing the hidden states through the finished blocks, from the very tensors that were written.
"""

import errno
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qsun.config import QuantConfig
from qsun.errors import QsunError
from qsun.memory import peak_rss_bytes
from qsun.model.checkpoint import merge_shards
from qsun.model.output_dir import Workdir
from qsun.progress import Progress
from qsun.quantization.block_walk import Steps, Walk
from qsun.quantization.finish import read_back, write_module_files
from qsun.quantization.job import Job, prepare
from qsun.quantization.report import write_report

MAX_SHARD_BYTES = 4 << 30


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    calibration: str | Path | Iterable[str | Path] | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    progress: Progress = lambda *_: None,
    calibration_prefill: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """Quantize the decode module of a model; what `qsun quantize` does.

    Args:
        model: Hugging Face directory, hub id, or "demo".
        out: directory to make; it appears whole or not at all.
        config: default QuantConfig().
        calibration: one or more sources (calibration.py); default: the packaged text.
        device: default: a GPU where there is one.
        resume: continue an interrupted run with the same settings.
        progress: called with a label, steps done and steps in all.
        calibration_prefill: for each calibration source, the prefill module that reads its prompts; default: the base.
    Returns:
        The report, as in report.json: out, seconds, cpu_seconds, peak_rss_bytes, bits_per_weight, layers and more.
    Raises:
        QsunError: bad input, an impossible request, no space; one line that names the value and the fix.
    """
    return run(prepare(model, out, config, calibration, device, resume, calibration_prefill), resume, progress)


@torch.no_grad()
def run(job: Job, resume: bool = False, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Carry out a prepared job; see `quantize`."""
    started, started_cpu = time.perf_counter(), time.process_time()
    try:
        report = _run(job, resume, Steps(job, progress))
        report |= {
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(time.process_time() - started_cpu, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        work = report.pop("workdir")
        write_report(work.module, report)
        work.publish()
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise QsunError(
                f"no space left on the disk of {job.out}; finished blocks are kept: free some, and use --resume"
            ) from None
        raise
    return report


def _run(job: Job, resume: bool, steps: Steps) -> dict[str, Any]:
    fingerprint = job.checkpoint.fingerprint()
    calibration = None if job.calibration is None else job.calibration.fingerprint
    modules = [source.fingerprint() for source in job.prefill.modules]
    settings = {
        **job.config.to_dict(),
        "base": fingerprint,
        "calibration": calibration,
        "prefill_modules": modules,
        "compute_dtype": str(job.skeleton.dtype),
        "device": job.skeleton.device.type,
    }
    work = Workdir(job.out, settings, resume)
    steps.done("fingerprint")
    walk = Walk(job, work, steps)
    block_errors = walk.blocks()
    walk.rest()
    directory = work.fresh_module()
    names = [walk.part_name(i) for i in range(len(job.skeleton.layers))]
    merge_shards([work.part(name) for name in [*names, "rest"]], directory, MAX_SHARD_BYTES)
    records = [work.record(name) for name in [*names, "rest"]]
    layers = [layer for record in records for layer in record["layers"]]
    fingerprints = {"base": fingerprint, "calibration": calibration}
    summary = write_module_files(job, directory, layers, fingerprints, job.prefill.record(fingerprint, modules))
    read_back(job, directory, {layer: sha for r in records for layer, sha in r["digests"].items()}, walk.probe)
    steps.done("read back")
    return {"out": str(job.out), "workdir": work, **summary, "block_errors": block_errors, "plan": job.plan.to_dict()}
