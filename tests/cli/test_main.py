"""The command line as a program: version, Ctrl-C, a closed pipe, and inputs from a configuration file."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny_models import prompt_rows, write_jsonl
from tests.warm_process import qsun_process

QSUN = [sys.executable, "-m", "qsun.cli.main"]
HANGS = 1800  # seconds: only against a test that never ends


@pytest.mark.parametrize("arguments", [("version",), ("--version",), ("-V",)])
def test_version(cli, arguments):
    from qsun._version import __version__

    assert cli(*arguments).out == f"qsun {__version__}\n"


def test_spellings_of_method_and_format(cli, tmp_path):
    answer = cli(
        "quantize", "demo", "-o", tmp_path / "out", "--method", "RTN", "--format", "Compressed_Tensors", "--dry-run"
    )
    assert answer.code == 0, answer.err


def test_calibration_in_the_configuration_file(cli, tmp_path):
    (tmp_path / "text.txt").write_text("calc 1+1>2\n" * 40)
    (tmp_path / "c.yaml").write_text(f"calib: {tmp_path / 'text.txt'}\nseq-len: 32\nsamples: 2\n")
    command = ("quantize", "demo", "-o", tmp_path / "out", "--config", tmp_path / "c.yaml", "--dry-run", "--json")
    assert json.loads(cli(*command).out)["calibration_tokens"] == 64
    (tmp_path / "c.yaml").write_text("calib: [1, 2]\n")
    answer = cli(*command)
    assert (answer.code, answer.out) == (2, "")
    assert "calib in config file" in answer.err
    assert "[1, 2] is not a string or a list of strings" in answer.err


def test_training_data_in_the_configuration_file(cli, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", prompt_rows(40))
    (tmp_path / "c.yaml").write_text(f"data: [{data}]\nsteps: 3\nbatch-size: 2\n")
    answer = cli("tune", "demo", "-o", tmp_path / "out", "--config", tmp_path / "c.yaml", "--dry-run", "--json")
    assert json.loads(answer.out)["steps"] == 3
    answer = cli("tune", "demo", "-o", tmp_path / "out", "--dry-run")
    assert answer.code == 2
    assert "no training data; give --data FILE" in answer.err


@pytest.mark.parametrize("command", ["quantize", "tune"])
def test_resume_without_an_earlier_run_says_so(cli, tmp_path, command):
    data = write_jsonl(tmp_path / "train.jsonl", prompt_rows(40))
    more = ["--data", data] if command == "tune" else ["--method", "rtn"]
    answer = cli(command, "demo", "-o", tmp_path / "out", "--resume", "--dry-run", *more)
    assert answer.code == 0
    assert f"nothing to resume: {tmp_path / 'out.partial'} does not exist" in answer.err


def test_ctrl_c_anywhere_is_one_line(cli, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qsun.model.inspection.describe", interrupt)
    answer = cli("inspect", "demo")
    assert (answer.code, answer.out, answer.err) == (130, "", "error: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["quantize", "tune"])
def test_ctrl_c_in_the_middle_keeps_what_is_finished(tmp_path, command):
    data = write_jsonl(tmp_path / "train.jsonl", prompt_rows(200))
    tune = ["--data", data, "--steps", "100000", "--eval-every", "2"]
    more = tune if command == "tune" else ["--samples", "32"]
    with qsun_process(command, "demo", "-o", tmp_path / "out", *more) as run:
        deadline = time.monotonic() + HANGS
        while not list((tmp_path / "out.partial").glob("**/*.safetensors")) and run.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        out, err = run.stdout.read(), run.stderr.read()
        run.wait(HANGS)
    assert run.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].startswith("error: interrupted; ")
    assert err.splitlines()[-1].endswith("--resume continues")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly():
    with subprocess.Popen([*QSUN, "inspect", "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()  # `qsun inspect demo | head -0`
        err = run.stderr.read()
        run.wait(HANGS)
    assert err == b""


def test_home_is_expanded_where_shells_leave_it(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    answer = cli("demo-data", "--out=~/data", "--count", "1", "--held-out", "1")
    assert answer.code == 0, answer.err
    assert (tmp_path / "data").is_dir()
    assert not (tmp_path / "~").exists()


def test_switches_of_the_configuration_file_can_be_switched_off(cli, tmp_path):
    (tmp_path / "c.yaml").write_text("method: rtn\nlm-head: true\n")
    command = ("quantize", "demo", "-o", tmp_path / "out", "--config", tmp_path / "c.yaml", "--dry-run", "--json")
    layers = [json.loads(cli(*command, *more).out)["quantized_layers"] for more in ((), ("--no-lm-head",))]
    assert layers[0] == layers[1] + 1


@pytest.mark.parametrize("command", ["quantize", "tune", "demo-data"])
def test_an_output_below_a_file_is_refused_at_once(cli, tmp_path, command):
    file = write_jsonl(tmp_path / "file", prompt_rows(40))
    more = {"quantize": ["demo", "--method", "rtn"], "tune": ["demo", "--data", file], "demo-data": []}[command]
    answer = cli(command, *more, "-o", file / "out")
    assert (answer.code, answer.out) == (2, "")
    assert (
        answer.err == f"error: output directory {file}/out cannot be created: {file} is a file; choose another place\n"
    )


@pytest.mark.slow
def test_a_terminal_without_unicode(tmp_path):
    directory = tmp_path / "模型"
    directory.mkdir()
    here = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [*QSUN, "demo-data", "-o", directory / "x", "--count", "1"], capture_output=True, env=here, check=False
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u6a21\u578b" in done.stdout
