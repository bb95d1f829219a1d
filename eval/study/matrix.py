"""A study's modules as a matrix for `qsun eval`, which scores the same pairs with lm-eval."""

from pathlib import Path
from typing import Any

import yaml

from qsun.eval.study.study import Study
from qsun.eval.study.task import StudyTask


def write_matrix(study: Study, out: Path, seed: int = 0) -> Path:
    """Write `out`/matrix.yaml: base, full fine-tune, SUN, and QSUN by bits, aligned and not, of one seed.

    Tasks of your own have no lm-eval task; their entries have responses to measure the divergence on, and beside
    embedded tasks an empty list of tasks, as no list means all.
    """
    base = str(Path(study.base).absolute()) if Path(study.base).is_dir() else study.base
    rows: list[dict[str, Any]] = [{"name": "base", "model": base}]
    tasks = [f"qsun_{task.name}" for task in study.tasks if task.embedded and not task.hard]
    for task in study.tasks:
        if not task.hard:
            asked = _asked(task, seed) if task.embedded or not tasks else _asked(task, seed) | {"tasks": []}
            rows += [row | asked for row in _rows(study, base, out, seed, task)]
    matrix = {"reference": "SUN", "tasks": tasks, "variants": rows}
    file = out / "matrix.yaml"
    file.write_text(yaml.safe_dump(matrix, sort_keys=False), encoding="utf-8")
    return file


def _rows(study: Study, base: str, out: Path, seed: int, task: StudyTask) -> list[dict[str, str]]:
    def module(name: str) -> str:
        return str(study.module(out, seed, task.name, name).relative_to(out))

    rows = [
        {"name": "full fine-tune", "model": module("full")},
        {"name": "SUN", "prefill": module("sun"), "decode": base},
    ]
    for bits in study.bits:
        decode = str(study.decoder(out, seed, study.aligned_method, bits).relative_to(out))
        rows.append({"name": f"QSUN int{bits}", "prefill": module("sun"), "decode": decode})
        if study.align_steps:
            rows.append({"name": f"QSUN aligned int{bits}", "prefill": module(f"aligned-int{bits}"), "decode": decode})
    return rows


def _asked(task: StudyTask, seed: int) -> dict[str, Any]:
    if task.embedded:
        return {"tasks": [f"qsun_{task.name}"], "responses": f"seed{seed}/{task.name}-valid.jsonl"}
    return {"responses": str(Path(task.valid).absolute())}
