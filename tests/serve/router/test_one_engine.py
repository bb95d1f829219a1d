"""Adapters on the decode module's own weights: every worker answers by itself, and no model gets another one's text."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest

from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.names import ServedNames
from qsun.serve.router.app import Router
from qsun.serve.router.workers.worker import Breaker, Worker
from tests.serve.fake_vllm import FakeWorker, listening
from tests.serve.routing import QUICK, Rig, expected, name_of, run, text_of, until

ADAPTERS = ("poem", "tool")


def placed(r, workers):
    """The router's own view of workers, as the ingress on Ray makes it."""
    adapters = {model: name_of(model) for model in ADAPTERS}
    r.state.fleet.place(
        [Worker(w.url, "aggregated", w.served_name, Breaker(3, 1.0), adapters=adapters) for w in workers],
        r.state.cluster,
    )
    r.state.health.watch()


@asynccontextmanager
async def one_engine(count=2, prepare=None, **settings):
    """A router in front of aggregated workers, which are in `shared`; all that are up are warm."""
    workers = [FakeWorker("aggregated", "decode", name_of("decode"), {}) for _ in range(count)]
    for worker in workers:
        worker.adapters = {name_of(model): f"weights of {model}" for model in ADAPTERS}
        if prepare is not None:
            prepare(worker)
        await worker.start()
    models = {model: {"adapter": model} for model in ADAPTERS}
    values = {"decode": {"module": "decode", "workers": count}, "models": models, "health": QUICK} | settings
    router = Router(parse_cluster(values), ServedNames(name_of("decode"), {}, name_of("decode")))
    async with (
        listening(router, lifespan="on") as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client,
    ):
        r = Rig(router, server.url, client, {}, [], {}, shared=workers)
        placed(r, workers)
        try:
            await until(lambda: len(r.state.fleet.warm) == count)
            r.forget()
            yield r
        finally:
            for worker in workers:
                worker.gate = None
                await worker.stop()


def test_each_model_answers_without_a_transfer():
    async def scenario():
        async with one_engine() as r:
            asked = [(model, f"q {n % 3} b c") for n in range(12) for model in ADAPTERS]
            answers = await asyncio.gather(*(r.complete(model, prompt) for model, prompt in asked))
            for (model, prompt), response in zip(asked, answers, strict=True):
                assert response.json()["choices"][0]["text"] == expected(model, prompt, 4)
                assert response.json()["model"] == model
            assert text_of(await r.stream("tool", max_tokens=6)) == expected("tool", "a b c d", 6)
            seen = [body for worker in r.shared for body in worker.seen]
            assert len(seen) == len(asked) + 1
            assert not any("kv_transfer_params" in body for body in seen)
            assert all(worker.seen for worker in r.shared)
            assert r.state.fleet.warm == {(worker.url, worker.url) for worker in r.shared}

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_fails_before_the_first_token_is_replaced_by_another(stream):
    async def scenario():
        async with one_engine() as r:
            for worker in r.shared:
                worker.statuses = [500]
            if stream:
                assert text_of(await r.stream("poem")) == expected("poem", "a b c d", 4)
            else:
                assert (await r.complete("poem")).json()["choices"][0]["text"] == expected("poem", "a b c d", 4)
            assert await r.metric("qsun_router_retries_total", cause="status_5xx") == 2
            await until(lambda: len(r.state.fleet.warm) == 2)

    run(scenario)


def test_a_worker_that_dies_leaves_the_rest_to_the_other():
    async def scenario():
        async with one_engine() as r:
            await r.shared[0].kill()
            for model in ADAPTERS * 3:
                assert (await r.complete(model)).json()["choices"][0]["text"] == expected(model, "a b c d", 4)
            await until(lambda: len(r.state.fleet.warm) == 1)
            await r.shared[0].restart()
            await until(lambda: len(r.state.fleet.warm) == 2)

    run(scenario)


def test_a_worker_that_lacks_an_adapter_serves_the_others():
    def prepare(worker):
        worker.adapters.pop(name_of("tool"))

    async def scenario():
        async with one_engine(1, prepare, limits={"no_worker_seconds": 0.5}) as r:
            assert (await r.complete("poem")).status_code == 200
            assert (await r.complete("tool")).status_code == 503
            assert r.state.fleet.without_a_pair() == ["tool"]

    run(scenario)


@pytest.mark.parametrize("characters", [1000, 4000])
def test_a_chat_that_leaves_its_length_open_gets_what_the_engine_has_room_for(characters):
    """Only the engine knows how many tokens the prompt has, which may be as many as characters, or far fewer."""

    async def scenario():
        async with one_engine(1) as r:
            body = {"model": "poem", "messages": [{"role": "user", "content": "x" * characters}]}
            answer = await r.client.post("/v1/chat/completions", json=body)
            assert answer.json()["usage"]["completion_tokens"] == r.shared[0].max_new_tokens
            (seen,) = r.shared[0].seen
            assert "max_tokens" not in seen and "max_completion_tokens" not in seen
            assert (await r.client.post("/v1/chat/completions", json=body | {"max_tokens": 3})).status_code == 200
            assert r.shared[0].seen[1]["max_tokens"] == 3

    run(scenario)


def test_a_stream_may_wait_for_its_first_token_as_long_as_for_a_prefill():
    """In the queue of the engine, and while it reads the prompt, which counts as load until then."""

    async def scenario():
        async with one_engine(1, limits={"stall_seconds": 0.4, "prefill_seconds": 20.0}) as r:
            (worker,), (known,) = r.shared, r.state.fleet
            worker.gate = asyncio.Event()
            answer = asyncio.create_task(r.stream("poem", prompt="w " * 200))
            await until(lambda: worker.started == 1)
            await asyncio.sleep(1.0)
            assert known.outstanding_tokens >= 100
            worker.gate.set()
            assert text_of(await answer) == expected("poem", "w " * 200, 4)
            assert await r.metric("qsun_router_retries_total") == 0
            assert known.outstanding_tokens == 0

    run(scenario)


def test_a_stream_that_stalls_after_its_first_token_ends_with_an_error():
    async def scenario():
        async with one_engine(1, limits={"stall_seconds": 0.4, "prefill_seconds": 60.0, "attempts": 1}) as r:
            (worker,) = r.shared
            gate = worker.gate = Gate(2)
            events = await asyncio.wait_for(r.stream("poem"), 20.0)
            assert "[DONE]" not in events
            assert events[-1]["error"]["code"] == 502
            assert text_of(events[:-1]) == expected("poem", "a b c d", 2)
            gate.open.set()

    run(scenario)


class Gate:
    """Lets so many tokens pass before it is open."""

    def __init__(self, tokens):
        self.left, self.open = tokens, asyncio.Event()

    async def wait(self):
        self.left -= 1
        if self.left < 0:
            await self.open.wait()


def test_an_engine_with_adapters_has_no_name_for_another_model():
    worker = Worker("http://a", "aggregated", "base", Breaker(3, 1.0), adapters={"poem": "qsun-poem"})
    assert worker.name_of("poem") == "qsun-poem"
    for adapters in ({"poem": "qsun-poem"}, {}):
        worker.serve_adapters(adapters)
        with pytest.raises(KeyError):
            worker.name_of("gone")
    assert Worker("http://a", "decode", "base", Breaker(3, 1.0)).name_of("any") == "base"
