"""`make gpu` needs torch, triton, transformers and pytest, and collects the tests of the GPU alone."""

import os
import runpy
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest

from tests.gpu import bench, floors, stages, wheels
from tests.places import ROOT
from tests.warm_process import WarmProcess

ABSENT = ["accelerate", "datasets", "fastapi", "lm_eval", "matplotlib", "openai", "peft", "prometheus_client"]
ABSENT += ["pydantic", "simpy", "uvicorn"]
BLOCK = dedent(f"""
    import sys
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {ABSENT!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    sys.meta_path.insert(0, Absent())
""")


def run(code, *arguments):
    command = [sys.executable, "-c", BLOCK + dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


class WarmPython(WarmProcess):
    """What bench.py wants of a Popen of Python, forked from a process that has torch and transformers already."""

    def __init__(self, command, cwd, stdout, stderr, start_new_session):
        assert command[0] == sys.executable and stdout is stderr and start_new_session
        super().__init__(run_script, command[1:], cwd, stdout.name)
        self.stdout.close()
        self.stderr.close()


def run_script(arguments, cwd, log):
    os.setsid()
    os.chdir(cwd)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def run_pytest(arguments):
    sys.exit(pytest.main(arguments))


@pytest.fixture
def few_plugins(monkeypatch):
    """Pytest without what other packages add to it, which takes two seconds to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_only_the_gpu_tests_are_collected():
    done = run(
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "--noconftest", "-m", "gpu", "tests/gpu", "--co"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {f"tests/gpu/test_{name}.py" for name in ("decode", "step", "lora", "products")}
    assert "tests/gpu/test_generation.py" in done.stdout
    assert "could not import 'accelerate'" in done.stdout
    assert "error" not in done.stdout.lower()


def test_the_kernel_stage_runs(tmp_path):
    code = "import runpy; runpy.run_path('tests/gpu/stages.py', run_name='__main__')"
    done = run(code, "kernels", tmp_path, "--device", "cpu", "--seconds", 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["kernel"] for row in floors.read(tmp_path, "kernels")} == {"bf16", "ours"}


def test_the_target_runs_it():
    done = subprocess.run(["make", "-n", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "tests/gpu/bench.py out/gpu" in done.stdout
    assert bench.command(bench.STAGES[0], Path("out"), "cuda", 60)[1:4] == [stages.__file__, "tests", "out"]
    command = stages.tests_command(Path("out"), "0/1")
    assert command[-len(stages.TEST_FILES) :] == stages.TEST_FILES
    assert {ROOT / file for file in stages.TEST_FILES} == {*(ROOT / "tests/gpu").glob("test_*.py")}


@pytest.mark.parametrize("seconds", [10, 100, 250, 520])
@pytest.mark.parametrize("taken", [0.1, 1.0])
def test_stages_stay_within_the_time(seconds, taken):
    """taken: the fraction of its share that each stage uses."""
    left, given = seconds, []
    for number, stage in enumerate(bench.STAGES):
        share = bench.stage_seconds(number, bench.STAGES, left)
        assert share == 0 or stage.least <= share <= min(stage.most, left)
        given.append(share)
        left -= taken * share
    assert left >= 0
    assert (0 in given) == (seconds == 10 or (seconds == 100 and taken == 1))


def test_nine_minutes_are_kept():
    """The longest run: ending a stage that does not want to end takes seconds, too."""
    assert 520 + len(bench.STAGES) * bench._KILL_SECONDS < 540


STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from pathlib import Path
from tests.gpu.bench import append
append(Path(sys.argv[1]), "serve", {"graphs": 3, "warm_seconds": 1.0})
with open(sys.argv[1] + "/serve.jsonl", "a") as file:
    file.write('{"requests": 4, "prom')
    file.flush()
    time.sleep(600)
"""


def test_a_stage_that_hangs_is_ended_and_its_results_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "command", lambda stage, folder, *_: [sys.executable, "-c", STUBBORN, str(folder)])
    monkeypatch.setattr(bench, "_KILL_SECONDS", 0.5)
    stages = [bench.Stage("hangs", 1, 6), bench.Stage("long", 500, 600)]
    started = time.monotonic()
    assert bench.run(tmp_path, "cpu", 20, stages, started)
    assert time.monotonic() - started < 15
    text = (tmp_path / "report.md").read_text()
    assert "- hangs: ended, its time was over, " in text
    assert "- long: left out, needs 500 seconds" in text
    assert "3 graphs captured in 1.0 s" in text


OUTCOMES = """
import time
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong(): assert 1 + 1 == 3
@pytest.mark.skip
def test_left_out(): pass
def test_hangs(): time.sleep(600)
def test_never(): pass
"""


