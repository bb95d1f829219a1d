"""Run a study: what is missing, in a few processes."""

import fcntl
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsun.errors import QsunError
from qsun.eval.output.table import Table
from qsun.eval.study.checks import check_study
from qsun.eval.study.modules import chosen_rate, trials
from qsun.eval.study.stages import STAGES, scoring, variants
from qsun.eval.study.study import Study, rates_by_rank
from qsun.eval.study.task import StudyTask
from qsun.eval.study.work import Work, run_pieces
from qsun.model.checkpoint import file_sha256, read_json
from qsun.model.locate import find_model
from qsun.model.manifest import write_json
from qsun.model.output_dir import take_lock
from qsun.model.pairing import weights_fingerprint
from qsun.progress import Progress

# More of these adds what is missing.
_GROWS = ("seeds", "bits", "curve", "lora_ranks", "lora_lr", "distill", "text", "contents", "tried")


def run_study(study: Study, out: Path, processes: int = 2, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Do what is missing under `out` and return all scores.

    Returns:
        {"study": ..., "right": {seed: {task: {variant: "0110..."}}}}; one digit an example of the test set. Where rates
        were tried, "rates": {task: {"sun": ..., "full": ..., "lora16": ...}} too.
    Raises:
        QsunError: `out` holds another study, a task or the base cannot be used, a process was killed, or another one is
            doing a study in `out`.
    """
    check_study(study)
    settings = _check_same(study, out)
    out.mkdir(parents=True, exist_ok=True)
    with take_lock(out / "lock", "ab", fcntl.LOCK_EX):
        write_json(out / "study.json", settings)
        # Of what can begin, answers come first, but for the base's: a stopped study has those of all its modules.
        made = {work.result for work in scoring(study, out) if set(work.needs) - {Path(study.base)}}
        run_pieces(sorted(_missing(study, out), key=lambda work: work.result not in made), processes, progress)
    right = {
        str(seed): {task.name: _answers(study, out, seed, task) for task in study.tasks_of(seed)}
        for seed in study.all_seeds
    }
    result: dict[str, Any] = {"study": asdict(study), "right": right}
    if study.rates:
        result["rates"] = {
            task.name: {
                kind: chosen_rate(study, out, task.name, kind)
                for kind in dict.fromkeys(trial.kind for trial in trials(study, task.hard))
            }
            for task in study.tasks
        }
    return result


def finished_answers(study: Study, out: Path) -> list[dict[str, Any]]:
    """Return {"task", "variant", "seed", "examples", "right"} of answers that there are. Raises as `missing_work`."""
    _check_same(study, out)
    found = []
    for seed in study.all_seeds:
        for task in study.tasks_of(seed):
            for name, _, _ in variants(study, out, seed, task):
                file = study.answers(out, seed, task.name, name)
                if file.exists():
                    digits = json.loads(file.read_text())
                    count = {"examples": len(digits), "right": digits.count("1")}
                    found.append({"task": task.name, "variant": name, "seed": seed} | count)
    return found


def missing_work(study: Study, out: Path) -> list[Work]:
    """Return what `run_study` would do, without starting it. Raises QsunError as it does."""
    check_study(study)
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


def _check_same(study: Study, out: Path) -> dict[str, Any]:
    """Return what study.json holds for this study. Raises QsunError if `out` holds another one."""
    contents = {f"base {study.base}": weights_fingerprint(find_model(study.base))}
    files = [Path(name) for task in study.tasks for name in task.files]
    contents |= {f"file {file}": file_sha256(file) for file in files if file.is_file()}
    tried = sorted({trial.kind for trial in trials(study, hard=False)})
    settings = json.loads(json.dumps(asdict(study))) | {"contents": contents, "tried": tried}
    file = out / "study.json"
    if file.exists():
        before = json.loads(json.dumps(asdict(Study()))) | read_json(file)  # an older one has fewer
        before.setdefault("tried", ["full", "sun"] if before["rates"] else [])
        for name, value in settings.items():
            if before.get(name) != value and name not in _GROWS:
                shown = f"holds a study with {name} {before.get(name)}, not {value}"
                raise QsunError(f"{out} {shown[:300]}; choose another folder")
        rates, wanted = _adapter_rates(before), _adapter_rates(settings)
        for rank in rates.keys() & wanted.keys():
            if rates[rank] != wanted[rank]:
                shown = f"holds adapters of rank {rank} with lora_lr {rates[rank]}, not {wanted[rank]}"
                raise QsunError(f"{out} {shown}; choose another folder")
        for name, digest in contents.items():
            if before.get("contents", {}).get(name, digest) != digest:
                raise QsunError(f"{name} has changed since the study in {out} was started; choose another folder")
    return settings


def _adapter_rates(settings: dict[str, Any]) -> dict[int, str]:
    """Return where the rate of each adapter rank comes from, in words."""
    tried, rates = settings["tried"], rates_by_rank(settings["lora_ranks"], settings["lora_lr"])
    given = {rank: f"{rate:g}" if rate else "by width" for rank, rate in rates.items()}
    return given | {rank: "of --rates" for rank in rates if f"lora{rank}" in tried}


def scores_table(found: Sequence[dict[str, Any]]) -> str:
    """Return finished answers as a text: right answers of each task by variant, %, and the seeds that have them."""
    names, tasks = dict.fromkeys(row["variant"] for row in found), dict.fromkeys(row["task"] for row in found)
    rows = []
    for name in names:
        cells = []
        for task in tasks:
            scores = [row for row in found if (row["variant"], row["task"]) == (name, task)]
            rate = 100 * sum(row["right"] for row in scores) / max(1, sum(row["examples"] for row in scores))
            cells.append(f"{rate:.1f} ({', '.join(str(row['seed']) for row in scores)})" if scores else "-")
        rows.append([name, *cells])
    return Table(["right answers, % (seeds)", *tasks], rows).text() if rows else "no answers yet"
