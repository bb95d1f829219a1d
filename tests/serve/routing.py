"""A router in front of fake workers, all on one event loop."""

import asyncio
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.names import ServedNames
from qsun.serve.router.app import Router
from tests.serve.fake_vllm import FakeWorker, expected_text, listening

QUICK = {
    "interval_seconds": 0.2,
    "timeout_seconds": 2.0,
    "failures": 3,
    "cool_down_seconds": 0.3,
    "warm_up_seconds": 5.0,
}
DEADLINE_SECONDS = 15.0


def run(scenario, seconds=60):
    """Run a coroutine function with a deadline."""
    asyncio.run(asyncio.wait_for(scenario(), seconds))


def name_of(module):
    return f"qsun-{module}"


def expected(model, prompt, tokens):
    return expected_text(f"weights of {model}", prompt, tokens)


@dataclass
class Rig:
    """A running router and its workers."""

    router: Router
    url: str
    client: httpx.AsyncClient
    prefill: dict[str, list[FakeWorker]]
    decode: list[FakeWorker]
    network: dict
    settings: dict = field(default_factory=dict)
    shared: list[FakeWorker] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)

    @property
    def state(self):
        return self.router.state

    @property
    def workers(self):
        return [worker for pool in (*self.prefill.values(), self.shared, self.decode) for worker in pool]

    def cluster(self, **changes):
        """The cluster file's values for the workers that there are now."""
        pools = {model: {"module": model, "workers": [w.url for w in pool]} for model, pool in self.prefill.items()}
        pools |= {model: {"adapter": model} for model in self.adapters}
        values = {"decode": {"module": "decode", "workers": [worker.url for worker in self.decode]}, "models": pools}
        if self.adapters:
            values["prefill"] = {"module": "base", "workers": [worker.url for worker in self.shared]}
        return parse_cluster(values | self.settings | changes)

    @property
    def names(self):
        names = {model: name_of(model) for model in (*self.prefill, *self.adapters)}
        return ServedNames(name_of("decode"), names, name_of("base") if self.adapters else "")

    def apply(self, **changes):
        """As a reload does with a file for the workers that there are now."""
        self.router.apply(self.cluster(**changes), self.names, ())

    async def ready(self):
        """Until every pair of workers that are up is warm."""
        await until(lambda: len(self.state.fleet.warm) >= self.pairs and not self.state.fleet.without_a_pair())

    @property
    def pairs(self):
        return sum(len(self.state.fleet.partners(worker)) for worker in self.state.fleet.decode)

    def forget(self):
        """The workers' records of the warm-up."""
        for worker in self.workers:
            worker.seen.clear()
            worker.started = worker.finished = worker.cancelled = 0

    async def complete(self, model="math", prompt="a b c d", max_tokens=4, **more):
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens} | more
        return await self.client.post("/v1/completions", json=body)

    async def stream(self, model="math", prompt="a b c d", max_tokens=4, **more):
        """Every event of a stream, parsed; "[DONE]" stays as it is."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True} | more
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            return [parsed(line) async for line in response.aiter_lines() if line]

    async def metric(self, name, busy=False, **labels):
        """One sample, 0 where there is none, once requests are over (a client sees its last byte before that)."""
        await until(lambda: busy or not self.state.busy)
        text = (await self.client.get("/metrics")).text
        for line in text.splitlines():
            if line.startswith((name + " ", name + "{")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


def parsed(line):
    assert line.startswith("data: ")
    return line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def text_of(events):
    return "".join(choice["text"] for event in events if isinstance(event, dict) for choice in event.get("choices", []))


async def until(condition, seconds=DEADLINE_SECONDS):
    """Poll until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{condition} did not come true within {seconds} s"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def rig(models=("math", "code"), prefill=1, decode=2, ready=True, prepare=None, adapters=(), **settings):
    """Start workers, prepare them, and a router in front of them. adapters: models of shared prefill workers."""
    network = {}
    pools = {
        model: [FakeWorker("prefill", f"weights of {model}", name_of(model), network) for _ in range(prefill)]
        for model in models
    }
    decoders = [FakeWorker("decode", "decode", name_of("decode"), network) for _ in range(decode)]
    shared = [FakeWorker("prefill", "weights of base", name_of("base"), network) for _ in adapters and range(prefill)]
    for worker in shared:
        worker.adapters = {name_of(model): f"weights of {model}" for model in adapters}
    settings["health"] = QUICK | settings.get("health", {})
    made = Rig(None, "", None, pools, decoders, network, settings, shared, list(adapters))
    for worker in made.workers:
        if prepare is not None:
            prepare(worker)
        await worker.start()
    made.router = Router(made.cluster(), made.names)
    async with (
        listening(made.router, lifespan="on") as server,
        httpx.AsyncClient(
            base_url=server.url, trust_env=False, timeout=30, limits=httpx.Limits(max_connections=200)
        ) as made.client,
    ):
        made.url = server.url
        try:
            if ready:
                await made.ready()
                made.forget()
            yield made
        finally:
            for worker in made.workers:
                worker.gate = None
                await worker.stop()
