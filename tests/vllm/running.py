"""A cluster of real vLLMs that `qsun up` starts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.oracles.compare import record
from tests.oracles.conftest import ENVIRONMENTS, PROBE_SETTINGS
from tests.places import ROOT
from tests.vllm.asking import client_of


@dataclass
class Cluster:
    """A running `qsun up`."""

    process: subprocess.Popen
    url: str
    workers: dict[str, dict]
    said: Path

    def client(self) -> openai.OpenAI:
        return client_of(self.url)


def vllm_python() -> Path:
    """The interpreter of the environment with vLLM; without one the test is skipped."""
    python = ENVIRONMENTS / "vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment 'vllm'; `make vllm` makes it")
    return python


@contextmanager
def running_cluster(file: Path, root: Path) -> Iterator[Cluster]:
    """Within, `qsun up` runs; logs go to root."""
    said = root / "up.err"
    command = [sys.executable, "-m", "qsun.cli.main", "up", str(file), "--logs", str(root / "logs"), "--json"]
    started = time.monotonic()
    with said.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | PROBE_SETTINGS, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        line = process.stdout.readline()  # ends at launch.start_seconds at the latest
        assert line, said.read_text()[-6000:]
        ready = json.loads(line)
        record("vllm cluster", warm_seconds=round(time.monotonic() - started))
        yield Cluster(process, ready["url"], {worker["name"]: worker for worker in ready["workers"]}, said)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
        process.stdout.close()
        record("vllm cluster", wall_seconds=round(time.monotonic() - started))
