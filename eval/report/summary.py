"""The numbers of an evaluation's report from its parts: rates with errors, and every variant against a reference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import torch

from qsun.eval.output.machine import describe_machine
from qsun.eval.report.paired import compare_groups
from qsun.eval.report.variants import Matrix, stored_bits
from qsun.model.manifest import versions

PartResult = Mapping[str, Any]
Report = Mapping[str, Any]


def summarize(matrix: Matrix, parts: Sequence[PartResult]) -> dict[str, Any]:
    """Combine the parts of an evaluation.

    Returns:
        {"reference", "variants": [name], "bits": {name: bits of the decode module, 16 for full precision},
        "accuracy": {task or "mean": {name: cell}}, "sentences", "responses", "text"}; a cell is {"rate", "stderr", "n"}
        with `Paired` against the reference on the same examples if all answers are right or wrong.
    """
    values = _values(parts)
    tasks = [task for task in matrix.tasks if any(task in by_task for by_task in values.values())]
    accuracy = {
        task: _cells({n: [v[task]] for n, v in values.items() if task in v}, matrix.reference) for task in tasks
    }
    whole = {n: [v[task] for task in tasks] for n, v in values.items() if set(v) == set(tasks)}
    if len(tasks) > 1 and whole:
        accuracy["mean"] = _cells(whole, matrix.reference)
    compared = accuracy.get("mean", {}) if len(tasks) > 1 else next(iter(accuracy.values()), {})
    return {
        "reference": matrix.reference,
        "variants": matrix.names(),
        "bits": {e.name: stored_bits(e.decode) or 16 for e in matrix.entries},
        "accuracy": accuracy,
        "sentences": [
            _sentence(name, matrix.reference, cell) for name, cell in compared.items() if "difference" in cell
        ],
        "responses": _pooled([part for part in parts if part["kind"] == "responses"]),
        "text": {name: _numbers(part) for part in parts if part["kind"] == "text" for name in part["variants"]},
    }


def _values(parts: Sequence[PartResult]) -> dict[str, dict[str, Sequence[float]]]:
    found: dict[str, dict[str, Sequence[float]]] = {}
    for part in parts:
        if part["kind"] == "task":
            found.setdefault(part["variant"], {})[part["task"]] = part["values"]
    return found


def _cells(values: Mapping[str, list[Sequence[float]]], reference: str) -> dict[str, dict[str, float]]:
    """Return a cell for each variant; rates and differences are means over the tasks.

    Args:
        values: of each variant, those of every task.
    """
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
            cell |= asdict(compare_groups([(_right(a), _right(b)) for a, b in zip(theirs, groups, strict=True)]))
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
    side = "above" if points > 0 else "below" if points < 0 else "from"
    return (
        f"{name} is {abs(points):.1f} points {side} {reference} "
        f"(95% CI {low:+.1f} to {high:+.1f}; McNemar p {shown_p(cell['p_value'])})"
    )


def shown_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _pooled(parts: Sequence[PartResult]) -> dict[str, dict[str, float]]:
    """Pool a variant's entries, weighted by their positions; its p99_kl is their largest."""
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


def _numbers(part: PartResult) -> dict[str, float]:
    return {key: value for key, value in part.items() if isinstance(value, (int, float))}


def provenance(command: str, seed: int, device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to repeat the run: command, versions, machine, seed."""
    return {
        "command": command,
        "versions": versions("lm_eval"),
        **describe_machine(device),
        "seed": seed,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
