"""`qsun up` as its own process, with a stand-in for vLLM: start, warm-up, the death of a worker, shutdown."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.adapter_rig import write_adapter
from tests.places import ROOT

FAKE = Path(__file__).with_name("fake_engine")
DEADLINE_SECONDS = 120


@pytest.fixture
def cluster_file(tmp_path):
    """cluster_file(**launch): two decode workers, one prefill worker, all of the demo base."""

    def write(**launch):
        values = {
            "listen": {"port": 0},
            "decode": {"module": "demo", "workers": 2},
            "models": {"math": {"module": "demo", "workers": 1}},
            "health": {"interval_seconds": 0.2},
            "launch": {"device": "cpu", "kernels": "vllm", "start_seconds": 60.0, **launch},
        }
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def up(tmp_path):
    """up(file): the running command, its stderr in a file. path: where Python looks for modules."""
    running = []

    def start(file, path=(ROOT, FAKE)):
        said = tmp_path / "said"
        command = [sys.executable, "-m", "qsun.cli.main", "up", str(file), "--logs", str(tmp_path / "logs"), "--json"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
        with said.open("w") as errors:
            process = subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        process.said = said
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=DEADLINE_SECONDS)
        process.stdout.close()


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def group_is_gone(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_tells_of_a_death_and_takes_all_down(cluster_file, up, end):
    process = up(cluster_file())
    ready = json.loads(process.stdout.readline())
    workers = {worker["name"]: worker for worker in ready["workers"]}
    assert list(workers) == ["decode-0", "decode-1", "prefill-0-math"]
    body = {"model": "math", "prompt": [1, 5, 6, 7], "max_tokens": 1}
    assert httpx.post(f"{ready['url']}/v1/completions", json=body, trust_env=False).status_code == 200
    os.killpg(workers["decode-1"]["pid"], signal.SIGKILL)
    wait_for(lambda: "it is not restarted" in process.said.read_text())
    assert "worker decode-1" in process.said.read_text()
    for _ in range(4):
        assert httpx.post(f"{ready['url']}/v1/completions", json=body, trust_env=False).status_code == 200
    process.send_signal(end)
    assert process.wait(timeout=DEADLINE_SECONDS) == 0
    assert all(group_is_gone(worker["pid"]) for worker in workers.values())


@pytest.mark.slow
def test_adapters_have_prefill_workers_in_common(base_directory, up, tmp_path):
    for number, name in enumerate(("math", "code")):
        write_adapter(tmp_path / name, base_directory, number)
    values = {
        "listen": {"port": 0},
        "decode": {"module": str(base_directory), "workers": 1},
        "prefill": {"module": str(base_directory), "workers": 1},
        "models": {"math": {"adapter": "math"}, "code": {"adapter": "code"}},
        "health": {"interval_seconds": 0.2},
        "launch": {"device": "cpu", "kernels": "vllm", "start_seconds": 60.0},
    }
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(values))
    process = up(file)
    ready = json.loads(process.stdout.readline())
    assert [worker["name"] for worker in ready["workers"]] == ["decode-0", "prefill-0-adapters"]
    for name in ("math", "code"):
        body = {"model": name, "prompt": [1, 5, 6, 7], "max_tokens": 1}
        assert httpx.post(f"{ready['url']}/v1/completions", json=body, trust_env=False).json()["model"] == name
    process.terminate()
    assert process.wait(timeout=DEADLINE_SECONDS) == 0


@pytest.mark.slow
def test_a_worker_that_cannot_start_shows_why(cluster_file, up):
    process = up(cluster_file(environment={"FAKE_VLLM": "die"}))
    assert process.wait(timeout=DEADLINE_SECONDS) == 2
    said = process.said.read_text()
    assert "RuntimeError: no kernel for this" in said
    assert said.splitlines()[-1].startswith("error: worker ")


@pytest.mark.slow
def test_an_invalid_key_is_reported_before_workers_start(cluster_file, up, tmp_path):
    file = cluster_file()
    (tmp_path / "keys").write_text("short\n")
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(values | {"listen": {"port": 0, "api_keys": str(tmp_path / "keys")}}))
    process = up(file)
    assert process.wait(timeout=DEADLINE_SECONDS) == 2
    said = process.said.read_text()
    assert "an API key of 5 characters is invalid" in said
    assert "starting" not in said
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_ctrl_c_before_it_is_warm(cluster_file, up):
    process = up(cluster_file(environment={"FAKE_VLLM": ""}, decode_arguments=["--port", "1"]))
    wait_for(lambda: "starting decode-0" in process.said.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=DEADLINE_SECONDS) == 130


def started(tmp_path):
    """Pids of the three workers, once all have started and take signals."""
    logs = [tmp_path / "logs" / f"{name}.log" for name in ("decode-0", "decode-1", "prefill-0-math")]
    wait_for(lambda: all(log.exists() and log.read_text().startswith("pid ") for log in logs))
    return [int(log.read_text().split()[1]) for log in logs]


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_impatience_while_the_workers_end(cluster_file, up, tmp_path, first):
    """Workers take 3 s to exit. Whatever signals come meanwhile, the command reports their end only when it is true."""
    process = up(cluster_file(environment={"FAKE_VLLM": "deaf lingers"}))
    workers = started(tmp_path)
    for number in (first, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.3)
    assert process.wait(timeout=DEADLINE_SECONDS) == 130
    assert process.said.read_text().splitlines()[-1].endswith("all workers have ended")
    assert all(map(group_is_gone, workers))


@pytest.mark.slow
def test_hanging_up_before_and_after_the_router(cluster_file, up, tmp_path):
    process = up(cluster_file(environment={"FAKE_VLLM": "lingers"}))
    wait_for(lambda: "starting decode-0" in process.said.read_text())
    process.send_signal(signal.SIGHUP)
    assert json.loads(process.stdout.readline())["models"] == ["math"]
    workers = started(tmp_path)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: "ending the workers" in process.said.read_text())
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.3)
    assert process.wait(timeout=DEADLINE_SECONDS) == 0
    assert all(map(group_is_gone, workers))


@pytest.mark.slow
def test_the_files_environment_may_say_where_vllm_is(cluster_file, up):
    path = os.pathsep.join(map(str, (ROOT, FAKE)))
    process = up(cluster_file(environment={"PYTHONPATH": path}), path=[ROOT])
    line = process.stdout.readline()
    assert line, process.said.read_text()
    assert len(json.loads(line)["workers"]) == 3


def test_print_shows_what_would_run(cluster_file, cli):
    answer = cli("up", cluster_file(first_port=18200, environment={"A": "b c"}), "--print")
    assert answer.code == 0
    commands = [shlex.split(line) for line in answer.out.splitlines() if line.startswith("env ")]
    assert len(commands) == 3
    decode, prefill = commands[0], commands[2]
    assert "A=b c" in decode
    assert "VLLM_NIXL_SIDE_CHANNEL_PORT=18201" in decode
    assert "--no-enable-prefix-caching" in decode
    assert "--no-enable-prefix-caching" not in prefill
    assert json.loads(prefill[prefill.index("--kv-transfer-config") + 1])["kv_role"] == "kv_producer"


def test_print_for_scripts(cluster_file, cli):
    answer = json.loads(cli("up", cluster_file(), "--print", "--json").out)
    assert list(answer) == ["workers"]
    assert [worker["model"] for worker in answer["workers"]] == [None, None, "math"]


def test_an_environment_without_vllm(cluster_file, cli, tmp_path):
    answer = cli("up", cluster_file(), "--logs", tmp_path / "logs")
    assert answer.code == 2
    assert "has no vllm; install vLLM there, or name another environment" in answer.err


def test_nothing_to_start(cluster_file, cli):
    file = cluster_file()
    values = yaml.safe_load(file.read_text())
    values["decode"]["workers"] = values["models"]["math"]["workers"] = ["http://127.0.0.1:1"]
    values["decode"]["workers"] = ["http://127.0.0.1:2"]
    file.write_text(yaml.safe_dump(values))
    assert "use `qsun route` for running workers" in cli("up", file).err
