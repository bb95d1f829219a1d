"""A study with a few steps of tuning: every module is made once, and every number is in its place."""

import fcntl
import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from qsun.demo.tasks import HARD_TASKS, TASKS, examples, write_jsonl
from qsun.errors import Diverged, QsunError
from qsun.eval.report.variants import from_file
from qsun.eval.study.matrix import write_matrix
from qsun.eval.study.modules import after_quantizing, before_quantizing, chosen_rate, trials
from qsun.eval.study.report import Scores, bits_figure, curve_figure, markdown
from qsun.eval.study.run import missing_work, run_study
from qsun.eval.study.stages import STAGES, variants
from qsun.eval.study.study import Study
from qsun.eval.study.task import StudyTask
from qsun.model.output_dir import take_lock
from tests.warm_process import warm_context


@pytest.fixture(autouse=True)
def warm_processes(monkeypatch):
    monkeypatch.setattr("qsun.eval.study.work.get_context", lambda _: warm_context())


def invented(study, tmp_path, seed=0):
    """Scores of every variant, drawn at random."""
    rng = random.Random(seed)
    right = {}
    for number in range(study.seeds):
        right[str(number)] = {
            task.name: {
                name: "".join(rng.choice("011") for _ in range(study.test))
                for name, _, _ in variants(study, tmp_path, number, task)
            }
            for task in study.tasks_of(number)
        }
    return {"study": json.loads(json.dumps(asdict(study))), "right": right}


def test_the_report_is_the_mean_of_the_answers(tmp_path):
    study = Study(seeds=2, test=20)
    result = invented(study, tmp_path)
    scores = Scores(result)
    digits = "".join(result["right"][s][t]["sun"] for s in "01" for t in TASKS)
    assert scores.rate("sun") == digits.count("1") / 120
    means = [sum(result["right"][s][t]["sun"].count("1") for t in TASKS) / 60 for s in "01"]
    assert scores.spread("sun") == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    text = markdown(scores)
    assert f"| {100 * digits.count('1') / 120:.1f} | {100 * scores.spread('sun'):.1f} |" in text
    first = result["right"]["0"]
    for task in HARD_TASKS:
        cells = (f"{100 * first[task][v].count('1') / 20:.1f}" for v in ("base", "full", "sun"))
        assert f"| {task} | {' | '.join(cells)} |" in text
    at_125 = sum(first[t]["full-125"].count("1") for t in TASKS) / 60
    assert f"| full fine-tune | {100 * at_125:.1f} |" in text
    found = scores.against("sun", "full")
    assert f"| sun - full | {100 * found.difference:.1f} |" in text
    assert len(bits_figure(scores).axes) == 4 and len(curve_figure(scores).axes) == 1


def test_a_matrix_names_only_modules_that_the_study_makes(tmp_path):
    tasks = (StudyTask("calls", "a.jsonl", "b.jsonl", "c.jsonl", "json"),)
    study = Study(tasks=tasks, seeds=1, methods=("gptq",), bits=(4,), align_steps=0)
    made = {work.result for stage in STAGES for work in stage(study, tmp_path)}
    for row in yaml.safe_load(write_matrix(study, tmp_path).read_text())["variants"]:
        for part in {"model", "prefill", "decode"} & row.keys():
            assert row[part] == "demo" or tmp_path / row[part] in made, row
    assert not any("longer" in str(place) or "aligned" in str(place) for place in made)


def test_a_matrix_of_own_and_embedded_tasks_is_one_that_qsun_eval_reads(tmp_path):
    for split in "abc":
        (tmp_path / f"{split}.jsonl").write_text("{}\n")
    own = StudyTask("calls", *(str(tmp_path / f"{split}.jsonl") for split in "abc"), "json")
    study = Study(tasks=(own, StudyTask("code")), seeds=1, methods=("gptq",), bits=(4,), align_steps=0)
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0/code-valid.jsonl").write_text("{}\n")
    matrix = from_file(write_matrix(study, tmp_path))
    answered = [(entry.name, entry.answers(matrix.tasks), entry.responses[-12:]) for entry in matrix.entries]
    names = ["full fine-tune", "SUN", "QSUN int4"]
    assert answered == [
        ("base", ["qsun_code"], ""),
        *((name, [], f"{tmp_path / 'b.jsonl'}"[-12:]) for name in names),
        *((name, ["qsun_code"], "-valid.jsonl") for name in names),
    ]


