"""What `qsun eval` tells lm-eval reaches the tasks, and what lm-eval refuses comes back as one line."""

import json

import pytest

from qsun.decode import load_decode
from qsun.errors import QsunError
from qsun.eval.harness import HarnessSettings, run_task
from qsun.prefill import PrefillModule

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def pair():
    decode = load_decode("demo", "cpu", "float32")
    return PrefillModule(decode.model, decode.directory, decode.manifest), decode


def test_task_data_reaches_the_task(pair, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"What is {n} + 1?", "answer": f"One more.\n#### {n + 1}"} for n in range(3)]
        (tmp_path / f"gsm8k/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_task(*pair, "gsm8k_local", HarnessSettings(limit=2, num_fewshot=0, task_data=str(tmp_path)))
    assert found["metric"] == "exact_match" and len(found["values"]) == 2
    with pytest.raises(QsunError, match=r"task gsm8k_local: .*data_dir"):
        run_task(*pair, "gsm8k_local", HarnessSettings(limit=2, num_fewshot=0))