def test_failures_count_although_the_time_is_over(few_plugins, tmp_path, monkeypatch):
    """Each test's outcome is on the disk before the next begins."""
    file, folder = tmp_path / "test_some.py", tmp_path / "out"
    file.write_text(OUTCOMES)
    folder.mkdir()
    monkeypatch.setattr(bench, "command", lambda *_: stages.tests_command(folder, "0/1", [file]))
    monkeypatch.setattr(bench, "_KILL_SECONDS", 0.5)
    assert not bench.run(folder, "cpu", 40, [bench.Stage("tests", 1, 25)], time.monotonic())
    assert [row["status"] for row in floors.read(folder, "stages")] == [None]
    text = (folder / "report.md").read_text()
    assert "- tests: 1 passed, 1 failed, 1 skipped, 2 of 5 not run" in text
    assert "test_some.py::test_wrong: assert (1 + 1) == 3" in text


def test_parts_share_out_the_tests(few_plugins, tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(OUTCOMES.replace("time.sleep(600)", "pass"))
    for part in range(2):
        command = stages.tests_command(tmp_path, f"{part}/2", [file])
        assert command[:3] == [sys.executable, "-m", "pytest"]
        with WarmProcess(run_pytest, command[3:]) as process:
            process.wait(600)
    assert floors.tests_line(tmp_path) == "- tests: 3 passed, 1 failed, 1 skipped, 0 of 5 not run"


def test_results_of_an_earlier_run_are_removed(tmp_path):
    for name in ("step.jsonl", "tests.xml", "tests.log", "report.md"):
        (tmp_path / name).write_text("")
    (tmp_path / "Old-GPU.json").write_text((ROOT / "kernels/configs/default.json").read_text())
    (tmp_path / "own.json").write_text('{"own": 1}')
    bench.remove_results(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["own.json"]


@pytest.mark.slow
def test_what_was_measured_survives_a_kill_of_everything(tmp_path):
    command = [sys.executable, "tests/gpu/bench.py", tmp_path, "--device", "cpu", "--stages", "kernels,serve,step"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not floors.read(tmp_path, "kernels") and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    floors.write_report(tmp_path)
    assert "| ours, 4 bits |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_the_whole_run_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["bench.py", str(tmp_path), "--device", "cpu", "--stages", "step,kernels,serve,tune"]
    )
    named = SimpleNamespace(Popen=WarmPython, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(bench, "subprocess", named)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            bench.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().out
    assert not left.value.code, said
    for wanted in ("Decode step, tiny", "3 requests of 8 + 4 tokens", "Slower than bf16"):
        assert wanted in said
    for stage in ("step", "kernels", "serve", "tune"):
        assert f"- {stage}: done, " in said


def test_the_report_compares_with_floors_and_goals(tmp_path):
    place = {"model": "m", "batch": 8, "context": 1024}
    for variant, ratio in (("sun", 1.0), ("qsun", 2.3)):
        timed = {"floor_ms": 2.0, "tpot_ms": 4.0, "bandwidth_percent": 50.0, "ratio_to_sun": ratio}
        bench.append(tmp_path, "step", {**place, "variant": variant, **timed})
    shape = {"model": "m", "layer": "qkv", "N": 64, "K": 32, "M": 8}
    for kernel, ratio in (("bf16", 1.0), ("ours", 0.5)):
        timed = {"microseconds": 10.0, "bandwidth_percent": 40.0, "ratio_to_bf16": ratio}
        bench.append(tmp_path, "kernels", {**shape, "kernel": kernel, **timed})
    text = floors.report(tmp_path)
    assert "| 8 | 1024 | qsun | 2.00 | 4.00 | 50% | 2.30 | 2.2 |" in text
    assert "| m | qkv 64x32 | 8 | ours, 4 bits | 4.0 | 10.0 | 40% | 0.50 |" in text
    assert "- m qkv M=8, 4 bits: 0.50 of bf16's speed" in text
    assert "an unknown machine" in text


def test_wheels_are_pinned_and_complete():
    listed = wheels.lines(["transformers", "pytest"], {"torch"})
    assert f"transformers=={version('transformers')}" in listed
    assert {line.partition("==")[0] for line in listed} >= {"tokenizers", "safetensors", "pluggy", "huggingface-hub"}
    assert not [line for line in listed if line.startswith("torch=")]
    assert wheels.lines(["no-such-package-here"]) == ["no-such-package-here"]
    assert all("+" not in line for line in wheels.lines(["torch"]))
    assert "pyyaml" in wheels.closure(["PyYAML"]) and not wheels.closure(["Hugging_Face.Hub"], {"hugging-face-hub"})


def test_a_list_with_torch_says_what_is_missing(monkeypatch, capsys):
    for have, said in (("", "Install torch with CUDA on that machine first"), ("Torch,triton", "")):
        monkeypatch.setattr(sys, "argv", ["wheels.py", "--have", have])
        wheels.main()
        assert said in capsys.readouterr().err