def test_all_counts_every_example_of_tasks_of_unlike_sizes(tmp_path):
    tasks = (StudyTask("a", "x", "y", "z"), StudyTask("b", "x", "y", "z"))
    study = Study(tasks=tasks, seeds=1, methods=("gptq",), bits=(4,), curve=(10,), align_steps=0)
    right = {
        task.name: {name: digits for name, _, _ in variants(study, tmp_path, 0, task)}
        for task, digits in zip(tasks, ("1" * 10, "0" * 90), strict=True)
    }
    text = markdown(Scores({"study": json.loads(json.dumps(asdict(study))), "right": {"0": right}}))
    assert "|  | a | b | all | spread |" in text and "| full fine-tune | 100.0 | 0.0 | 10.0 | 0.0 |" in text
    assert "mean" not in text.lower()


def test_a_report_of_own_tasks_names_them_and_what_the_intervals_count(tmp_path):
    tasks = (StudyTask("calls", "a.jsonl", "b.jsonl", "c.jsonl", "json"),)
    study = Study(base="my/base", tasks=tasks, seeds=2, test=20, methods=("awq",), bits=(4,), lr=0.0)
    text = markdown(Scores(invented(study, tmp_path)))
    assert "base my/base; test examples: calls 20; seeds: 2" in text and "intervals are somewhat narrow" in text
    assert "| QSUN int4 awq aligned |" in text and "frozen decoder breaks" not in text
    one = markdown(Scores(invented(replace(study, seeds=1), tmp_path)))
    assert "somewhat narrow" not in one


def test_rates():
    study = Study(lr=3e-3, full_lr=1e-3, lora_ranks=(4, 64), lora_lr=(6e-3, 2e-3), align_share=0.5)
    made = {tuned.name: tuned.config(study, 0).lr for tuned in before_quantizing(study, 1, hard=False)}
    wanted = {"lora4": 6e-3, "lora64": 2e-3, "full-lora4": 6e-3, "full-lora64": 2e-3}
    assert made == {"sun": 3e-3, "full": 1e-3} | wanted
    further = {tuned.name: tuned.config(study, 0).lr for tuned in after_quantizing(study)}
    assert (further["longer"], further["aligned-int4"], further["lora64-on-int4"]) == (1.5e-3, 1.5e-3, 2e-3)
    by_width = Study(lora_ranks=(4,))
    assert [t.config(by_width, 0).lr for t in before_quantizing(by_width, 1, hard=False) if t.lora_rank] == [0, 0]


