"""A study's modules as a matrix for `qsun eval`, which scores the same pairs with lm-eval."""

from pathlib import Path
from typing import Any

import yaml

from qsun.demo.tasks import TASKS
from qsun.eval.study.study import ALIGNED_METHOD, Study, decoder, module


def write_matrix(study: Study, out: Path, seed: int = 0) -> Path:
    """Write `out`/matrix.yaml: base, full fine-tune, SUN, and QSUN by bits, aligned and not, of one seed."""
    rows: list[dict[str, Any]] = [{"name": "base", "model": "demo"}]
    for task in TASKS:
        responses = f"seed{seed}/{task}-valid.jsonl"
        sun = _beside(module(out, seed, task, "sun"), out)
        rows.append({"name": "full fine-tune", "model": _beside(module(out, seed, task, "full"), out)})
        rows.append({"name": "SUN", "prefill": sun, "decode": "demo"})
        for bits in study.bits:
            decode = _beside(decoder(out, seed, ALIGNED_METHOD, bits), out)
            aligned = _beside(module(out, seed, task, f"aligned-int{bits}"), out)
            rows.append({"name": f"QSUN int{bits}", "prefill": sun, "decode": decode})
            rows.append({"name": f"QSUN aligned int{bits}", "prefill": aligned, "decode": decode})
        for row in rows[-2 - 2 * len(study.bits) :]:
            row |= {"tasks": [f"qsun_{task}"], "responses": responses}
    file = out / "matrix.yaml"
    matrix = {"reference": "SUN", "tasks": [f"qsun_{task}" for task in TASKS], "variants": rows}
    file.write_text(yaml.safe_dump(matrix, sort_keys=False), encoding="utf-8")
    return file


def _beside(path: Path, out: Path) -> str:
    return str(path.relative_to(out))
