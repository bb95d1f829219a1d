"""`qsun up --ray` as a process of its own, on a Ray of this machine, with pretend vLLMs.

One test of many steps: a Ray takes long to start, and tests of a module may run in several processes.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys

import httpx
import pytest
import yaml

from tests.places import ROOT
from tests.serve.ray.rig import cluster_values, engines, kill, make_modules, many, processes, until, warm

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'qsun[ray]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

PAIRS = 4
SETTINGS = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 would have other tests starve it
}
DEADLINE_SECONDS = 300


@pytest.fixture
def root(tmp_path):
    make_modules(tmp_path)
    return tmp_path


@pytest.fixture
def up(root):
    """The running command; `url` says where."""
    file = root / "cluster.yaml"
    values = cluster_values(root, token_seconds=0.02)
    values["ray"]["resources"] = {"slot": 0.5}  # of which this machine's Ray must say that it has enough
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "qsun.cli.main", "up", str(file), "--ray", "--json"]
    said = root / "said"
    with said.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | SETTINGS,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        line = process.stdout.readline()  # ends at launch.start_seconds at the latest
        assert line, said.read_text()[-4000:]
        process.url = json.loads(line)["url"]
        until(lambda: warm(process.url, PAIRS))
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=DEADLINE_SECONDS)
        process.stdout.close()


def test_from_cold_to_warm_two_deaths_and_down_again(up, root):
    each_model_answers_with_its_own_module(up)
    a_request_keeps_its_id(up)
    errors_are_openais(up)
    a_client_that_leaves_ends_its_request_in_vllm(up, root)
    for role in ("decode", "prefill"):
        an_engine_that_dies_under_load_comes_back(up, root, role)
    sigterm_takes_all_down(up, root)


def each_model_answers_with_its_own_module(up):
    assert asyncio.run(many(up.url, range(32))) == {"right": 32}


def a_request_keeps_its_id(up):
    body = {"model": "math", "prompt": "a b", "max_tokens": 2}
    answer = httpx.post(f"{up.url}/v1/completions", json=body, headers={"X-Request-Id": "mine"}, trust_env=False)
    assert answer.headers.get_list("x-request-id") == ["mine"]


def errors_are_openais(up):
    answer = httpx.post(f"{up.url}/v1/completions", json={"model": "none", "prompt": "a"}, trust_env=False)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


def a_client_that_leaves_ends_its_request_in_vllm(up, root):
    body = {"model": "math", "prompt": "a b", "max_tokens": 4000, "stream": True}
    with httpx.stream("POST", f"{up.url}/v1/completions", json=body, trust_env=False) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    logs = root / "logs"
    until(lambda: any("a request was cancelled" in log.read_text() for log in logs.glob("decode-*.log")))


def an_engine_that_dies_under_load_comes_back(up, root, role):
    async def killed_under_load():
        load = asyncio.ensure_future(many(up.url, range(100, 164), tokens=30))
        await asyncio.sleep(1.0)
        kill(engines(root, role)[0])
        return await load

    ended = asyncio.run(killed_under_load())
    assert ended["right"] > 0
    assert set(ended) <= {"right", "cut off", "status 502", "status 503"}, ended
    until(lambda: warm(up.url, PAIRS))
    assert asyncio.run(many(up.url, range(200, 216))) == {"right": 16}


def sigterm_takes_all_down(up, root):
    assert len(engines(root)) == PAIRS
    up.send_signal(signal.SIGTERM)
    assert up.wait(timeout=DEADLINE_SECONDS) == 0
    until(lambda: engines(root) == [], seconds=20)
    until(lambda: processes("ray::ServeReplica", "qsun") == [], seconds=20)