def test_rates_are_tried_first_and_the_best_of_each_is_taken(tmp_path):
    study = Study(seeds=2, steps=100, test=20, rates=(1e-3, 4e-3, 2e-3), align_share=0.5)
    study = replace(study, lora_ranks=(4,))
    tried = list(STAGES[0](study, tmp_path))
    kinds = 4 * len(study.served()) + 2 * (len(study.tasks) - len(study.served()))  # adapters of hard tasks: none
    assert len(tried) == 3 * kinds and {work.steps for work in tried} == {25}
    losses = {"sun-at-0.001": 0.3, "sun-at-0.004": 0.1, "sun-at-0.002": 0.2}
    losses |= {"full-at-0.001": 0.2, "full-at-0.004": 0.5, "full-at-0.002": 0.1}
    losses |= {"lora4-at-0.001": 0.1, "lora4-at-0.004": 0.2, "lora4-at-0.002": 0.3}
    losses |= {"full-lora4-at-0.001": 0.3, "full-lora4-at-0.004": 0.2, "full-lora4-at-0.002": 0.2}
    for name, loss in losses.items():
        study.module(tmp_path, 0, "math", name).mkdir(parents=True)
        (study.module(tmp_path, 0, "math", name) / "report.json").write_text(json.dumps({"best_valid_loss": loss}))
    best = {kind: chosen_rate(study, tmp_path, "math", kind) for kind in ("sun", "full", "lora4", "full-lora4")}
    assert best == {"sun": 4e-3, "full": 2e-3, "lora4": 1e-3, "full-lora4": 4e-3}  # the first of equals
    tuned = list(before_quantizing(study, 1, hard=False))
    assert {t.name: t.config(study, 1, best[t.kind]).lr for t in tuned} == best
    further = {t.name: t.config(study, 1, best[t.kind]).lr for t in after_quantizing(study)}
    assert (further["longer"], further["aligned-int2"], further["lora4-on-int2"]) == (2e-3, 2e-3, 1e-3)
    assert [t.config(study, 0).lr for t in trials(study, False) if t.kind == "lora4"] == [1e-3, 4e-3, 2e-3]
    text = markdown(Scores(invented(study, tmp_path) | {"rates": {"math": best}}))
    found = (
        "0.004* (SUN), 0.002 (full fine-tune), 0.001* (SUN lora4), 0.004* (ordinary LoRA of rank 4); *: the lowest or"
    )
    assert f"peak rates: the best of 0.001, 0.004, 0.002 on validation data: on math {found}" in text


def test_a_result_has_the_rates_of_what_was_tried_and_none_of_adapters_of_hard_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr("qsun.eval.study.run.run_pieces", lambda *_: None)
    tasks = (StudyTask("math"), StudyTask(next(iter(HARD_TASKS)), hard=True))
    study = Study(tasks=tasks, seeds=1, rates=(1e-3, 2e-3), lora_ranks=(4,), bits=(4,), methods=("gptq",), curve=())
    for work in STAGES[-1](study, tmp_path):
        work.result.parent.mkdir(parents=True, exist_ok=True)
        work.result.write_text('"01"')
    for work in STAGES[0](study, tmp_path):
        work.result.mkdir(parents=True)
        loss = 0.1 if work.result.name in {"sun-at-0.002", "lora4-at-0.001"} else 0.2
        (work.result / "report.json").write_text(json.dumps({"best_valid_loss": loss}))
    of_all_weights = {"sun": 2e-3, "full": 1e-3}
    rates = run_study(study, tmp_path)["rates"]
    assert rates == {"math": of_all_weights | {"lora4": 1e-3, "full-lora4": 1e-3}, tasks[1].name: of_all_weights}


def test_adapters_with_a_rate_of_their_own_try_none(tmp_path):
    study = Study(seeds=1, test=20, rates=(1e-3, 2e-3), lora_ranks=(4, 16), lora_lr=(5e-4, 3e-4))
    assert {t.kind for t in trials(study, hard=False)} == {"sun", "full"}
    made = {work.result.name: work.needs for work in STAGES[1](study, tmp_path)}
    assert len(made["sun"]) == 2 and not made["lora4"] and not made["full-lora16"]
    tuned = {t.name: t.config(study, 0).lr for t in before_quantizing(study, 0, hard=False) if t.lora_rank}
    assert tuned == {"lora4": 5e-4, "full-lora4": 5e-4, "lora16": 3e-4, "full-lora16": 3e-4}
    text = markdown(Scores(invented(replace(study, rates=()), tmp_path)))
    assert "peak rates: 0.003 (SUN), 0.003 (full fine-tune), 0.0005 (adapters of rank 4), 0.0003 (adapters of r" in text


