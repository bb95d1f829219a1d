"""CPU microseconds a relayed token and a request: python tests/serve/relay_cost.py [VLLM-ROUTER'S COMMAND]

`qsun route` with and without `limits.gather_seconds`, and vllm-router if its command is given (pip install vllm-router,
in an environment of its own), in turns before the same two pretend vLLMs, a prefill and a decode worker of one model.
16 streams of 200 tokens, an event every 20 ms; and whole answers of one token, 16 at a time. Counted is the CPU time of
the router's processes, and not time on the clock.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import yaml

from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.modules import ModuleChecks
from qsun.serve.ray.engine.command import free_ports
from tests.places import ROOT
from tests.serve.fake_vllm import FakeWorker, answer, expected_text
from tests.serve.ray.live.load import streamed

STREAMS, TOKENS, ROUNDS, EVENT_SECONDS = 16, 200, 3, 0.02
GATHER_SECONDS = 0.05  # about three events together
SHORT = 320  # requests for one token
TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 300


class Worker(FakeWorker):
    """One that takes what vllm-router sends besides: questions by GET, and min_tokens of a prompt."""

    async def __call__(self, scope, receive, send):
        if scope["method"] == "GET" and scope["path"] not in ("/health", "/v1/models"):
            await answer(send, {}, 404)
        else:
            await super().__call__(scope, receive, send)

    async def _prefill(self, scope, body, prompt, send):
        await super()._prefill(scope, {key: value for key, value in body.items() if key != "min_tokens"}, prompt, send)


def cpu_seconds(root):
    """Of a process and its descendants that are alive."""
    spent, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        parents[pid], spent[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family and pid not in family}:
        family |= more
    return sum(spent.get(pid, 0.0) for pid in family)


async def relayed(url, model, module="demo"):
    """Have every stream through a router. Raises where an answer is not that of a prefill module."""
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=300, limits=limits) as client:

        async def one(number):
            body = {"model": model, "prompt": f"{number} of some words", "max_tokens": TOKENS, "stream": True}
            got = await client.post("/v1/completions", json=body)
            text, end = streamed(got.text, lambda choice: choice["text"], "")
            assert end == "complete" and text == expected_text(module, body["prompt"], TOKENS), got.text[:500]

        await asyncio.gather(*map(one, range(STREAMS)))


async def short(url, model, module="demo"):
    """Have a router answer requests for one token, as many at a time as there are streams."""
    turns = asyncio.Semaphore(STREAMS)
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=300) as client:

        async def one(number):
            body = {"model": model, "prompt": f"{number} of some words", "max_tokens": 1}
            async with turns:
                got = await client.post("/v1/completions", json=body)
            assert got.json()["choices"][0]["text"] == expected_text(module, body["prompt"], 1), got.text[:500]

        await asyncio.gather(*map(one, range(SHORT)))


async def answers(url, model):
    """Until a router has workers."""
    end = time.monotonic() + START_SECONDS
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        while time.monotonic() < end:
            try:
                body = {"model": model, "prompt": "a b", "max_tokens": 1}
                if (await client.post("/v1/completions", json=body)).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.5)
    raise SystemExit(f"{url} does not answer")


def commands(directory, prefill, decode, name, peer):
    """By name of the router: its command, its URL, and the model to ask it for."""
    ports = free_ports(4)
    pools = {"decode": {"module": "demo", "workers": [decode.url]}}
    pools["models"] = {"math": {"module": "demo", "workers": [prefill.url]}}
    found = {}
    for seconds, port in ((0.0, ports[0]), (GATHER_SECONDS, ports[3])):
        file = directory / f"{port}.yaml"
        file.write_text(yaml.safe_dump(pools | {"listen": {"port": port}, "limits": {"gather_seconds": seconds}}))
        own = [sys.executable, "-m", "qsun.cli.main", "route", str(file)]
        found[f"qsun route, gather_seconds {seconds:g}"] = (own, f"http://127.0.0.1:{port}", "math")
    if peer:
        command = [peer, "--vllm-pd-disaggregation", "--prefill", prefill.url, "--decode", decode.url]
        command += ["--policy", "round_robin", "--port", str(ports[1]), "--prometheus-port", str(ports[2])]
        found["vllm-router"] = (command, f"http://127.0.0.1:{ports[1]}", name)
    return found


async def main(peer=None):
    values = {"decode": {"module": "demo", "workers": 1}, "models": {"math": {"module": "demo", "workers": 1}}}
    name = ModuleChecks().names(parse_cluster(values)).decode
    network = {}
    prefill, decode = (Worker(role, "demo", name, network) for role in ("prefill", "decode"))
    decode.token_seconds = EVENT_SECONDS
    for worker in (prefill, decode):
        await worker.start()
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        routers = commands(Path(directory), prefill, decode, name, peer)
        settings = os.environ | {"PYTHONPATH": str(ROOT)}
        running = {
            router: subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for router, (command, *_) in routers.items()
        }
        try:
            for _, url, model in routers.values():
                await answers(url, model)
                await relayed(url, model)
            for _ in range(ROUNDS):
                for router, (_, url, model) in routers.items():
                    for what, load, count in (("token", relayed, STREAMS * TOKENS), ("request", short, SHORT)):
                        before = cpu_seconds(running[router].pid)
                        await load(url, model)
                        spent = cpu_seconds(running[router].pid) - before
                        found.setdefault(f"{router}, a {what}", []).append(round(1e6 * spent / count))
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
            for worker in (prefill, decode):
                await worker.stop()
    print(json.dumps({router: {"median": statistics.median(all_), "all": all_} for router, all_ in found.items()}))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
