"""`qsun up` as a process of its own, on a Ray of this machine, with pretend vLLMs.

Few tests of many steps: a Ray takes long to start, and tests of a module may run in several processes.
"""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.serve.ray.rig import (
    DEADLINE_SECONDS,
    cluster_values,
    engines,
    environment,
    kill,
    make_modules,
    many,
    processes,
    ready,
    started,
    until,
    warm,
)
from tests.vllm.listening import is_loopback, listening_addresses

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'qsun[ray]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

PAIRS = 4


@pytest.fixture(autouse=True)
def one_at_a_time():
    """Ray gives up on a node that takes 30 s to start, as on two cores two may."""
    with (Path(tempfile.gettempdir()) / f"qsun-tests-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def root(tmp_path):
    make_modules(tmp_path)
    return tmp_path


def with_mode(root, mode):
    """cluster.yaml's values with vLLMs that misbehave."""
    values = cluster_values(root)
    values["launch"]["environment"]["FAKE_VLLM"] = mode
    return values


@contextmanager
def warm_cluster(root, values, pairs=PAIRS):
    """The running command, once all pairs are warm; `url` says where."""
    with started(root, values) as process:
        line = process.stdout.readline()  # ends at launch.start_seconds at the latest
        assert line, process.said()[-4000:]
        process.url = json.loads(line)["url"]
        until(lambda: warm(process.url, pairs))
        yield process


def nothing_is_left(root):
    until(lambda: engines(root) == [], seconds=20)
    until(lambda: of_this_test(root) == [], seconds=20)


def of_this_test(root):
    """Pids of all processes of Ray that a test has started."""
    return [pid for pid in processes("ray") if f"TEST_ROOT={root}\0" in environment(pid)]


def test_from_cold_to_warm_two_deaths_a_new_module_and_down_again(root):
    values = cluster_values(root, token_seconds=0.02)
    values["limits"]["drain_seconds"] = 120.0  # other tests may take most of the machine
    values["ray"]["resources"] = {"slot": 0.5}  # of which this machine's Ray must say that it has enough
    with warm_cluster(root, values) as up:
        each_model_answers_with_its_own_module(up)
        a_request_keeps_its_id(up)
        errors_are_openais(up)
        all_listen_on_the_loopback_address(root)
        engines_have_the_priority_of_the_command(up, root)
        a_client_that_leaves_ends_its_request_in_vllm(up, root)
        for role in ("decode", "prefill"):
            an_engine_that_dies_under_load_comes_back(up, root, role)
        a_hangup_applies_the_file(up, root, values)
        a_signal_lets_requests_finish_and_takes_all_down(up, root, signal.SIGTERM)


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


def all_listen_on_the_loopback_address(root):
    """But for the port at which a replica takes gRPC calls, which wants Ray's token."""
    replicas = processes("ray::ServeReplica")
    for pid in replicas:
        outside = [port for address, port in listening_addresses([pid]) if not is_loopback(address)]
        assert len(outside) <= 1, outside
    others = [pid for pid in of_this_test(root) if pid not in replicas]
    found = listening_addresses([*others, *engines(root)])
    assert len(found) > 10
    assert [address for address, _ in found if not is_loopback(address)] == []


def engines_have_the_priority_of_the_command(up, root):
    nice = {os.getpriority(os.PRIO_PROCESS, pid) for pid in (up.pid, *engines(root))}
    assert len(nice) == 1


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


def a_hangup_applies_the_file(up, root, values):
    """A faulty file changes nothing. A module in another directory replaces the replicas of its model only."""
    file, decode, before = root / "cluster.yaml", engines(root, "decode"), workers_of(up, "math")
    file.write_text("models: {}")
    up.send_signal(signal.SIGHUP)
    until(lambda: "decode is missing" in up.said())
    (root / "new").mkdir()
    shutil.copytree(root / "code", root / "new" / "math")
    changed = {"math": {"module": str(root / "new" / "math"), "workers": 1}}
    file.write_text(yaml.safe_dump(values | {"models": values["models"] | changed}))
    up.send_signal(signal.SIGHUP)
    until(lambda: "the changed file is applied" in up.said())
    until(lambda: warm(up.url, PAIRS))
    assert workers_of(up, "math") != before
    assert sorted(engines(root, "decode")) == sorted(decode)
    assert asyncio.run(many(up.url, range(300, 316))) == {"right": 16}


def workers_of(up, model):
    return {worker["url"] for worker in ready(up.url)["workers"] if worker["model"] == model}


def a_signal_lets_requests_finish_and_takes_all_down(up, root, number):
    assert len(engines(root)) == PAIRS

    async def signalled_under_load():
        load = asyncio.ensure_future(many(up.url, range(400, 416), tokens=200))
        await asyncio.to_thread(until, lambda: in_flight() == 16)
        up.send_signal(number)
        return await load

    def in_flight():
        return sum(worker["in_flight"] for worker in (ready(up.url) or {"workers": ()})["workers"])

    assert asyncio.run(signalled_under_load()) == {"right": 16}
    assert up.wait(timeout=DEADLINE_SECONDS) == 0
    nothing_is_left(root)


def test_a_worker_that_cannot_start_shows_why(root):
    with started(root, with_mode(root, "die")) as up:
        assert up.wait(timeout=DEADLINE_SECONDS) == 2
        last = up.said().splitlines()[-1]
    assert last.startswith("error: application qsun-")
    assert "ended with code 1; log: " in last
    assert "RuntimeError: no kernel for this" in last
    assert "no kernel for this; Serve tries again" in up.said()
    nothing_is_left(root)


def test_impatience_while_workers_start(root):
    """A hangup does nothing yet. Whatever signals come while workers end, it says that they have when they have."""
    with started(root, with_mode(root, "deaf lingers")) as up:
        until(lambda: len(engines(root)) == PAIRS, DEADLINE_SECONDS)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            up.send_signal(number)
            time.sleep(0.3)
        assert up.wait(timeout=DEADLINE_SECONDS) == 130
        assert up.said().splitlines()[-1].endswith("all replicas have ended")
    nothing_is_left(root)
