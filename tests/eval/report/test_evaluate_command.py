"""`qsun eval` from the command line: its numbers are those of the parts measured directly."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qsun.config import QuantConfig
from qsun.demo import base_directory, calibration_file
from qsun.demo.tasks import check, examples, write_jsonl
from qsun.engine.generation import generate
from qsun.errors import QsunError
from qsun.eval.harness.divergence import response_divergence
from qsun.eval.report.evaluation import Evaluation, evaluate
from qsun.eval.report.variants import Entry, Matrix
from qsun.quantization.run import quantize
from qsun.runtime.decode_module import load_decode
from qsun.runtime.prefill_module import load_prefill
from qsun.tuning.config import TuneConfig
from qsun.tuning.examples import read_examples
from qsun.tuning.tuner import tune

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("short_index")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a 3-bit decode module, and a prefill module after a few steps of tuning."""
    path = tmp_path_factory.mktemp("evaluate")
    write_jsonl(path / "train.jsonl", examples("code", "train", 600))
    write_jsonl(path / "valid.jsonl", examples("code", "valid", 12))
    quantize("demo", path / "int3", QuantConfig(method="rtn", bits=3, group_size=32, sym=False), device="cpu")
    config = TuneConfig(steps=30, batch_size=32, lr=3e-3)
    tune("demo", path / "sun", path / "train.jsonl", config, eval_data=path / "valid.jsonl", device="cpu")
    return path


