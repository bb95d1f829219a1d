"""Quantize a model one decoder block at a time, straight from its files, in bounded memory.

    plan -> for each block: load, quantize, write its tensors to their places in OUT.partial -> read back, check -> OUT
                                                                 (with --polish: learn the scales of all blocks) ^

Nothing but hidden states is carried from block to block, so memory does not grow with depth. A killed run is continued
by recomputing the hidden states through the finished blocks, from the tensors that were written.
"""

import hashlib
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qsun.config import QuantConfig
from qsun.memory import clear_out_of_memory, peak_rss_bytes
from qsun.model.checkpoint import INDEX_FILE
from qsun.model.output_dir import Workdir
from qsun.progress import Progress
from qsun.quantization.blockwise import BlockwiseQuantizer, ProgressCounter
from qsun.quantization.finish import read_back, write_configuration, write_module_files
from qsun.quantization.job import Job, prepare
from qsun.quantization.polish import polish_scales
from qsun.quantization.report import write_report

log = logging.getLogger(__name__)


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
    return run_job(prepare(model, out, config, calibration, device, resume, calibration_prefill), resume, progress)


@torch.no_grad()
def run_job(job: Job, resume: bool = False, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Carry out a prepared job; see `quantize`."""
    started, started_cpu = time.perf_counter(), time.process_time()
    counter, inputs = ProgressCounter(job, progress), _fingerprints(job)
    needed = clear_out_of_memory(job.plan.peak_ram_bytes, gpu_bytes=job.plan.peak_vram_bytes)
    with Workdir(job.out, _settings(job, inputs), resume) as work, needed:
        counter.done("fingerprint")
        report = _quantize(job, work, counter, inputs) | {
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(time.process_time() - started_cpu, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        write_report(work.module, report)
        work.publish()
    if job.config.calibrated and not job.prefill.modules:
        log.warning(
            "calibrated without the prefill modules that will write its KV; your tasks' data and modules "
            "(--calib DATA --calib-prefill MODULE) keep more of their accuracy: docs/calibration.md"
        )
    return report


def _fingerprints(job: Job) -> dict[str, Any]:
    return {
        "base": job.checkpoint.fingerprint(),
        "calibration": None if job.calibration is None else job.calibration.fingerprint,
        "prefill_modules": [source.fingerprint() for source in job.prefill.modules],
    }


def _settings(job: Job, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return everything that decides the bytes: a resumed run must have the same."""
    skeleton, layout = job.skeleton, hashlib.sha256(b"".join(shard.header for shard in job.shards))
    machine: dict[str, Any] = {"compute_dtype": str(skeleton.dtype), "device": skeleton.device.type}
    scales = [source.scale for source in job.prefill.modules]  # of adapters, whose fingerprints do not know them
    machine |= {"layout": layout.hexdigest()} | ({"prefill_scales": scales} if any(scales) else {})
    return job.config.to_dict() | inputs | machine


def _quantize(job: Job, work: Workdir, counter: ProgressCounter, inputs: dict[str, Any]) -> dict[str, Any]:
    """Write the module's files and read them back. Returns what the report says of it."""
    quantizer = BlockwiseQuantizer(job, work, counter)
    quantizer.run()
    records = quantizer.records()
    directory = work.clear(keep=[*(shard.name for shard in job.shards), INDEX_FILE])
    layers = [layer for record in records for layer in record["layers"]]
    prefill = job.prefill.record(inputs["base"], inputs["prefill_modules"])
    digests, probe = {layer: sha for r in records for layer, sha in r["digests"].items()}, quantizer.probe
    del quantizer
    write_configuration(job, directory)
    learned: dict[str, Any] | None = None
    if job.config.polish:
        polished, learned = polish_scales(job, work, lambda steps: counter.done("polish", steps))
        digests, probe = digests | polished, None  # polish checks the module's divergence instead
    summary = write_module_files(job, directory, layers, inputs, prefill)
    read_back(job, directory, digests, probe)
    counter.done("read back")
    errors = [record["block_error"] for record in records[:-1]]
    return {"out": str(job.out), **summary, "block_errors": errors, "polish": learned, "plan": asdict(job.plan)}