def test_every_piece_needs_what_its_modules_are_made_of(tmp_path):
    study = Study(seeds=2, rates=(1e-3, 2e-3), bits=(4, 2), methods=("rtn", "refined"), lora_ranks=(4,), distill=True)
    pieces = [work for stage in STAGES for work in stage(study, tmp_path)]
    made = {
        work.result: {str(need.relative_to(tmp_path)) for need in work.needs if need != Path("demo")} for work in pieces
    }
    needs = {str(result.relative_to(tmp_path)): found for result, found in made.items()}
    trials_of_sun = {"seed0/math/sun-at-0.001", "seed0/math/sun-at-0.002"}
    assert not needs["seed0/math/sun-at-0.001"] and not needs["text/decode-refined-int2"]
    assert needs["seed1/math/sun"] == trials_of_sun
    assert needs["seed1/math/lora4"] == {"seed0/math/lora4-at-0.001", "seed0/math/lora4-at-0.002"}
    assert needs["seed1/math/full-lora4"] == {"seed0/math/full-lora4-at-0.001", "seed0/math/full-lora4-at-0.002"}
    assert needs["seed1/decode-refined-int2"] == {f"seed1/{name}/sun" for name in study.served()}
    assert needs["seed1/math/aligned-int2"] == {"seed1/math/sun", "seed1/decode-refined-int2"} | trials_of_sun
    distilled = needs["seed0/math/lora4-on-int4-distilled"] - needs["seed1/math/lora4"]
    assert distilled == {"seed0/math/lora4-on-int4", "seed0/math/sun", "seed0/decode-refined-int4"}
    assert needs["seed0/math/answers/int2-refined-aligned.json"] == {
        "seed0/math/aligned-int2", "seed0/decode-refined-int2",
    }  # fmt: skip
    begun = set()
    for work in pieces:  # in this order no piece waits for a later one
        assert made[work.result] <= begun
        begun.add(str(work.result.relative_to(tmp_path)))


def test_an_embedded_task_by_its_name():
    assert StudyTask.parse("code") == StudyTask("code")
    assert StudyTask.parse("shift").hard


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--task", "calls"), "is not of the form NAME=TRAIN,VALID,TEST"),
        (("--task", "calls=a,b"), "is not of the form NAME=TRAIN,VALID,TEST"),
        (("--task", "../calls=a,b,c"), "'../calls' is not a folder name"),
        (("--task", "a=x.jsonl,x.jsonl,x.jsonl", "--task", "a=x.jsonl,x.jsonl,x.jsonl"), "contain a duplicate"),
        (("--task", "a=x.jsonl,x.jsonl,x.jsonl,bleu"), "scorer 'bleu' is not known; use exact, json, expression or"),
        (("--task", "a=x.jsonl,x.jsonl,x.jsonl,no_such.module:f"), "cannot be imported"),
        (("--task", "a=x.jsonl,x.jsonl,x.jsonl"), "test file x.jsonl does not exist"),
        (("--bits", "5"), "bits"),
        (("--bits", "4,3,4"), "bits 4, 3, 4 contain a duplicate; give each once"),
        (("--methods", "rtn,gptq,rtn"), "methods rtn, gptq, rtn contain a duplicate; give each once"),
        (("--lora-ranks", "4,4"), "lora_ranks 4, 4 contain a duplicate; give each once"),
        (("--lora-ranks", "4", "--lora-lr", "-1"), "lr -1"),
        (("--curve", "0,100"), "curve has 0; use whole numbers from 1 up"),
        (("--lora-ranks", "0,4"), "lora-ranks has 0; use whole numbers from 1 up"),
        (("--lora-ranks", "4,16", "--lora-lr", "1e-3,2e-3,3e-3"), "lora_lr has 3 rates for 2 adapter ranks; give one"),
        (("--lora-ranks", "4", "--align-share", 0.2), "align_share 0.2 is a share of lr and lora_lr; give them"),
        (
            ("--rates", "1e-3", "--lora-ranks", "4", "--lora-lr", "0", "--align-share", 0.2),
            "align_share 0.2 is a share of lr and lora_lr; give them, or rates",
        ),
        (("--rates", "1e-3,0"), "rates 0.001, 0 must be different numbers above 0"),
        (("--rate-steps", 5), "--rate-steps 5 are steps of a trial; give the --rates to try"),
        (("--rates", "1e-3", "--lr", "1e-3"), "--rates are tried in place of --lr and --full-lr; give either"),
        (("--methods", "rtn"), "use no calibration; add one, such as refined"),
        (("--methods", "magic"), "magic"),
        (("--base", "nowhere"), "nowhere is not a directory"),
    ],
)
def test_bad_input_is_one_line_before_work_starts(cli, tmp_path, options, says):
    answer = cli("bench", "tasks", "-o", tmp_path / "out", *options)
    assert answer.code == 2 and says in answer.err, answer.err
    assert answer.err.count("\n") == 1 and not (tmp_path / "out").exists()


