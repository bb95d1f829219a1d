"""What each of two processes runs in test_lm.py."""

import json
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

from qsun.eval.harness.lm import QsunLM
from qsun.eval.tasks import tasks_directory


def scores(decode, **settings):
    """Two embedded tasks, an odd number of examples each."""
    lm = QsunLM(decode=decode, device="cpu", dtype="float32", batch_size=4, **settings)
    manager = TaskManager(include_path=str(tasks_directory()), include_defaults=False, metadata={"count": 7})
    result = lm_eval.simple_evaluate(lm, tasks=["qsun_code", "qsun_tool"], task_manager=manager, bootstrap_iters=0)
    if result is None:
        return lm.rank, None
    answers = {
        name: {sample["doc_id"]: sample["filtered_resps"][0] for sample in rows}
        for name, rows in result["samples"].items()
    }
    return lm.rank, {"answers": answers, "world_size": lm.world_size}


def save_scores(decode, out):
    rank, found = scores(str(decode))
    Path(f"{out}.{rank}").write_text(json.dumps(found))
