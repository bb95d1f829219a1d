"""Run a study: what is missing, stage by stage, in a few processes."""

import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from qsun.errors import QsunError
from qsun.eval.study.stages import STAGES, Work, check_tasks
from qsun.eval.study.study import Study
from qsun.model.checkpoint import file_sha256
from qsun.model.locate import find_model
from qsun.model.manifest import write_json
from qsun.model.pairing import weights_fingerprint
from qsun.progress import Progress


def run_study(study: Study, out: Path, processes: int = 2, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Do what is missing under `out` and return all scores.

    Returns:
        {"study": ..., "right": {seed: {task: {variant: "0110..."}}}}; one digit an example of the test set.
    Raises:
        QsunError: `out` holds another study, or a task or the base cannot be used.
    """
    check_tasks(study)
    _claim(study, out)
    stages = [[w for w in stage(study, out) if not w.result.exists()] for stage in STAGES]
    total, done = sum(map(len, stages)), 0
    progress("", 0, total)
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for stage in stages:  # each needs the results of the one before
            jobs = {pool.submit(_run, work, threads): work for work in stage}
            for job in as_completed(jobs):
                if job.exception() is not None:  # now, not after everything that waits
                    pool.shutdown(cancel_futures=True)
                job.result()
                done += 1
                progress(jobs[job].label, done, total)
    right = {
        str(seed): {t.name: json.loads(study.scores(out, seed, t.name).read_text()) for t in study.tasks_of(seed)}
        for seed in range(study.seeds)
    }
    return {"study": asdict(study), "right": right}


def _claim(study: Study, out: Path) -> None:
    """Write the settings to study.json, or compare them with those that it holds."""
    contents = {f"base {study.base}": weights_fingerprint(find_model(study.base))}
    files = [Path(name) for task in study.tasks for name in (task.train, task.valid, task.test) if name]
    contents |= {f"file {file}": file_sha256(file) for file in files if file.is_file()}
    settings, file = json.loads(json.dumps(asdict(study))) | {"contents": contents}, out / "study.json"
    if file.exists():
        before = json.loads(file.read_text())
        for name, value in settings.items():
            if before.get(name) != value and name not in ("seeds", "contents"):
                shown = f"holds a study with {name} {before.get(name)}, not {value}"
                raise QsunError(f"{out} {shown[:300]}; choose another folder")
        for name, digest in contents.items():
            if before.get("contents", {}).get(name, digest) != digest:
                raise QsunError(f"{name} has changed since the study in {out} was started; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def _run(work: Work, threads: int) -> None:
    torch.set_num_threads(threads)
    work.result.parent.mkdir(parents=True, exist_ok=True)
    work.function(*work.arguments)
