"""What is checked before a study begins, as it would otherwise end hours later."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsun.data.jsonl import check_no_pipe
from qsun.errors import QsunError, shortened
from qsun.eval.harness.exact_match import answer_limits
from qsun.eval.study.modules import Tuned, after_adapters, after_quantizing, before_quantizing, trials
from qsun.eval.study.study import Study
from qsun.eval.study.task import StudyTask, read_test
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.skeleton import read_model_config

log = logging.getLogger(__name__)


def check_study(study: Study) -> None:
    """Raise QsunError for what cannot be used: base, settings of tuning, data, scorers.

    That includes right responses that no model of these positions can write, and that the scorer rejects.
    """
    directory = find_model(study.base)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise QsunError(f"base {study.base} has no tokenizer, and tasks are text")
    for module in _modules(study):
        module.config(study, study.first_seed)  # validates the settings
    config = read_model_config(directory)
    for task in study.tasks:
        task.find_scorer()
        for file in task.files:
            check_no_pipe(Path(file), "task")  # every seed reads it
        if not task.embedded:
            _check_files(study, task, tokenizer, config)


def _modules(study: Study) -> Iterator[Tuned]:
    yield from trials(study, hard=False)
    yield from before_quantizing(study, study.first_seed, hard=False)
    yield from after_quantizing(study)
    yield from after_adapters(study)


def _check_files(study: Study, task: StudyTask, tokenizer: Any, config: Any) -> None:
    test, too_long = read_test(Path(task.test), tokenizer, config.max_position_embeddings, study.test)
    for name in (task.train, task.valid):
        if not Path(name).exists():
            raise QsunError(f"file {name} of task {task.name} does not exist")
    if too_long:
        log.warning("%s: %d of its examples are too long for the model, and are not scored", task.test, too_long)
    try:
        answer_limits(test, config)
    except QsunError as error:
        raise QsunError(f"{task.test}: {error}") from None
    _check_scorer(task, tokenizer.decode(test[0].response, skip_special_tokens=True))


def _check_scorer(task: StudyTask, right: str) -> None:
    """Try a scorer on an empty answer and on the right one."""
    scorer, of = task.find_scorer(), f"of task {task.name}"
    for answer in ("", right):
        try:
            found: Any = scorer(answer, right)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            raise QsunError(f"scorer {task.scorer} {of} fails on the answer {shortened(answer)!r}: {fault}") from None
        if not isinstance(found, bool | int) or found not in (0, 1):
            raise QsunError(f"scorer {task.scorer} {of} returns {shortened(repr(found))}; let it return True or False")
    if not found:
        raise QsunError(f"scorer {task.scorer} {of} rejects the right response {shortened(right)!r} of {task.test}")
