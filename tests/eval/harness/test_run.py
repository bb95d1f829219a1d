"""Settings of `qsun eval` reach lm-eval's tasks, and what lm-eval refuses becomes a one-line error."""

import json

import pytest

from qsun.errors import QsunError
from qsun.eval.harness.run import HarnessSettings, run_task
from qsun.runtime.decode_module import load_decode
from qsun.runtime.prefill_module import PrefillModule

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("short_index")


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


def test_an_answer_longer_than_the_model_is_one_line(pair, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "calc 1+1>", "a": "2"}\n')
    (tmp_path / "long.yaml").write_text(
        "task: long_answers\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}, cache_dir: {tmp_path}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: [], max_gen_toks: 512}\nmetric_list: [{metric: exact_match}]\n"
    )
    with pytest.raises(
        QsunError, match=r"^task long_answers: max_gen_toks 512 .*max_length 512; use 511 or less in"
    ) as error:
        run_task(*pair, "long_answers", HarnessSettings(task_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


def likelihoods(folder, metrics):
    """The folder of a task that scores continuations, with these metrics."""
    (folder / "rows.jsonl").write_text("".join(f'{{"q": "calc {n}+1>", "a": "{n + 1}"}}\n' for n in range(3)))
    (folder / "scored.yaml").write_text(
        "task: scored\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}, cache_dir: {folder}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        f"target_delimiter: ''\nmetric_list: [{metrics}]\n"
    )
    return HarnessSettings(task_dir=str(folder))


def test_accuracy_is_reported_where_perplexity_is_the_first_metric(pair, tmp_path):
    found = run_task(*pair, "scored", likelihoods(tmp_path, "{metric: perplexity}, {metric: acc}"))
    assert found["metric"] == "acc" and set(found["values"]) <= {0, 1} and len(found["values"]) == 3
    assert found["all"]["scored"]["perplexity,none"] > 1


def test_a_task_without_a_share_is_one_clear_line(pair, tmp_path):
    says = "^task scored: none of its metrics, perplexity, is a mean of values from 0 to 1; use --text for perplexity$"
    with pytest.raises(QsunError, match=says):
        run_task(*pair, "scored", likelihoods(tmp_path, "{metric: perplexity}"))


def test_what_lm_eval_asserts_is_one_line(pair, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("no room\nfor that")

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", refuse)
    with pytest.raises(QsunError, match=r"^task qsun_math: no room for that$"):
        run_task(*pair, "qsun_math", HarnessSettings())
