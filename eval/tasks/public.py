"""Public benchmarks from local copies of their data: GSM8K, HumanEval, and three categories of BFCL.

`--metadata data_dir=DIR` names the folder of gsm8k, humaneval and bfcl_v4, each with its publisher's files.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from qsun.errors import QsunError
from qsun.eval.tasks.bfcl import check_answer, prompt_of
from qsun.eval.tasks.sandbox import run_program


def gsm8k(data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return {"train", "test"}: rows with question and answer."""
    return {name: Dataset.from_list(_rows(data_dir, f"gsm8k/{name}.jsonl")) for name in ("train", "test")}


def humaneval(data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return {"test"}: rows with prompt, test and entry_point."""
    return {"test": Dataset.from_list(_rows(data_dir, "humaneval/HumanEval.jsonl.gz"))}


def pass_at_1(row: dict[str, str], answers: list[str]) -> dict[str, float]:
    """Run prompt, answer and tests in a sandbox (sandbox.py)."""
    program = f"{row['prompt']}{answers[0]}\n{row['test']}\ncheck({row['entry_point']})\n"
    return {"pass@1": float(run_program(program).passed)}


def _bfcl(category: str) -> Callable[..., dict[str, Dataset]]:
    def load(data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
        """Return {"test"}: rows with id, prompt and truth, the acceptable calls as JSON."""
        file = f"BFCL_v4_{category}.json"
        truths = {row["id"]: row["ground_truth"] for row in _rows(data_dir, f"bfcl_v4/possible_answer/{file}")}
        rows = [
            {
                "id": row["id"],
                "prompt": prompt_of(row["question"][0][-1]["content"], row["function"]),
                "truth": json.dumps(truths[row["id"]]),
            }
            for row in _rows(data_dir, f"bfcl_v4/{file}")
        ]
        return {"test": Dataset.from_list(rows)}

    return load


bfcl_simple, bfcl_multiple, bfcl_parallel = _bfcl("simple_python"), _bfcl("multiple"), _bfcl("parallel")


def calls_match(row: dict[str, str], answers: list[str]) -> dict[str, float]:
    """Score whether the answer makes the expected calls."""
    return {"acc": float(check_answer(answers[0], json.loads(row["truth"])))}


def _rows(data_dir: str | None, name: str) -> list[dict[str, Any]]:
    if not data_dir:
        raise QsunError(
            f"no data_dir; give --task-data DIR (qsun lm-eval: --metadata data_dir=DIR), the folder that holds {name}"
        )
    path, fix = Path(data_dir) / name, f"give the folder that holds {name}"
    if not path.is_file():
        raise QsunError(f"{path} is not a file; {fix} with --task-data (qsun lm-eval: --metadata data_dir=DIR)")
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]