def own_task(folder, scorer="exact", responses=("2", "4"), name="own"):
    rows = [{"prompt": f"{response}+0=", "response": response} for response in responses]
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{name}={','.join(str(folder / f'{split}.jsonl') for split in ('train', 'valid', 'test'))},{scorer}"


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        ("raises", "scorer own_scorers:raises of task own fails on the answer '': ZeroDivisionError: division by zero"),
        ("alike", "scorer own_scorers:alike of task own returns 0.3; let it return True or False"),
        ("marks", "scorer own_scorers:marks of task own returns 5; let it return True or False"),
        ("never", "scorer own_scorers:never of task own rejects the right response '2' of"),
        ("one", "scorer own_scorers:one of task own fails on the answer '': TypeError:"),
    ],
)
def test_a_scorer_that_cannot_work_is_found_before_work_starts(cli, tmp_path, monkeypatch, scorer, says):
    lines = ["def raises(answer, right): return 1 / len(answer)", "def alike(answer, right): return 0.3"]
    lines += [
        "def marks(answer, right): return 5 * (answer == right)",
        "def never(answer, right): return False",
        "def one(answer): return True",
    ]
    (tmp_path / "own_scorers.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    answer = cli("bench", "tasks", "-o", tmp_path / "out", "--task", own_task(tmp_path, f"own_scorers:{scorer}"))
    assert answer.code == 2 and says in answer.err and answer.err.count("\n") == 1, answer.err
    assert not (tmp_path / "out").exists()


def test_missing_training_data_is_found_before_another_task_is_tuned(cli, tmp_path):
    task = own_task(tmp_path)
    (tmp_path / "valid.jsonl").unlink()
    answer = cli("bench", "tasks", "-o", tmp_path / "out", "--task", "math", "--task", task)
    assert answer.code == 2 and f"file {tmp_path / 'valid.jsonl'} of task own does not exist" in answer.err


def test_an_own_test_file_is_whole_beside_an_embedded_task(cli, tmp_path, monkeypatch):
    studies = []

    def stop(study, *_):
        studies.append(study)
        raise QsunError("stop")

    monkeypatch.setattr("qsun.eval.study.run.run_study", stop)
    for tasks in (("math", own_task(tmp_path)), ("math",), (own_task(tmp_path),)):
        cli("bench", "tasks", "-o", tmp_path / "out", *(part for task in tasks for part in ("--task", task)))
    assert [study.test for study in studies] == [0, 500, 0]


def test_test_rows_that_the_model_cannot_read_are_counted(cli, tmp_path):
    answer = cli(
        "bench", "tasks", "-o", tmp_path / "out", "--dry-run", "--task", own_task(tmp_path, responses=("2", "7" * 400))
    )
    assert answer.code == 0, answer.err
    assert "test.jsonl: 1 of its examples are too long for the model, and are not scored" in answer.err


def test_a_rate_at_which_the_loss_is_not_finite_is_the_worst(tmp_path, monkeypatch):
    study = Study(tasks=(StudyTask("math"),), seeds=1, rates=(1e-3, 1.0), train=8)
    works = {work.result.name: work for work in STAGES[0](study, tmp_path)}

    def diverged(*_, **__):
        raise Diverged("the training loss is nan after step 3 of 250; use a lower --lr than 1")

    monkeypatch.setattr("qsun.eval.study.stages.tune", diverged)
    works["sun-at-1"].result.parent.mkdir(parents=True)
    with pytest.raises(Diverged):  # of a module that is not a trial
        tuned = next(work for work in STAGES[1](replace(study, rates=()), tmp_path) if work.result.name == "sun")
        tuned.function(*tuned.arguments)
    for name in ("sun-at-1", "full-at-1", "full-at-0.001"):
        works[name].function(*works[name].arguments)
    (works["sun-at-0.001"].result).mkdir()
    (works["sun-at-0.001"].result / "report.json").write_text(json.dumps({"best_valid_loss": 3.0}))
    assert chosen_rate(study, tmp_path, "math", "sun") == 1e-3
    with pytest.raises(QsunError, match="math, full: the loss is not finite at any of the rates tried"):
        chosen_rate(study, tmp_path, "math", "full")


def test_adapter_rates_belong_to_ranks_in_a_resumed_study(tmp_path):
    study = Study(seeds=1, lora_ranks=(4, 16), lora_lr=(6e-3, 3e-3))
    (tmp_path / "study.json").write_text(json.dumps(asdict(study)))
    grown = replace(study, lora_ranks=(16, 4, 64), lora_lr=(3e-3, 6e-3, 1e-3))
    assert missing_work(grown, tmp_path)
    with pytest.raises(QsunError, match=r"holds adapters of rank 16 with lora_lr 0.003, not 0.006; choose another"):
        missing_work(replace(study, lora_ranks=(16, 4)), tmp_path)


@pytest.mark.parametrize(
    ("lora_lr", "tried", "now", "message"),
    [
        ((), ["full", "sun"], (), "by width, not of --rates"),  # begun when adapters were never tried
        ((), None, (), "by width, not of --rates"),  # and when studies did not say
        ((), ["full", "full-lora4", "lora4", "sun"], (0.0,), "of --rates, not by width"),
        ((2e-3,), ["full", "sun"], (), "0.002, not of --rates"),
    ],
)
def test_adapters_of_a_resumed_study_have_rates_of_one_origin(lora_lr, tried, now, message, tmp_path):
    study = Study(seeds=1, rates=(1e-3, 2e-3), lora_ranks=(4,), lora_lr=lora_lr)
    settings = json.loads(json.dumps(asdict(study))) | ({} if tried is None else {"tried": tried})
    (tmp_path / "study.json").write_text(json.dumps(settings))
    with pytest.raises(QsunError, match=f"holds adapters of rank 4 with lora_lr {message}; choose another folder"):
        missing_work(replace(study, lora_lr=now), tmp_path)


def test_answers_of_tuned_modules_come_first_and_the_bases_last(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr("qsun.eval.study.run.run_pieces", lambda pieces, *_: begun.extend(pieces))
    study = Study(seeds=1, bits=(4,), methods=("gptq",), text=False, curve=())
    with pytest.raises(FileNotFoundError):  # nothing was scored
        run_study(study, tmp_path)
    kinds = [
        "base" if work.result.name == "base.json" else "answers" if work.result.parent.name == "answers" else "made"
        for work in begun
    ]
    assert kinds == sorted(kinds, key=["answers", "made", "base"].index) and len(set(kinds)) == 3


def test_one_study_at_a_time_in_a_folder(tmp_path):
    with (
        take_lock(tmp_path / "lock", "ab", fcntl.LOCK_EX),
        pytest.raises(QsunError, match=f"another run is writing {tmp_path}"),
    ):
        run_study(Study(seeds=1), tmp_path)


def test_scores_of_a_stopped_study(cli, tmp_path):
    study = Study(tasks=(StudyTask("math"), StudyTask("code")), seeds=2)
    for seed, task, digits in ((0, "math", "0111"), (1, "math", "0001"), (0, "code", "1111")):
        file = study.answers(tmp_path, seed, task, "sun")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(digits))
    arguments = ("bench", "tasks", "-o", tmp_path, "--so-far", "--task", "math", "--task", "code", "--seeds", 2)
    lines = cli(*arguments).out.splitlines()
    assert [line.split() for line in lines if line.startswith("sun")] == [["sun", "50.0", "(0,", "1)", "100.0", "(0)"]]
    rows = json.loads(cli(*arguments, "--json").out)
    assert {"task": "math", "variant": "sun", "seed": 1, "examples": 4, "right": 1} in rows and len(rows) == 3
    assert cli("bench", "tasks", "-o", tmp_path / "none", "--so-far").out == "no answers yet\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1"]


