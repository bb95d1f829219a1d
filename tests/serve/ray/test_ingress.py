"""The ingress without a Ray: how it drains, and how it takes other API keys. Its workers are reached by HTTP."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'qsun[ray]'")

from ray import serve

from qsun.serve.ray import apps
from qsun.serve.ray import ingress as module
from qsun.serve.router.workers.worker import Breaker, Worker
from tests.serve.fake_vllm import FakeWorker, listening
from tests.serve.routing import QUICK, parsed, run, until

BODY = {"model": "poem", "prompt": "a b", "stream": True}


@pytest.fixture
def ingress(monkeypatch):
    """ingress(**settings): one with a worker that writes ten tokens a second; gives it, a client and the worker."""
    monkeypatch.setattr(module, "log_to_serve", lambda: None)
    monkeypatch.setattr(module, "ReplicaTransport", httpx.AsyncHTTPTransport)
    monkeypatch.setattr(module, "_KEYS_SECONDS", 0.05)

    @asynccontextmanager
    async def started(**settings):
        values = {"decode": {"module": "demo", "workers": 1}, "models": {"poem": {"module": "demo", "workers": 1}}}
        made = module.Ingress(values | {"health": QUICK} | settings, [])
        worker = FakeWorker("aggregated", "demo", "qsun-demo", {})
        worker.adapters = {"qsun-poem": "weights of poem"}
        await worker.start()
        app = made.__serve_build_asgi_app__()
        state = app.app.state
        async with (
            listening(app, lifespan="on") as server,
            httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client,
        ):
            adapters = {"poem": "qsun-poem"}
            placed = Worker(worker.url, "aggregated", "qsun-demo", Breaker(3, 1.0), adapters=adapters)
            state.fleet.place([placed], state.cluster)
            state.health.watch()
            await until(lambda: len(state.fleet.warm) == 1)
            worker.token_seconds = 0.1
            yield made, client, worker
            worker.token_seconds = 0.0
        await worker.stop()

    return started


async def events(client, tokens):
    async with client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": tokens}) as answer:
        return [parsed(line) async for line in answer.aiter_lines() if line]


def test_a_drain_lets_streams_finish_and_ends_the_longest_with_an_error(ingress):
    async def scenario():
        async with ingress(limits={"drain_seconds": 1.5}) as (made, client, worker):
            short, long = (asyncio.create_task(events(client, tokens)) for tokens in (6, 3000))
            await until(lambda: worker.started >= 3)  # with the warm-up
            draining = asyncio.create_task(made.drain())
            await asyncio.sleep(0.2)
            assert (await client.post("/v1/completions", json=BODY)).status_code == 503
            assert (await client.get("/ready")).status_code == 503
            assert (await short)[-1] == "[DONE]"
            *begun, last = await long
            assert len(begun) > 5
            assert last["error"]["message"] == "the router shut down before the answer was complete"
            await draining

    run(scenario)


def test_a_drain_of_nothing_is_short(ingress):
    async def scenario():
        async with ingress(limits={"drain_seconds": 600.0}) as (made, _, _):
            await asyncio.wait_for(made.drain(), 60)

    run(scenario)


def test_a_key_that_is_removed_from_its_file_opens_nothing_any_more(ingress, tmp_path, caplog):
    keys = tmp_path / "keys"
    keys.write_text("revoked-key\nkept-key-1\n")

    async def status(client, key):
        return (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code

    async def scenario():
        async with ingress(listen={"api_keys": str(keys)}) as (made, client, _):
            assert [await status(client, key) for key in ("revoked-key", "kept-key-1")] == [200, 200]
            keys.write_text("short\n")
            await until(lambda: "the previous API keys stay" in caplog.text)
            assert await status(client, "revoked-key") == 200
            keys.write_text("kept-key-1\nadded-key\n")
            await until(lambda: "added-key" in made._keys)
            wanted = {"revoked-key": 401, "kept-key-1": 200, "added-key": 200}
            assert {key: await status(client, key) for key in wanted} == wanted
            keys.unlink()
            await until(lambda: "cannot be read" in caplog.text)
            assert await status(client, "added-key") == 200

    run(scenario)


def test_serve_can_ask_every_ingress_to_drain(monkeypatch):
    """In Serve's own mode for tests, which needs no Ray."""
    monkeypatch.setattr(module, "log_to_serve", lambda: None)
    values = {"decode": {"module": "demo", "workers": 1}, "models": {"poem": {"module": "demo", "workers": 1}}}
    app = apps.ingress({"deployment": {"max_surge_percent": 1}, "cluster": values, "pools": []})
    handle = serve.run(app, name="qsun", _local_testing_mode=True)
    assert handle.broadcast("drain").results(timeout_s=30) == [None]
