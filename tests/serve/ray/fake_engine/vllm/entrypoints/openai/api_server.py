"""A worker of tests/serve/fake_vllm.py as a process: KV cache moves between processes through a directory.

FAKE_NETWORK: that directory. FAKE_SECONDS: per token. FAKE_TIMES: instead, JSON of tests/serve/ray/live/steps.py.
FAKE_VLLM has words: die (ends at once, with a message), deaf (never listens), lingers (leaves 3 s after SIGTERM).
"""

import asyncio
import itertools
import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path

from tests.serve.fake_vllm import FakeWorker, prompt_of
from tests.serve.ray.live.steps import Timed, Times


def option(name):
    return sys.argv[sys.argv.index(name) + 1]


def adapters():
    """What follows --lora-modules, NAME=DIRECTORY each."""
    given = sys.argv[sys.argv.index("--lora-modules") + 1 :] if "--lora-modules" in sys.argv else []
    return [entry.split("=", 1) for entry in itertools.takewhile(lambda entry: not entry.startswith("--"), given)]


def weights_of(adapter, role):
    """An adapter's own, unless it acts on an answer too, as without our plugin's switch."""
    switched = role == "prefill" or os.environ.get("QSUN_PREFILL_LORA") == "1"
    return Path(adapter).name if switched else f"ordinary {adapter}"


class Network:
    """KV cache by (engine id, request id), which can be taken once."""

    def __init__(self, directory):
        self._directory = directory

    def __setitem__(self, key, value):
        module, prompt = value
        self._file(key).write_text(json.dumps([module, prompt, isinstance(prompt, tuple)]))

    def pop(self, key, default):
        taken = self._directory / uuid.uuid4().hex
        try:
            self._file(key).rename(taken)
        except FileNotFoundError:
            return default
        module, prompt, is_tokens = json.loads(taken.read_text())
        taken.unlink()
        return module, tuple(prompt) if is_tokens else prompt

    def _file(self, key):
        return self._directory / "-".join(key).replace("/", "_")


class EndedEngines:
    """Engine ids whose process has ended. vLLM fails a request whose KV cache it cannot load."""

    def __init__(self, directory):
        self._directory = directory

    def join(self, engine):
        (self._directory / f"engine-{engine}").write_text(str(os.getpid()))

    def __contains__(self, engine):
        pid = (self._directory / f"engine-{engine}").read_text()
        return not Path(f"/proc/{pid}").exists()


class Worker(FakeWorker):
    timed = None

    async def __call__(self, scope, receive, send):
        before = self.cancelled
        await super().__call__(scope, receive, send)
        if self.cancelled > before:
            print("a request was cancelled", flush=True)

    async def _generate(self, scope, body, send):
        if self.timed is None:
            await super()._generate(scope, body, send)
            return
        async with self.timed.request(body, prompt_of(body)):
            await super()._generate(scope, body, send)

    async def _token(self, place):
        if self.timed is None:
            await super()._token(place)
        else:
            await self.timed.token()


async def main():
    role = "aggregated"
    if "--kv-transfer-config" in sys.argv:
        role = "decode" if json.loads(option("--kv-transfer-config"))["kv_role"] == "kv_consumer" else "prefill"
    directory = Path(os.environ["FAKE_NETWORK"])
    worker = Worker(role, Path(option("--model")).name, option("--served-model-name"), Network(directory))
    worker.adapters = {name: weights_of(directory, role) for name, directory in adapters()}
    worker.unreachable = EndedEngines(directory)
    worker.unreachable.join(worker.engine_id)
    worker._port = int(option("--port"))
    worker.token_seconds = float(os.environ.get("FAKE_SECONDS", "0"))
    if "FAKE_TIMES" in os.environ:
        worker.timed = Timed(Times(**json.loads(os.environ["FAKE_TIMES"])), role)
    await worker.start()
    await asyncio.Event().wait()


MODES = os.environ.get("FAKE_VLLM", "").split()
if "die" in MODES:
    sys.exit("RuntimeError: no kernel for this")
if "lingers" in MODES:
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(3), os._exit(0)))
if "deaf" in MODES:
    time.sleep(600)
asyncio.run(main())
