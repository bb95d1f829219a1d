"""Run a study: what is missing, in a few processes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsun.errors import QsunError
from qsun.eval.study.modules import chosen_rate
from qsun.eval.study.stages import STAGES, check_tasks, variants
from qsun.eval.study.study import Study
from qsun.eval.study.task import StudyTask
from qsun.eval.study.work import Work, run_pieces
from qsun.model.checkpoint import file_sha256
from qsun.model.locate import find_model
from qsun.model.manifest import write_json
from qsun.model.pairing import weights_fingerprint
from qsun.progress import Progress

_GROWS = ("seeds", "bits", "curve", "lora_ranks", "distill", "text", "contents")  # more of these adds what is missing


def run_study(study: Study, out: Path, processes: int = 2, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Do what is missing under `out` and return all scores.

    Returns:
        {"study": ..., "right": {seed: {task: {variant: "0110..."}}}}; one digit an example of the test set. Where rates
        were tried, "rates": {task: {"sun": ..., "full": ...}} too.
    Raises:
        QsunError: `out` holds another study, a task or the base cannot be used, or a process was killed.
    """
    check_tasks(study)
    _claim(study, out)
    run_pieces(_missing(study, out), processes, progress)
    right = {
        str(seed): {task.name: _answers(study, out, seed, task) for task in study.tasks_of(seed)}
        for seed in study.all_seeds
    }
    result: dict[str, Any] = {"study": asdict(study), "right": right}
    if study.rates:
        result["rates"] = {
            task.name: {kind: chosen_rate(study, out, task.name, kind == "full") for kind in ("sun", "full")}
            for task in study.tasks
        }
    return result


def missing_work(study: Study, out: Path) -> list[Work]:
    """Return what `run_study` would do, without starting it. Raises QsunError as it does."""
    check_tasks(study)
    _check_same(study, out)
    return _missing(study, out)


def work_table(missing: Sequence[Work]) -> str:
    """Return the pieces of work as a text, with the steps of tuning in all."""
    lines = [f"{work.label}: {work.steps} steps" if work.steps else work.label for work in missing]
    return "\n".join([*lines, f"{len(missing)} pieces, {sum(work.steps for work in missing)} steps of tuning"])


def _missing(study: Study, out: Path) -> list[Work]:
    return [work for stage in STAGES for work in stage(study, out) if not work.result.exists()]


def _answers(study: Study, out: Path, seed: int, task: StudyTask) -> dict[str, str]:
    names = [name for name, _, _ in variants(study, out, seed, task)]
    return {name: json.loads(study.answers(out, seed, task.name, name).read_text()) for name in names}


def _claim(study: Study, out: Path) -> None:
    """Write the settings to study.json, or compare them with those that it holds."""
    settings = _check_same(study, out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "study.json", settings)


def _check_same(study: Study, out: Path) -> dict[str, Any]:
    """Return what study.json holds for this study. Raises QsunError if `out` holds another one."""
    contents = {f"base {study.base}": weights_fingerprint(find_model(study.base))}
    files = [Path(name) for task in study.tasks for name in task.files]
    contents |= {f"file {file}": file_sha256(file) for file in files if file.is_file()}
    settings, file = json.loads(json.dumps(asdict(study))) | {"contents": contents}, out / "study.json"
    if file.exists():
        before = json.loads(json.dumps(asdict(Study()))) | json.loads(file.read_text())  # an older one has fewer
        for name, value in settings.items():
            if before.get(name) != value and name not in _GROWS:
                shown = f"holds a study with {name} {before.get(name)}, not {value}"
                raise QsunError(f"{out} {shown[:300]}; choose another folder")
        for name, digest in contents.items():
            if before.get("contents", {}).get(name, digest) != digest:
                raise QsunError(f"{name} has changed since the study in {out} was started; choose another folder")
    return settings
