"""Replicas as workers of the ingress: its router, the replicas' own code and pretend vLLMs, without Ray between."""

import asyncio
from collections import OrderedDict
from contextlib import asynccontextmanager

import httpx
import pytest

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'qsun[ray]'")

from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.names import ServedNames
from qsun.serve.ray.members import Members
from qsun.serve.ray.plan import plan_apps
from qsun.serve.ray.replica import EngineReplica
from qsun.serve.ray.scaling import OutstandingTokens
from qsun.serve.ray.transport import ReplicaTransport
from qsun.serve.router.app import Router
from tests.serve.fake_vllm import FakeWorker, listening
from tests.serve.routing import QUICK, Rig, expected, name_of, run, text_of, until

ADAPTERS = ("poem", "tool")


class Call:
    """A call of a handle: an awaitable or a stream."""

    def __init__(self, made):
        self._made = made

    def __await__(self):
        return self._made.__await__()

    def __aiter__(self):
        return self._made

    def cancel(self):
        pass


class Handle:
    """Of the replicas of an application, as far as the ingress uses it."""

    def __init__(self):
        self.replicas = {}
        self.describe = self

    def options(self, **_):
        return Streaming(self)

    def remote(self, replica):
        return Call(self.replicas[replica].describe(replica))


class Streaming:
    def __init__(self, handle):
        self._handle = handle

    def remote(self, *arguments, replica):
        return Call(self._handle.replicas[replica].answer(*arguments, replica))


class Replica(EngineReplica):
    """One whose vLLM runs already."""

    def __init__(self):
        pass

    def __del__(self):  # Serve would await the original
        pass


def replica_of(engine, worker, number):
    made = Replica()
    made._engine, made._id = engine, f"{engine['pool']}-{number}"
    made._client = httpx.AsyncClient(base_url=worker.url, trust_env=False, timeout=30)
    made._load = OutstandingTokens(prompts_only=engine["role"] == "prefill")
    made._attempts, made._last_prefill = OrderedDict(), 0.0
    return made


def weights_of(engine):
    return "decode" if engine["role"] != "prefill" else f"weights of {engine['model'] or 'base'}"


@asynccontextmanager
async def ingress(**pools):
    """The ingress's router over two replicas of each pool, once each model has a warm pair; `workers` by pool."""
    cluster = parse_cluster({"decode": {"module": "demo", "workers": 2}, "health": QUICK} | pools)
    names = ServedNames(name_of("decode"), {m: name_of(m) for m in cluster.models}, name_of("base"))
    *engines, last = plan_apps(cluster, names)
    transport, network, workers = ReplicaTransport(), {}, {}
    router = Router(parse_cluster(last.args["cluster"]), ServedNames("", {}), (), transport)
    members = Members(router.state, transport, last.args["pools"])
    async with (
        listening(router, lifespan="on") as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client,
    ):
        r = Rig(router, server.url, client, {}, [], network)
        for app in engines:
            engine, handle = app.args["engine"], Handle()
            workers[app.name] = []
            for number in range(2):
                worker = FakeWorker(engine["role"], weights_of(engine), engine["served_name"], network)
                worker.adapters = {a["served_name"]: f"weights of {m}" for m, a in engine["adapters"].items()}
                await worker.start()
                workers[app.name].append(worker)
                replica = replica_of(engine, worker, number)
                handle.replicas[replica._id] = replica
            assert await members._apply(app.name, handle, frozenset(handle.replicas))
        r.members, r.pools = members, workers
        try:
            await until(lambda: not r.state.fleet.without_a_pair())
            yield r
        finally:
            for worker in [worker for pool in workers.values() for worker in pool]:
                await worker.stop()
            for replica in [replica for handle in transport.handles.values() for replica in handle.replicas.values()]:
                await replica._client.aclose()


async def all_right(r, models):
    asked = [(model, f"q {n} b c", n % 2) for n in range(6) for model in models]

    async def text(model, prompt, stream):
        if stream:
            return text_of(await r.stream(model, prompt))
        return (await r.complete(model, prompt)).json()["choices"][0]["text"]

    answers = await asyncio.gather(*(text(*one) for one in asked))
    assert answers == [expected(model, prompt, 4) for model, prompt, _ in asked]


def test_adapters_of_a_pool_beside_a_full_module():
    models = {model: {"adapter": model} for model in ADAPTERS} | {"math": {"module": "demo", "workers": 2}}

    async def scenario():
        async with ingress(prefill={"module": "demo", "workers": 2}, models=models) as r:
            await all_right(r, models)
            shared = r.pools["qsun-prefill"]
            assert {body["model"] for worker in shared for body in worker.seen} >= {name_of(m) for m in ADAPTERS}
            workers = (await r.client.get("/ready")).json()["workers"]
            assert sorted(worker["adapters"] for worker in workers) == [[]] * 4 + [sorted(ADAPTERS)] * 2

    run(scenario)


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_one_engine_for_adapters(seconds):
    models = {model: {"adapter": model} for model in ADAPTERS}

    async def scenario():
        async with ingress(models=models, limits={"gather_seconds": seconds}) as r:
            await all_right(r, models)
            seen = [body for worker in r.pools["qsun-decode"] for body in worker.seen]
            assert not any("kv_transfer_params" in body for body in seen)
            workers = (await r.client.get("/ready")).json()["workers"]
            assert [worker["role"] for worker in workers] == ["aggregated"] * 2

    run(scenario)


def test_replicas_that_leave_are_no_workers_any_more():
    models = {model: {"adapter": model} for model in ADAPTERS}

    async def scenario():
        async with ingress(models=models) as r:
            (handle,) = {id(h): h for h in r.members._transport.handles.values()}.values()
            kept, gone = sorted(handle.replicas)
            assert await r.members._apply("qsun-decode", handle, frozenset([kept]))
            assert [worker.url for worker in r.state.fleet] == [f"http://{kept}"]
            await all_right(r, models)
            assert gone not in r.members._transport.handles

    run(scenario)
