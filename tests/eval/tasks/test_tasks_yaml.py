"""lm-eval's task files: they load, their prompts are what they claim, right answers score 1 and wrong ones 0."""

import gzip
import json
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

import qsun
from qsun.demo.tasks import examples
from qsun.eval.tasks import tasks_directory
from tests.places import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data: public benchmarks, not in the package")
NAMES = {
    *("qsun_math", "qsun_code", "qsun_tool", "gsm8k_local", "humaneval_local"),
    *("bfcl_simple", "bfcl_multiple", "bfcl_parallel"),
}


@pytest.fixture(autouse=True, scope="module")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


def manager(**metadata):
    return TaskManager(include_path=str(tasks_directory()), include_defaults=False, metadata=metadata)


class Answers(LM):
    """A model that answers by looking the prompt up; prompts that it does not know get another answer."""

    def __init__(self, known):
        super().__init__()
        self.known, self.asked = known, []

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [self.known.get(request.args[0], "no idea") for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def evaluate(model, task, metadata, **settings):
    found = lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=manager(**metadata), bootstrap_iters=0, log_samples=False, **settings
    )
    return {key.split(",")[0]: value for key, value in found["results"][task].items() if "stderr" not in key}


def test_every_file_is_found():
    found = manager()
    assert set(found.all_subtasks) == NAMES
    assert found.all_groups == ["qsun_demo"]


@pytest.mark.parametrize("task", ["math", "code", "tool"])
def test_embedded_tasks(task):
    rows = examples(task, "test", 12, seed=5)
    known = {row.prompt: row.response for row in rows[:9]}
    model = Answers(known)
    assert evaluate(model, f"qsun_{task}", {"count": "12", "seed": 5})["exact_match"] == 0.75
    assert [prompt for prompt, _ in model.asked] == [row.prompt for row in rows]
    assert model.asked[0][1] == {"until": [], "do_sample": False, "max_gen_toks": 64}


