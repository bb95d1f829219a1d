"""The tasks of a study: the embedded ones, or anyone's data with a scorer."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun.data.examples import TokenExample
from qsun.demo.tasks import HARD_TASKS, TASKS, TaskExample, check, examples, write_jsonl
from qsun.errors import QsunError
from qsun.eval.harness.scorers import Scorer, find_scorer
from qsun.tuning.examples import read_examples


@dataclass(frozen=True)
class StudyTask:
    """One task.

    Attributes:
        train, valid, test: data as in qsun tune --data; empty: the embedded task of this name, drawn by seed.
        scorer: name of a scorer, or module:function (eval/harness/scorers.py); embedded tasks have their own.
        hard: scored with the first seed only and not served: it shows where a frozen decoder breaks.
    """

    name: str
    train: str = ""
    valid: str = ""
    test: str = ""
    scorer: str = "exact"
    hard: bool = False

    @classmethod
    def parse(cls, text: str) -> "StudyTask":
        """Parse NAME=TRAIN,VALID,TEST[,SCORER], or the name of an embedded task. Raises QsunError for anything else."""
        name, equals, rest = text.partition("=")
        if text in {*TASKS, *HARD_TASKS}:
            return cls(text, hard=text in HARD_TASKS)
        parts = [part.strip() for part in rest.split(",")]
        if not equals or not 3 <= len(parts) <= 4 or not all(parts):
            embedded = ", ".join((*TASKS, *HARD_TASKS))
            raise QsunError(f"task {text!r} is not of the form NAME=TRAIN,VALID,TEST[,SCORER], nor one of {embedded}")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise QsunError(f"task name {name!r} is not a folder name; use letters, digits, '-', '_' and '.'")
        train, valid, test, *scorer = parts
        return cls(name, train, valid, test, scorer[0] if scorer else "exact")

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.train, self.valid, self.test)))

    @property
    def embedded(self) -> bool:
        return not self.train

    def data(self, folder: Path, split: str, count: int, seed: int) -> Path:
        """Return the file of a split (train, valid, test), for an embedded task of `count` examples in `folder`."""
        if not self.embedded:
            return Path(getattr(self, split))
        file = folder / f"{self.name}-{split}.jsonl"
        if not file.exists():
            draft = file.with_suffix(f".{os.getpid()}")  # two processes may want it at once
            write_jsonl(draft, examples(self.name, split, count, seed))
            draft.rename(file)
        return file

    def find_scorer(self) -> Scorer:
        """Return the function that scores an answer. Raises QsunError if there is none."""
        if self.embedded:
            return lambda answer, right: check(self.name, TaskExample("", right), answer)
        return find_scorer(self.scorer)


def read_test(path: Path, tokenizer: Any, positions: int, limit: int) -> tuple[Sequence[TokenExample], int]:
    """Read the examples of a test file that fit into the model with room for an answer, and count the others.

    limit: the most examples; 0: all.
    """
    found, too_long = read_examples([str(path)], tokenizer, positions * 3 // 4, "test")
    return found[:limit] if limit else found, too_long


EMBEDDED_TEST = 500  # examples, where a study names no number
EMBEDDED = (*(StudyTask(name) for name in TASKS), *(StudyTask(name, hard=True) for name in HARD_TASKS))
