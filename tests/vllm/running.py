"""A cluster of real vLLMs that `qsun up` starts as replicas of Ray Serve on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from tests.oracles.compare import record
from tests.oracles.conftest import ENVIRONMENTS, PROBE_SETTINGS
from tests.places import ROOT
from tests.serve.ray.rig import engines
from tests.vllm.asking import DEADLINE_SECONDS, client_of

CALM_PATH = os.pathsep.join([str(ROOT), str(Path(__file__).with_name("calm"))])  # of vLLMs whose NIXL leaves cores free


@dataclass
class Cluster:
    """A running `qsun up`. root: its modules and logs are in it."""

    process: subprocess.Popen
    url: str
    root: Path

    def client(self) -> openai.OpenAI:
        return client_of(self.url)

    def engine(self, role: str) -> int:
        """The pid of a vLLM server."""
        return engines(self.root, role)[0]

    def engine_url(self, role: str) -> str:
        command = Path(f"/proc/{self.engine(role)}/cmdline").read_text().split("\0")
        return f"http://127.0.0.1:{command[command.index('--port') + 1]}"

    def warm_pairs(self) -> int:
        return httpx.get(f"{self.url}/ready", timeout=60, trust_env=False).json()["warm_pairs"]


def vllm_python() -> Path:
    """The interpreter of the environment with vLLM; without one, or without Ray, the test is skipped."""
    pytest.importorskip("ray.serve", reason="needs Ray: pip install 'qsun[ray]'")
    python = ENVIRONMENTS / "vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment 'vllm'; `make vllm` makes it")
    return python


@contextmanager
def running_cluster(file: Path, root: Path, pairs: int) -> Iterator[Cluster]:
    """Within, `qsun up` runs and all pairs are warm; logs go to root."""
    said = root / "up.err"
    command = [sys.executable, "-m", "qsun.cli.main", "up", str(file), "--logs", str(root / "logs"), "--json"]
    environment = os.environ | PROBE_SETTINGS | {"PYTHONPATH": CALM_PATH, "RAY_USAGE_STATS_ENABLED": "0"}
    environment["TEST_ROOT"] = str(root)
    started = time.monotonic()
    with said.open("w") as errors:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline()  # ends at launch.start_seconds at the latest
        assert line, said.read_text()[-6000:]
        running = Cluster(process, json.loads(line)["url"], root)
        wait_for(lambda: running.warm_pairs() == pairs)
        record("vllm cluster", warm_seconds=round(time.monotonic() - started))
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
        process.stdout.close()
        record("vllm cluster", wall_seconds=round(time.monotonic() - started))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