def test_ctrl_c_says_how_to_continue(cli, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qsun.eval.study.run.run_pieces", interrupted)
    answer = cli("bench", "tasks", "-o", tmp_path / "out", "--steps", 2)
    assert answer.code == 130
    assert answer.err == "error: interrupted; finished pieces are kept, the same command continues\n"


def test_what_no_model_can_write_is_found_before_anything_is_tuned(cli, tiny_model, talking_model, tmp_path):
    """The RoPE of this base changes at 32 tokens, within the response of the second example."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8, "long_factor": [1.0 + 4 * i for i in range(8)],
    }  # fmt: skip
    base = tmp_path / "base"
    shutil.copytree(tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32), base)
    for file in talking_model.glob("tokenizer*"):
        shutil.copyfile(file, base / file.name)
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "1+1=", "response": "2"}, {"prompt": "7" * 25, "response": "8" * 12}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = cli(
        "bench", "tasks", "-o", tmp_path / "out", "--base", base, "--task", f"a={file},{file},{file}", "--dry-run"
    )
    assert answer.code == 2 and not (tmp_path / "out").exists()
    assert "rows.jsonl: a test example has a prompt of 2" in answer.err and "leave it out" in answer.err, answer.err


@pytest.mark.slow
def test_a_whole_study_and_its_second_run(cli, tmp_path):
    out = tmp_path / "study"
    options = ("--seeds", 1, "--steps", 2, "--curve", "", "--align-steps", 1, "--test", 5, "--processes", 2)
    options += ("--bits", 2, "--methods", "rtn,refined", "--train", 64, "--samples", 8, "--valid", 16)
    first = cli("bench", "tasks", "-o", out, *options, "--json")
    assert first.code == 0, first.err
    right = json.loads(first.out)["right"]["0"]
    assert set(right) == {*TASKS, *HARD_TASKS} and all(len(v) == 5 for v in right["math"].values())
    assert set(right["math"]) == {
        *("base", "full", "sun", "sun longer", "int2 rtn text", "int2 refined text"),
        *("int2 refined decode", "int2 refined aligned"),
    }
    matrix = from_file(out / "matrix.yaml")
    assert matrix.names() == ["base", "full fine-tune", "SUN", "QSUN int2", "QSUN aligned int2"]
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(written) == 3 * 4 + 2 * 2 + 3
    again = cli("bench", "tasks", "-o", out, *options, "--json")
    assert again.out == first.out
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    other = cli("bench", "tasks", "-o", out, "--seeds", 1, "--steps", 3)
    assert other.code == 2 and "holds a study with steps 2, not 3" in other.err
    with pytest.raises(QsunError, match="holds a study"):
        run_study(Study(lr=1.0), out)


@pytest.mark.slow
def test_a_study_grows_by_adapters_and_distillation(cli, tmp_path):
    """What there is stays; each adapter is tuned on the base and on the quantized weights, and taught by the pair."""
    out, files = tmp_path / "study", []
    for split in ("train", "valid", "test"):
        files.append(str(tmp_path / f"{split}.jsonl"))
        write_jsonl(tmp_path / f"{split}.jsonl", examples("math", split, 40 if split == "train" else 4))
    options = ["--task", f"mine={','.join(files)}", "--seeds", 1, "--steps", 2, "--curve", "", "--align-steps", 1]
    options += ["--bits", 4, "--methods", "gptq", "--no-text", "--batch-size", 4, "--processes", 1, "--samples", 8]
    options += ["--rates", "1e-5,3e-3", "--rate-steps", 1]
    first = cli("bench", "tasks", "-o", out, *options, "--json")
    assert first.code == 0, first.err
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert (out / "seed0/mine/answers/sun.json").stat().st_mtime_ns < min(
        at for path, at in written.items() if "decode" in path.parent.name
    ), "answers do not wait for what they do not need"
    options += ["--lora-ranks", 2, "--distill"]
    assert (
        cli("bench", "tasks", "-o", out, *options, "--dry-run").out.splitlines()[-1] == "17 pieces, 13 steps of tuning"
    )
    second = cli("bench", "tasks", "-o", out, *options, "--json")
    assert second.code == 0, second.err
    rates = json.loads(second.out)["rates"]["mine"]
    assert rates == {"sun": 3e-3, "full": 3e-3, "lora2": 3e-3, "full-lora2": 3e-3}
    for name in ("full", "lora2", "lora2-on-int4"):
        assert json.loads((out / "seed0/mine" / name / "report.json").read_text())["plan"]["peak_lr"] == 3e-3
    before, after = (json.loads(answer.out)["right"]["0"]["mine"] for answer in (first, second))
    assert before == {name: after[name] for name in before}
    assert set(after) - set(before) == {
        *("full lora2", "sun lora2", "sun lora2 distilled", "int4 gptq distilled", "int4 gptq lora2"),
        *("int4 gptq lora2 on its weights", "int4 gptq lora2 on its weights, distilled"),
    }
    assert written.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}.items()
    made = json.loads((out / "seed0/mine/lora2-on-int4-distilled/qsun.json").read_text())
    assert made["prefill_weights"] == "decode" and made["teacher"] == str(out / "seed0/mine/sun")
    report = (out / "study.md").read_text()
    assert "| SUN lora2 distilled |" in report and "| int4 gptq lora2 on its weights - sun |" in report


@pytest.mark.slow
def test_own_base_and_data_end_to_end(cli, talking_model, tmp_path, monkeypatch):
    """A tiny bfloat16 model, a task in files, a custom scorer; only a part that is lost is made again."""
    for split in ("train", "valid", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", examples("code", split, 40 if split == "train" else 6))
    (tmp_path / "my_scorer.py").write_text("def anything(answer, response):\n    return bool(response)\n")
    monkeypatch.syspath_prepend(tmp_path)
    files = ",".join(str(tmp_path / f"{split}.jsonl") for split in ("train", "valid", "test"))
    command = ["bench", "tasks", "-o", tmp_path / "out", "--base", talking_model, "--json"]
    command += ["--task", f"mine={files},my_scorer:anything", "--bits", "4", "--methods", "gptq", "--test", 4]
    command += ["--seeds", 1, "--steps", 1, "--curve", "", "--align-steps", 1, "--batch-size", 4, "--processes", 1]
    command += ["--samples", 8]
    answer = cli(*command)
    assert answer.code == 0, answer.err
    right = json.loads(answer.out)["right"]["0"]["mine"]
    assert right == dict.fromkeys(right, "1111"), "the scorer of one's own decides"
    assert set(right) == {
        *("base", "full", "sun", "sun longer"),
        *("int4 gptq text", "int4 gptq decode", "int4 gptq aligned"),
    }
    report = (tmp_path / "out/study.md").read_text()
    assert "| sun - full | 0.0 |" in report and "95% interval" in report
    matrix = from_file(tmp_path / "out/matrix.yaml")
    assert matrix.tasks == ()
    assert {entry.responses for entry in matrix.entries[1:]} == {str(tmp_path / "valid.jsonl")}
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    (tmp_path / "out/seed0/mine/answers/int4-gptq-decode.json").unlink()
    left = cli(*command, "--dry-run")
    assert [work["label"] for work in json.loads(left.out)] == ["answers: mine, int4 gptq decode, seed 0"]
    again = cli(*command)
    assert again.out == answer.out
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    file = tmp_path / "train.jsonl"
    file.write_text(file.read_text() + '{"prompt": "a>", "response": "b"}\n')
    changed = cli(*command)
    assert changed.code == 2 and f"file {file} has changed since the study" in changed.err


def test_files_that_every_seed_reads_cannot_be_pipes(tmp_path, pipe):
    write_jsonl(tmp_path / "test.jsonl", examples("math", "test", 2))
    own = StudyTask("mine", pipe(), str(tmp_path / "test.jsonl"), str(tmp_path / "test.jsonl"))
    with pytest.raises(QsunError, match="is a pipe, which can be read only once"):
        missing_work(Study(tasks=(own,)), tmp_path / "out")
