"""qsun_math, qsun_code, qsun_tool: the embedded tasks, drawn when they are loaded, without data files."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from qsun.demo.tasks import TaskExample, check, examples
from qsun.errors import QsunError

COUNT = 500


def _drawn(task: str) -> Callable[..., dict[str, Dataset]]:
    def draw(count: int | str = COUNT, seed: int | str = 0, **_: Any) -> dict[str, Dataset]:
        """Return {"test": rows with task, prompt and response}; lm-eval passes --metadata and more."""
        if not str(count).isdecimal() or not str(seed).isdecimal() or int(count) < 1:
            raise QsunError(f"metadata count={count} seed={seed}: give a count of 1 or more and a seed of 0 or more")
        rows = [
            {"task": task, "prompt": e.prompt, "response": e.response}
            for e in examples(task, "test", int(count), int(seed))
        ]
        return {"test": Dataset.from_list(rows)}

    return draw


math, code, tool = _drawn("math"), _drawn("code"), _drawn("tool")


def exact_match(row: dict[str, str], answers: list[str]) -> dict[str, float]:
    """Score an answer with demo.tasks.check, as everywhere in qsun."""
    return {"exact_match": float(check(row["task"], TaskExample(row["prompt"], row["response"]), answers[0]))}
