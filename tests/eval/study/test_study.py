"""The study with hardly any tuning: every module is made once, every number is in its place."""

import json
import random

import pytest

from qsun.demo.tasks import HARD_TASKS, TASKS
from qsun.errors import QsunError
from qsun.eval.report.variants import from_file
from qsun.eval.study import study as study_module
from qsun.eval.study.report import Scores, markdown, plot_bits, plot_curve
from qsun.eval.study.study import Study, run_study, variants


def invented(study, tmp_path, seed=0):
    """Scores of every variant, drawn."""
    rng = random.Random(seed)
    right = {}
    for number in range(study.seeds):
        tasks = study_module.tasks_of(number)
        right[str(number)] = {
            task: {
                name: "".join(rng.choice("011") for _ in range(study.test))
                for name, _, _ in variants(study, tmp_path, number, task)
            }
            for task in tasks
        }
    return {"study": json.loads(json.dumps(study_module.asdict(study))), "right": right}


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
    for plot in (plot_bits, plot_curve):
        plot(scores, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_whole_study_and_its_second_run(cli, tmp_path, monkeypatch):
    out = tmp_path / "study"
    options = ("--seeds", 1, "--steps", 2, "--curve", "", "--align-steps", 1, "--test", 5, "--processes", 2)
    monkeypatch.setattr(Study.__init__, "__defaults__", _defaults(bits=(2,), methods=("rtn", "refined"), train=64))
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


def _defaults(**changes):
    fields = Study.__dataclass_fields__
    return tuple(changes.get(name, field.default) for name, field in fields.items())
