"""What each process of `accelerate launch` runs in test_lm.py: DECODE OUT."""

import json
import sys
from pathlib import Path

import lm_eval
import torch
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, found = scores(sys.argv[1])
    Path(f"{sys.argv[2]}.{rank}").write_text(json.dumps(found))
