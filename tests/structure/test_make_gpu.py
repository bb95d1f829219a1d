"""`make gpu` needs torch, triton, transformers and pytest, and collects the tests of the GPU alone."""

import subprocess
import sys
from textwrap import dedent

from tests.places import ROOT

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


def test_only_the_gpu_tests_are_collected():
    done = run(
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "--noconftest", "-m", "gpu", "tests/gpu", "--co"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {"tests/gpu/test_decode.py", "tests/gpu/test_int4.py"}
    assert "tests/gpu/test_generation.py" in done.stdout
    assert "could not import 'accelerate'" in done.stdout
    assert "error" not in done.stdout.lower()


def test_the_bench_runs(tmp_path):
    done = run("import runpy; runpy.run_path('tests/gpu/bench.py', run_name='__main__')", tmp_path, "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ours" in (tmp_path / "kernels.json").read_text()


def test_the_target_runs_them():
    done = subprocess.run(["make", "-n", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--noconftest -m gpu tests/gpu" in done.stdout
    assert "tests/gpu/bench.py" in done.stdout