@pytest.mark.slow
def test_a_report_of_two_variants(cli, folder, tmp_path, demo_tokenizer):
    out = tmp_path / "report"
    pair = ("--decode", folder / "int3", "--prefill", folder / "sun")
    rest = ("--tasks", "qsun_code", "--limit", 24, "--responses", folder / "valid.jsonl")
    text = ("--text", calibration_file(), "--windows", "4x64")
    answer = cli("eval", *pair, *rest, *text, "-o", out, "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert report["variants"] == ["base", "SUN", "QSUN int3"] and report["reference"] == "SUN"
    decoders = {
        "SUN": load_decode("demo", "cpu", "float32"),
        "QSUN int3": load_decode(folder / "int3", "cpu", "float32"),
    }
    prefill = load_prefill(folder / "sun", dtype="float32", device="cpu")
    held_out, _ = read_examples([str(folder / "valid.jsonl")], demo_tokenizer, 512)
    for name, decode in decoders.items():
        asked = examples("code", "test", 500)[:24]
        answers = generate(prefill, decode, [example.prompt for example in asked], max_new_tokens=64)
        rate = sum(map(check, ["code"] * 24, asked, answers)) / 24
        assert report["accuracy"]["qsun_code"][name]["rate"] == pytest.approx(rate)
        loss = response_divergence(prefill.model, decode.model, decode.model, held_out).loss
        assert report["responses"][name]["loss"] == pytest.approx(loss, rel=1e-4)
    assert report["responses"]["SUN"]["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert report["text"]["QSUN int3"]["mean_kl"] > 0.001 and report["text"]["base"]["top1"] == 1
    assert report["bits"] == {"base": 16, "SUN": 16, "QSUN int3": 3}
    assert report["provenance"]["command"].startswith("qsun eval --decode")
    assert "QSUN int3" in (out / "report.md").read_text() and "data:image/png" in (out / "report.html").read_text()
    again = cli("eval", *pair, *rest, *text, "-o", out)
    assert again.code == 2 and "exists" in again.err
    parts = {p: p.stat().st_mtime_ns for p in (out / "parts").iterdir()}
    (out / "parts/001-qsun_code.json").unlink()
    resumed = cli("eval", *pair, *rest, *text, "-o", out, "--resume")
    assert resumed.code == 0 and " points below SUN (95% CI" in resumed.out
    assert sum(p.stat().st_mtime_ns != before for p, before in parts.items()) == 1
    assert json.loads((out / "report.json").read_text())["accuracy"] == report["accuracy"]
    other = cli("eval", *pair, "--tasks", "qsun_code", "-o", out, "--resume")
    assert other.code == 2 and "started with another" in other.err


def test_a_matrix_of_responses_needs_no_tasks(cli, folder, tmp_path):
    file = folder / "matrix.yaml"
    file.write_text(
        "variants: [{name: SUN, prefill: sun, decode: demo, responses: valid.jsonl}, {name: base, model: demo}]"
    )
    answer = cli("eval", "--matrix", file, "-o", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert list(report["responses"]) == ["SUN"] and not report["accuracy"]
    file.write_text("variants: [{name: base, model: demo}]")
    assert "nothing to evaluate" in cli("eval", "--matrix", file, "-o", tmp_path / "other").err


def test_every_pair_is_checked_though_the_prefill_module_is_loaded_once(cli, folder, talking_model, tmp_path):
    file = folder / "wrong.yaml"
    file.write_text(
        "variants: [{name: SUN, prefill: sun, decode: demo, responses: valid.jsonl}, "
        f"{{name: wrong, prefill: sun, decode: {talking_model}, responses: valid.jsonl}}]"
    )
    answer = cli("eval", "--matrix", file, "-o", tmp_path / "out")
    assert answer.code == 2 and "does not fit" in answer.err, answer.err
    assert [part.name for part in (tmp_path / "out/parts").iterdir()] == ["000-responses.json"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give either --decode"),
        (("--decode", "demo", "--matrix", "x.yaml"), "give either --decode"),
        (("--decode", "demo"), "nothing to evaluate"),
        (("--decode", "nowhere", "--tasks", "qsun_code"), "nowhere is not a directory"),
        (("--decode", "demo", "--tasks", "qsun_maths"), "task 'qsun_maths' is not known to lm-eval; similar are qsun"),
        (("--decode", "demo", "--tasks", "humaneval_local"), "allow that with --allow-code-execution"),
        (("--decode", "demo", "--text", "x.txt", "--windows", "4"), "--windows '4' is not of the form 64x256"),
        (("--decode", "demo", "--speed", "llama-9"), "shape 'llama-9' is not known; use one of llama"),
        (("--decode", "demo", "--speed", "qsun.json"), "qsun.json is not a speed.json"),
        (("--decode", "demo", "--tasks", "qsun_code", "--device", "tpu9"), "device 'tpu9' is not known"),
        (("--decode", "demo", "--tasks", "qsun_code", "--dtype", "int7"), "--dtype"),
        (("--matrix", "x.yaml", "--prefill", "demo"), "omit --prefill, --full-ft and --base"),
        (("--decode", "demo", "--speed", "modules"), "needs a quantized decode module"),
    ],
)
def test_bad_input_is_one_line(cli, tmp_path, options, says):
    answer = cli("eval", *options, "-o", tmp_path / "out")
    assert answer.code == 2 and says in answer.err
    assert len([line for line in answer.err.splitlines() if line.startswith("error")]) == 1
    assert not (tmp_path / "out/report.json").exists()


def test_responses_are_read_before_anything_is_computed(cli, folder, tmp_path):
    later = tmp_path / "later.jsonl"
    command = (
        "eval",
        "--decode",
        folder / "int3",
        "--tasks",
        "qsun_code",
        "--responses",
        later,
        "-o",
        tmp_path / "out",
    )
    for text, says in ((None, "does not exist"), ('{"prompt": "a>"}\n', "needs")):
        if text:
            later.write_text(text)
        answer = cli(*command)
        assert answer.code == 2 and f"{later}" in answer.err and says in answer.err, answer.err
        assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_refused_before_data_is_read(cli, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    answer = cli("eval", "--decode", folder / "int3", "--text", tmp_path / "none.txt", "-o", tmp_path / "out")
    assert answer.code == 2 and "exists; choose another" in answer.err, answer.err


def test_shares_of_two_metrics_are_not_compared(folder, tmp_path, monkeypatch):
    metrics = iter(["bleu_max", "bleu_acc"])
    shares = {"values": [0.0, 1.0], "all": {}, "version": {}}
    monkeypatch.setattr("qsun.eval.report.evaluation.run_task", lambda *_: {"metric": next(metrics), **shares})
    entries = tuple(Entry(name, str(folder / "int3"), str(folder / "int3")) for name in ("a", "b"))
    job = Evaluation(Matrix(entries, ("qsun_code",), "a"), device="cpu")
    with pytest.raises(QsunError, match="task qsun_code gives bleu_max for a, and bleu_acc for b"):
        evaluate(job, tmp_path / "out")


@pytest.fixture
def orphan(folder, tmp_path):
    """The decode module, which no longer says from which base it was made."""
    shutil.copytree(folder / "int3", tmp_path / "orphan")
    manifest = tmp_path / "orphan/qsun.json"
    made = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in made.items() if key != "base"}))
    return tmp_path / "orphan"


