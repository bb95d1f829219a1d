"""lm-eval on one pair: the score of every example of a task."""

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from math import isclose
from statistics import fmean
from typing import Any

from qsun.errors import QsunError, shortened
from qsun.eval.tasks import tasks_directory
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.prefill_module import PrefillModule

_SANDBOXED = "humaneval_local"  # the only task whose programs run in our sandbox; lm-eval's own do not


@dataclass(frozen=True)
class HarnessSettings:
    """Settings for lm-eval.

    Attributes:
        limit: examples of each task, 0 for all. batch_size: a number, or "auto".
        num_fewshot: None for the task's own. chat_template: render prompts as chats.
        task_dir: folder of more task files. task_data: folder of local copies of public data (docs/evaluation.md).
        allow_code: allow tasks that run what the model writes.
    """

    limit: int = 0
    batch_size: str = "auto"
    num_fewshot: int | None = None
    chat_template: bool = False
    task_dir: str = ""
    task_data: str = ""
    allow_code: bool = False
    seed: int = 0


def run_task(prefill: PrefillModule, decode: DecodeModule, task: str, settings: HarnessSettings) -> dict[str, Any]:
    """Run one task, or a group of tasks, with lm-eval.

    Returns:
        {"metric": the first that is a mean of values from 0 to 1, "values": that of every example in the task's order,
        "all": every metric of the task as lm-eval computes it, "version"}.
    Raises:
        QsunError: no such task, one without such a metric, or one that runs code without permission.
    """
    from lm_eval import evaluator

    from qsun.eval.harness.lm import QsunLM

    try:
        with redirect_stdout(sys.stderr):  # lm-eval prints; stdout is for the report
            results = evaluator.simple_evaluate(
                model=QsunLM(decode, prefill, str(decode.model.device), batch_size=settings.batch_size),
                tasks=[task],
                task_manager=_task_manager(task, settings),
                limit=settings.limit or None,
                num_fewshot=settings.num_fewshot,
                apply_chat_template=settings.chat_template,
                confirm_run_unsafe_code=settings.allow_code and task == _SANDBOXED,
                bootstrap_iters=0,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
    # unusable data, an unsafe task, a missing chat template; lm-eval asserts some of what it cannot do
    except (ValueError, KeyError, OSError, AssertionError) as error:
        raise QsunError(f"task {task}: {shortened(error, 200)}") from None
    return _outcome(task, results)


def check_tasks(tasks: Sequence[str], settings: HarnessSettings) -> None:
    """Raise QsunError, before work starts, for an unknown task or one that runs code without permission."""
    for task in tasks:
        known = _task_manager(task, settings).all_tasks
        if task not in known:
            near = [name for name in known if task.split("_", 1)[0] in name][:5]
            fix = f"similar are {', '.join(near)}" if near else "give the folder of its file with --task-dir"
            raise QsunError(f"task {task!r} is not known to lm-eval; {fix}")
        if task == _SANDBOXED and not settings.allow_code:
            raise QsunError(f"task {task} runs what the model writes; allow that with --allow-code-execution")


def _task_manager(task: str, settings: HarnessSettings) -> Any:
    """Return lm-eval's index of tasks: of our own where the task is one of them, as all of lm-eval's take 8 seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs a lot for every task
    ours = _indexed("", settings.task_data, include_defaults=False)
    if not settings.task_dir and task in ours.all_tasks:
        return ours
    return _indexed(settings.task_dir, settings.task_data, include_defaults=True)


@cache
def _indexed(task_dir: str, task_data: str, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    folders = [str(tasks_directory()), *([task_dir] if task_dir else [])]
    # simple_evaluate uses its metadata only for a manager that it makes itself
    metadata = {"data_dir": task_data} if task_data else None
    return TaskManager(include_path=folders, include_defaults=include_defaults, metadata=metadata)


def _outcome(task: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return every example's value of the task's first share and filter; subtasks of a group one after another."""
    samples = results["samples"]
    names = sorted(samples)
    values: list[float] = []
    for name in names:
        first = [s for s in samples[name] if s["filter"] == samples[name][0]["filter"]]
        first.sort(key=lambda sample: sample["doc_id"])
        metrics = first[0]["metrics"]
        metric = next((m for m in metrics if _is_share(m, first, results["results"][name])), None)
        if metric is None:
            raise QsunError(
                f"task {name}: none of its metrics, {', '.join(metrics)}, is a mean of values from 0 to 1; use --text "
                "for perplexity"
            )
        values += [float(sample[metric]) for sample in first]
    return {
        "metric": metric,
        "values": values,
        "all": {name: _numbers(results["results"][name]) for name in names},
        "version": {name: results["versions"].get(name) for name in names},
    }


def _is_share(metric: str, samples: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> bool:
    """Return whether lm-eval's result of a metric is the mean of the examples' values, all from 0 to 1."""
    values: list[Any] = [sample.get(metric) for sample in samples]
    if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
        return False
    whole = result.get(f"{metric},{samples[0]['filter']}")
    return isinstance(whole, (int, float)) and isclose(whole, fmean(values), rel_tol=1e-6, abs_tol=1e-9)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, (int, float)) and "stderr" not in key}
