"""`qsun lm-eval`: lm-eval's command line with our model and tasks in it."""

import json
import sys

import pytest

from qsun.demo import base_directory

pytestmark = pytest.mark.usefixtures("short_index")


def test_an_embedded_task(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    arguments = [
        "--model",
        "qsun",
        "--model_args",
        "decode=demo,dtype=float32",
        "--tasks",
        "qsun_demo",
        "--device",
        "cpu",
    ]
    arguments += ["--metadata", "count=3", "seed=7", "--batch_size", "auto", "--output_path", tmp_path, "--log_samples"]
    answer = cli("lm-eval", *arguments)
    assert answer.code == 0, answer.err
    assert "| - qsun_tool|" in answer.out
    assert sys.argv[1] == "lm-eval"  # as it was before lm-eval's own
    (file,) = tmp_path.rglob("results_*.json")
    result = json.loads(file.read_text())
    assert result["config"]["decode_module"] == str(base_directory())
    assert result["n-samples"]["qsun_math"]["effective"] == 3
    assert len(list(tmp_path.rglob("samples_*.jsonl"))) == 3


def test_a_mistake_is_one_line(cli):
    answer = cli("lm-eval", "--model", "qsun", "--model_args", "decode=demo,prefil=demo", "--tasks", "qsun_math")
    assert answer.code == 2
    assert answer.err.strip().splitlines()[-1].startswith("error: unknown model argument 'prefil'; known are")


def test_lm_evals_own_help(cli):
    answer = cli("lm-eval", "run", "--help")
    assert answer.code == 0
    assert "usage: lm-eval run" in answer.out


def test_an_include_path_is_the_users(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: my_own_task\n")
    answer = cli("lm-eval", "ls", "tasks", "--include_path", tmp_path)
    assert "my_own_task" in answer.out and "gsm8k_cot" in answer.out
    assert "qsun_math" not in answer.out