def test_a_base_that_the_module_does_not_name(cli, folder, orphan, tmp_path):
    rest = ("--text", calibration_file(), "--windows", "2x32", "--responses", folder / "valid.jsonl", "--json")
    named = cli("eval", "--decode", folder / "int3", *rest, "-o", tmp_path / "named")
    given = cli("eval", "--decode", orphan, "--base", "demo", *rest, "-o", tmp_path / "given")
    assert given.code == 0, given.err
    file = tmp_path / "matrix.yaml"
    file.write_text(
        "variants: [{name: base, model: demo}, {name: base int3, prefill: demo, decode: orphan, base: demo}]"
    )
    listed = cli("eval", "--matrix", file, *rest, "-o", tmp_path / "listed")
    assert listed.code == 0, listed.err
    reports = [json.loads(answer.out) for answer in (named, given, listed)]
    for kind in ("responses", "text"):
        numbers = [{name: row["mean_kl"] for name, row in report[kind].items()} for report in reports]
        assert numbers[0] == numbers[1] == numbers[2] and numbers[0]["base int3"] > 0
    file.write_text("variants: [{name: base, model: demo}, {name: int3, prefill: demo, decode: orphan}]")
    early = cli("eval", "--matrix", file, *rest, "-o", tmp_path / "early")
    assert early.code == 2 and "does not say from which base" in early.err
    assert not (tmp_path / "early").exists()


def _shift(directory):
    """Change the weights at a path without its qsun.json, as another program's fine-tune would."""
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    save_file(tensors | {name: tensors[name] + 0.1}, file, {"format": "pt"})


@pytest.mark.parametrize("changed", ["prefill", "decode", "base", "text", "responses"])
def test_a_resumed_run_is_held_to_what_lies_behind_its_paths(cli, folder, tmp_path, changed):
    shutil.copytree(base_directory(), tmp_path / "base")
    shutil.copytree(base_directory(), tmp_path / "prefill")
    shutil.copytree(folder / "int3", tmp_path / "decode")
    shutil.copyfile(calibration_file(), tmp_path / "text.txt")
    shutil.copyfile(folder / "valid.jsonl", tmp_path / "valid.jsonl")
    options = [
        *("--decode", tmp_path / "decode", "--prefill", tmp_path / "prefill", "--base", tmp_path / "base"),
        *("--text", tmp_path / "text.txt", "--windows", "2x16", "--responses", tmp_path / "valid.jsonl"),
        *("-o", tmp_path / "out"),
    ]
    assert cli("eval", *options).code == 0
    again = cli("eval", *options, "--resume")
    assert again.code == 0, again.err
    file = {"text": tmp_path / "text.txt", "responses": tmp_path / "valid.jsonl"}.get(changed)
    if file:
        file.write_bytes(file.read_bytes() + b"\n")
    else:
        _shift(tmp_path / changed)
    what = f"file {file}" if file else f"module {tmp_path / changed}"
    other = cli("eval", *options, "--resume")
    assert other.code == 2 and f"error: {what} has changed since {tmp_path / 'out'} was started" in other.err


def test_responses_that_each_variant_reads_cannot_be_a_pipe(cli, tmp_path, pipe):
    answer = cli("eval", "--decode", "demo", "--responses", pipe(), "-o", tmp_path / "out")
    assert answer.code == 2
    assert "is a pipe, which can be read only once" in answer.err
