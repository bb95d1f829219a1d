"""From the parts of an evaluation to the numbers of its report: rates with errors, and every variant against one."""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import torch

from qsun.eval.report.paired import compare_groups
from qsun.eval.report.variants import Matrix, stored_bits
from qsun.model.manifest import versions

Part = Mapping[str, Any]


def summarize(matrix: Matrix, parts: Sequence[Part]) -> dict[str, Any]:
    """
    Returns:
        {"reference", "variants": [name], "bits": {name: bits of the decode module, 16 for full precision},
        "accuracy": {task or "mean": {name: cell}}, "sentences", "responses", "text"}; a cell is {"rate", "stderr", "n"}
        and, but for the reference itself, {"difference", "low", "high", "p_value"} where answers are right or wrong,
        with the reference's on the same examples.
    """
    values = _values(parts)
    tasks = [task for task in matrix.tasks if any(task in by_task for by_task in values.values())]
    accuracy = {
        task: _cells({n: [v[task]] for n, v in values.items() if task in v}, matrix.reference) for task in tasks
    }
    if len(tasks) > 1:
        whole = {n: [v[task] for task in tasks] for n, v in values.items() if set(v) == set(tasks)}
        accuracy["mean"] = _cells(whole, matrix.reference)
    last = accuracy.get("mean") or (accuracy[tasks[0]] if tasks else {})
    return {
        "reference": matrix.reference,
        "variants": matrix.names(),
        "bits": {e.name: stored_bits(e.decode) or 16 for e in matrix.entries},
        "accuracy": accuracy,
        "sentences": [_sentence(name, matrix.reference, cell) for name, cell in last.items() if "difference" in cell],
        "responses": _pooled([part for part in parts if part["kind"] == "responses"]),
        "text": {name: _numbers(part) for part in parts if part["kind"] == "text" for name in part["variants"]},
    }


def _values(parts: Sequence[Part]) -> dict[str, dict[str, Sequence[float]]]:
    found: dict[str, dict[str, Sequence[float]]] = {}
    for part in parts:
        if part["kind"] == "task":
            found.setdefault(part["variant"], {})[part["task"]] = part["values"]
    return found


def _cells(values: Mapping[str, list[Sequence[float]]], reference: str) -> dict[str, dict[str, float]]:
    """values: of each variant, those of every task; rates and differences are means over the tasks."""
    cells = {}
    for name, groups in values.items():
        cell = {
            "rate": fmean(map(fmean, groups)),
            "stderr": math.sqrt(sum(_stderr(group) ** 2 for group in groups)) / len(groups),
            "n": sum(map(len, groups)),
        }
        theirs = values.get(reference, [])
        if (
            name != reference
            and list(map(len, theirs)) == list(map(len, groups))
            and all(map(_binary, groups + theirs))
        ):
            cell |= compare_groups([(_right(a), _right(b)) for a, b in zip(theirs, groups, strict=True)]).to_dict()
        cells[name] = cell
    return cells


def _right(values: Sequence[float]) -> list[bool]:
    return [value == 1 for value in values]


def _binary(values: Sequence[float]) -> bool:
    return bool(values) and set(values) <= {0, 1}


def _stderr(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))


def _sentence(name: str, reference: str, cell: Mapping[str, float]) -> str:
    points, low, high = (100 * cell[key] for key in ("difference", "low", "high"))
    return (
        f"{name} is within {max(abs(low), abs(high)):.1f} points of {reference} "
        f"(difference {points:+.1f}, 95% CI {low:+.1f} to {high:+.1f}; McNemar p {shown_p(cell['p_value'])})"
    )


def shown_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _pooled(parts: Sequence[Part]) -> dict[str, dict[str, float]]:
    """Entries of one variant together, weighted by their positions; the largest 99th percentile of them."""
    pooled = {}
    for name in dict.fromkeys(part["variant"] for part in parts):
        mine = [part for part in parts if part["variant"] == name]
        total = sum(part["positions"] for part in mine)
        means = {
            key: sum(part[key] * part["positions"] for part in mine) / total
            for key in ("mean_kl", "top1", "loss", "reference_loss")
        }
        pooled[name] = {"positions": total, "p99_kl": max(part["p99_kl"] for part in mine), **means}
    return pooled


def _numbers(part: Part) -> dict[str, float]:
    return {key: value for key, value in part.items() if isinstance(value, (int, float))}


def provenance(command: str, seed: int) -> dict[str, Any]:
    """What a reader needs to run it again: command, versions, machine, seed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": command,
        "versions": versions("lm_eval"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "gpu": gpu,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "seed": seed,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
