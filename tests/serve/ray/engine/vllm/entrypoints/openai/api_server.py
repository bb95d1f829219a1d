"""A worker of tests/serve/fake_vllm.py as a process: KV cache moves between processes through a directory.

FAKE_NETWORK: that directory. FAKE_SECONDS: per token.
"""

import asyncio
import json
import os
import sys
import uuid
from pathlib import Path

from tests.serve.fake_vllm import FakeWorker


def option(name):
    return sys.argv[sys.argv.index(name) + 1]


class Network:
    """KV cache by (engine id, request id): what a process holds is gone with it, and can be taken once."""

    def __init__(self, directory):
        self._directory = directory

    def __setitem__(self, key, value):
        module, prompt = value
        text = json.dumps([os.getpid(), module, prompt, isinstance(prompt, tuple)])
        self._file(key).write_text(text)

    def pop(self, key, default):
        taken = self._directory / uuid.uuid4().hex
        try:
            self._file(key).rename(taken)
        except FileNotFoundError:
            return default
        pid, module, prompt, is_tokens = json.loads(taken.read_text())
        taken.unlink()
        if not Path(f"/proc/{pid}").exists():
            return default
        return module, tuple(prompt) if is_tokens else prompt

    def _file(self, key):
        return self._directory / "-".join(key).replace("/", "_")


class Worker(FakeWorker):
    async def __call__(self, scope, receive, send):
        before = self.cancelled
        await super().__call__(scope, receive, send)
        if self.cancelled > before:
            print("a request was cancelled", flush=True)


async def main():
    role = "decode" if json.loads(option("--kv-transfer-config"))["kv_role"] == "kv_consumer" else "prefill"
    network = Network(Path(os.environ["FAKE_NETWORK"]))
    worker = Worker(role, Path(option("--model")).name, option("--served-model-name"), network)
    worker._port = int(option("--port"))
    worker.token_seconds = float(os.environ.get("FAKE_SECONDS", "0"))
    await worker.start()
    await asyncio.Event().wait()


asyncio.run(main())
