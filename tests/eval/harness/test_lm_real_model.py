"""GSM8K's prompts through lm-eval's `hf` model and ours, on a pretrained model of 4 M parameters."""

import json

import pytest
from lm_eval.models.huggingface import HFLM

from qsun.eval.harness.lm import QsunLM
from tests.eval.harness.lm_requests import instances
from tests.places import SHARED

MODEL, DATA = SHARED / "models" / "stdlib4m", SHARED / "data" / "gsm8k" / "test.jsonl"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MODEL.is_dir() or not DATA.is_file(),
        reason="needs ../shared/models/stdlib4m and ../shared/data/gsm8k, not in the package",
    ),
]


def test_200_problems(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [json.loads(line) for line in DATA.read_text().splitlines()[:200]]
    prompts = [f"Question: {row['question']}\nAnswer:" for row in rows]
    scored = instances("loglikelihood", [(p, " " + row["answer"]) for p, row in zip(prompts, rows, strict=True)])
    written = instances("generate_until", [(p, {"until": ["Question:"], "max_gen_toks": 24}) for p in prompts])
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 16}
    lm, reference = QsunLM(decode=str(MODEL), **settings), HFLM(pretrained=str(MODEL), **settings)
    ours, theirs = (model.loglikelihood(scored, disable_tqdm=True) for model in (lm, reference))
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4, rel=1e-6)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    answers = lm.generate_until(written, disable_tqdm=True)
    assert answers == reference.generate_until(written, disable_tqdm=True)
    assert len(set(answers)) > 50
