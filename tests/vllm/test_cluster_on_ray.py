"""Real vLLM on this machine's CPU through `qsun up --ray`: replicas of Ray Serve, NIXL between them, the same exchange.

The reference is `qsun.generate` in float32, as in test_cluster.py. Tests run in order.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.oracles.compare import record
from tests.oracles.conftest import ENVIRONMENTS, PROBE_SETTINGS
from tests.places import ROOT
from tests.vllm.asking import DEADLINE_SECONDS, LENGTHS, Request, ask_all, prompt, reference
from tests.vllm.cluster_files import MODELS, make_modules, write_cluster

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'qsun[ray]'")
pytestmark = pytest.mark.oracle

PAIRS = 4


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    return make_modules(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def url(modules):
    python = ENVIRONMENTS / "vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment 'vllm'; `make vllm` makes it")
    root = modules["base"].parent
    file = write_cluster(root, python, ray={"cpus": 0.5})
    said = root / "up.err"
    command = [sys.executable, "-m", "qsun.cli.main", "up", str(file), "--ray", "--logs", str(root / "logs"), "--json"]
    environment = os.environ | PROBE_SETTINGS | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    started = time.monotonic()
    with said.open("w") as errors:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline()  # ends at launch.start_seconds at the latest
        assert line, said.read_text()[-6000:]
        found = json.loads(line)["url"]
        wait_for(lambda: warm_pairs(found) == PAIRS)
        record("vllm on Ray", warm_seconds=round(time.monotonic() - started))
        yield found
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
        process.stdout.close()
    assert process.returncode == 0


def warm_pairs(url):
    return httpx.get(f"{url}/ready", timeout=60, trust_env=False).json()["warm_pairs"]


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def expected(modules):
    return reference(modules)


def test_64_concurrent_requests_over_both_models(url, expected):
    requests = [
        Request(model, prompt(length, seed), stream)
        for seed, length in enumerate(LENGTHS * 2)
        for model in MODELS
        for stream in (False, True)
    ]
    assert len(requests) == 64
    started = time.monotonic()
    answers = ask_all(url, requests)
    record("vllm on Ray", requests=len(requests), seconds=round(time.monotonic() - started))
    wrong = [request for request, a, b in zip(requests, answers, expected(requests), strict=True) if a != b]
    assert wrong == []


def test_a_decode_engine_killed_under_load_comes_back(url, expected):
    """Every request ends with the right tokens or an error; Serve starts another replica."""
    requests = [
        Request(MODELS[seed % 2], prompt(LENGTHS[seed % 8], 100 + seed), seed % 4 < 2, 96) for seed in range(32)
    ]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_all, url, requests)
        time.sleep(5.0)
        os.kill(a_decode_engine(), signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: warm_pairs(url) < PAIRS)
        wait_for(lambda: warm_pairs(url) == PAIRS)
        back = time.monotonic() - killed
        answers = asked.result(DEADLINE_SECONDS)
    failed = [answer for answer in answers if isinstance(answer, openai.APIError)]
    record("vllm on Ray", killed_under=len(requests), failed=len(failed), seconds_until_back=round(back))
    for answer, wanted in zip(answers, expected(requests), strict=True):
        so_far = getattr(answer, "tokens", []) if isinstance(answer, openai.APIError) else answer
        assert so_far == wanted[: len(so_far)]
        assert isinstance(answer, openai.APIError) or answer == wanted
    assert len(failed) < len(requests)
    after = [Request(model, prompt(129, 500), stream) for model in MODELS for stream in (False, True)]
    assert ask_all(url, after) == expected(after)


def a_decode_engine():
    """The pid of a decode replica's vLLM."""
    from tests.serve.ray.rig import processes

    return processes("vllm.entrypoints.openai.api_server", "kv_consumer")[0]