def test_the_group_averages():
    known = {row.prompt: row.response for task in ("math", "code") for row in examples(task, "test", 4)}
    assert evaluate(Answers(known), "qsun_demo", {"count": 4})["exact_match"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("settings", [{"count": 0}, {"count": "many"}, {"seed": -1}])
def test_bad_counts_are_refused(settings):
    with pytest.raises(qsun.QsunError, match="give a count of 1 or more"):
        manager(**settings).load("qsun_math")


@pytest.mark.parametrize("task", sorted(NAMES - {"qsun_math", "qsun_code", "qsun_tool"}))
def test_missing_data_is_one_line(task, tmp_path):
    with pytest.raises(qsun.QsunError, match="no data_dir; give --task-data DIR"):
        manager().load(task)
    with pytest.raises(qsun.QsunError, match="is not a file; give the folder that holds"):
        manager(data_dir=str(tmp_path)).load(task)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def data_dir(tmp_path):
    """Two rows of everything, as the publishers lay them out."""
    for name in ("train", "test"):
        rows = [{"question": f"{name} {n}+{n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(1, 9)]
        write_rows(tmp_path / f"gsm8k/{name}.jsonl", rows if name == "train" else rows[:2])
    check = "def check(candidate):\n    assert candidate(2) == 4\n"
    problems = [
        {"task_id": name, "prompt": f"def {name}(x):\n", "entry_point": name, "canonical_solution": "", "test": check}
        for name in ("double", "square", "leave", "loop")
    ]
    write_rows(tmp_path / "humaneval/HumanEval.jsonl.gz", problems)
    question = [{"id": "0", "question": [[{"role": "user", "content": "Q?"}]], "function": [{"name": "f"}]}]
    truth = [{"id": "0", "ground_truth": [{"f": {"a": [1], "b": ["", {"deep": [1, "x"]}]}}]}]
    write_rows(tmp_path / "bfcl_v4/BFCL_v4_multiple.json", question)
    write_rows(tmp_path / "bfcl_v4/possible_answer/BFCL_v4_multiple.json", truth)
    return {"data_dir": str(tmp_path)}


def test_gsm8k(data_dir):
    known = {"Question: test 1+1?\nAnswer:": " 1+1=2\n#### 2", "Question: test 2+2?\nAnswer:": " It is $4 then"}
    found = evaluate(Answers(known), "gsm8k_local", data_dir, num_fewshot=0)
    assert found["exact_match"] == 1.0  # flexible-extract, which comes last
    model = Answers({})
    assert evaluate(model, "gsm8k_local", data_dir)["exact_match"] == 0
    prompt, settings = model.asked[0]
    assert prompt.count("Question: train") == 5
    assert prompt.endswith("\n\nQuestion: test 1+1?\nAnswer:")
    assert "#### " in prompt
    assert settings["until"][0] == "Question:"


def test_gsm8k_is_lm_evals_but_for_the_data():
    (theirs,) = Path(lm_eval.__file__).parent.glob("tasks/gsm8k/gsm8k.yaml")
    reference = yaml.safe_load(theirs.read_text())
    ours = (tasks_directory() / "gsm8k_local.yaml").read_text().replace("!function ", "")
    ours = yaml.safe_load(ours)
    for key in ("task", "tag", "dataset_path", "dataset_name", "custom_dataset"):
        reference.pop(key, None)
        ours.pop(key, None)
    assert ours == reference


def test_humaneval(data_dir):
    known = {
        "def double(x):\n": "    return 2 * x",
        "def square(x):\n": "    return x + 1",
        "def leave(x):\n": "    import os\n    os._exit(0)",
        "def loop(x):\n": "    raise SystemExit(0)",
    }
    assert evaluate(Answers(known), "humaneval_local", data_dir, confirm_run_unsafe_code=True)["pass@1"] == 0.25
    with pytest.raises(ValueError, match="unsafe"):
        evaluate(Answers(known), "humaneval_local", data_dir)


def test_bfcl(data_dir):
    task = manager(**data_dir).load("bfcl_multiple")["tasks"]["bfcl_multiple"]
    prompt = task.doc_to_text(task.test_docs()[0])
    assert prompt.startswith('You can call these functions:\n{"name": "f"}\n\nQuestion: Q?')
    for answer, right in (("f(a=1)", 1.0), ('f(a=1, b={"deep": "X"})', 1.0), ("f(a=2)", 0.0)):
        assert evaluate(Answers({prompt: answer}), "bfcl_multiple", data_dir)["acc"] == right


@needs_data
@pytest.mark.parametrize(("task", "rows"), [("simple", 400), ("multiple", 200), ("parallel", 200)])
def test_bfcls_own_answers_are_right(task, rows):
    """Of each parameter the first acceptable value."""
    loaded = manager(data_dir=str(DATA)).load(f"bfcl_{task}")["tasks"][f"bfcl_{task}"]
    docs = list(loaded.test_docs())
    assert len(docs) == rows
    for doc in docs:
        truth = json.loads(doc["truth"])
        calls = [
            {"name": name, "arguments": first_values(parameters)} for call in truth for name, parameters in call.items()
        ]
        assert loaded.process_results(doc, [json.dumps(calls[::-1])]) == {"acc": 1.0}, doc["id"]
        calls[0]["name"] += "_"
        assert loaded.process_results(doc, [json.dumps(calls)]) == {"acc": 0.0}, doc["id"]


def first_values(parameters):
    return {key: first(options[0]) for key, options in parameters.items() if options[0] != ""}


def first(option):
    if isinstance(option, dict):
        return {key: first(options[0]) for key, options in option.items() if options[0] != ""}
    return [first(one) for one in option] if isinstance(option, list) else option


@needs_data
@pytest.mark.slow
def test_humanevals_own_solutions_pass():
    loaded = manager(data_dir=str(DATA)).load("humaneval_local")["tasks"]["humaneval_local"]
    docs = list(loaded.test_docs())
    assert len(docs) == 164
    for doc in docs:
        assert loaded.process_results(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}, doc["task_id"]
    wrong = [loaded.process_results(doc, ["    pass\n"])["pass@1"] for doc in docs[:40]]
    assert sum(wrong) == 0


@needs_data
def test_gsm8ks_own_answers_are_right():
    task = manager(data_dir=str(DATA)).load("gsm8k_local")["tasks"]["gsm8k_local"]
    known = {task.doc_to_text(doc): " " + doc["answer"] for doc in list(task.test_docs())[:20]}
    assert evaluate(Answers(known), "gsm8k_local", {"data_dir": str(DATA)}, limit=20, num_fewshot=0)["exact_match"] == 1
