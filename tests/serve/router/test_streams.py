"""Streams: what counts as a beginning. Deadlines: of streams, of waiting requests, and what they imply for a worker."""

import asyncio
import time

import pytest

from qsun.serve.http.wire import DONE_EVENT, data_events, encode_event
from qsun.serve.router.exchange.exchange import Exchange, _Transfer
from qsun.serve.router.exchange.request import RoutedRequest
from qsun.serve.router.exchange.worker_http import Prefilled
from qsun.serve.router.workers.worker import TokenLoad
from tests.serve.fake_vllm import expected_text, prompt_of
from tests.serve.routing import expected, parsed, rig, run, text_of, until

MESSAGES = [{"role": "user", "content": "a b c d"}]


def state_of(r, fake):
    return next(worker for worker in r.state.fleet if worker.url == fake.url)


async def chat(r, max_tokens=4):
    """Every event of a chat's stream."""
    body = {"model": "math", "messages": MESSAGES, "max_tokens": max_tokens, "stream": True}
    async with r.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        return [parsed(line) async for line in response.aiter_lines() if line]


def said(events):
    deltas = [choice["delta"] for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(delta["content"] for delta in deltas)


def test_a_chat_whose_kv_cache_did_not_come_starts_again_although_its_role_was_sent():
    """The role proves nothing: such a worker's circuit opens."""

    async def scenario():
        async with rig(models=("math",), decode=2, health={"failures": 1, "cool_down_seconds": 60.0}) as r:
            bad, good = r.decode
            bad.error_after = 0
            whole = expected_text("weights of math", prompt_of({"messages": MESSAGES}), 4)
            for _ in range(3):
                events = await chat(r)
                assert events[0]["choices"][0]["delta"]["role"] == "assistant"
                assert events[-1] == "[DONE]"
                assert said(events) == whole
            assert state_of(r, bad).breaker.state == "open"
            assert state_of(r, good).breaker.state == "closed"
            assert await r.metric("qsun_router_retries_total", cause="broken") == 1
            assert await r.metric("qsun_router_generated_tokens_total", model="math") == 12

    run(scenario)


def test_a_pair_whose_stream_broke_off_shakes_hands_again():
    async def scenario():
        async with rig(models=("math",), decode=1, health={"interval_seconds": 60.0}) as r:
            r.decode[0].error_after = 2
            assert (await r.stream())[-1]["error"]["code"] == 502
            r.decode[0].error_after = None
            await until(lambda: [1, 1, 1, 1] in [body["prompt"] for body in r.decode[0].seen])
            await r.ready()
            assert text_of(await r.stream()) == expected("math", "a b c d", 4)

    run(scenario)


def test_a_fast_stream_lets_other_requests_have_turns():
    """All of its events arrive at once, while others need the event loop many times for one answer."""

    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            events = [{"choices": [{"index": 0, "text": "x", "finish_reason": None}]}] * 800
            filled, load = Prefilled(None, 4, "engine"), TokenLoad(state_of(r, r.decode[0]), 800)
            transfer = _Transfer(state_of(r, r.prefill["math"][0]), state_of(r, r.decode[0]), filled, load)
            request = RoutedRequest("/v1/completions", "math", {}, True, False, 800, 4)
            exchange = Exchange(r.state, r.state.cluster.limits, request, "id", time.monotonic() + 60)

            async def pieces():
                yield b"".join(map(encode_event, events)) + DONE_EVENT

            turns = 0

            async def other():
                nonlocal turns
                while True:
                    await asyncio.sleep(0)
                    turns += 1

            task = asyncio.create_task(other())
            assert len([event async for event in exchange._relay(transfer, [], data_events(pieces()))]) == 800
            task.cancel()
            assert turns > 50

    run(scenario)


class FirstOnly:
    """A gate for one token."""

    passed = False

    async def wait(self):
        passed, self.passed = self.passed, True
        await asyncio.sleep(3600 if passed else 0)


@pytest.mark.parametrize("hangs", [False, True], ids=["trickles", "hangs"])
def test_a_stream_ends_at_the_deadline_of_its_request(hangs):
    async def scenario():
        async with rig(models=("math",), decode=1, limits={"deadline_seconds": 2.0}) as r:
            worker = r.decode[0]
            worker.gate, worker.token_seconds = (FirstOnly(), 0.0) if hangs else (None, 0.05)
            *events, last = await r.stream(max_tokens=2000)
            assert last["error"]["code"] == 504
            written = text_of(events)
            assert written == expected("math", "a b c d", 2000)[: len(written)]
            await until(lambda: worker.cancelled == 1)
            assert await r.metric("qsun_router_requests_total", model="math", outcome="504") == 1

    run(scenario)


def test_a_request_waits_for_a_place_no_longer_than_its_deadline():
    async def scenario():
        limits = {"concurrent_requests": 1, "queue_seconds": 3600, "deadline_seconds": 0.3}
        async with rig(models=("math",), limits=limits) as r, r.state.admission.permit():
            assert (await r.complete()).status_code == 429

    run(scenario)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_hangs_gets_no_more_requests_and_its_circuit_opens(role):
    """One request finds out. The others go elsewhere at once, and a tiny request confirms that the worker hangs."""

    async def scenario():
        health = {"cool_down_seconds": 60.0, "warm_up_seconds": 0.5}
        async with rig(models=("math",), prefill=2, health=health, limits={"deadline_seconds": 0.5}) as r:
            hung = r.prefill["math"][0] if role == "prefill" else r.decode[0]
            hung.first_seconds = 60.0
            codes = [(await r.complete()).status_code for _ in range(8)]
            assert sorted(codes) == [200] * 7 + [504]
            await until(lambda: state_of(r, hung).breaker.state == "open")
            assert [w.url for w in r.state.fleet if w.breaker.state != "closed"] == [hung.url]

    run(scenario)


def test_a_worker_that_is_slow_but_sound_keeps_its_circuit():
    """Six answers miss the deadline at once, and three failures open a circuit; but it answers a tiny request."""

    async def scenario():
        async with rig(models=("math",), decode=1, limits={"deadline_seconds": 0.6}) as r:
            r.decode[0].token_seconds = 0.05
            asked = [asyncio.create_task(r.complete(max_tokens=100)) for _ in range(6)]
            assert [(await task).status_code for task in asked] == [504] * 6
            slow = state_of(r, r.decode[0])
            assert (slow.state, slow.breaker.state) == ("ready", "closed")
            assert (await r.complete(max_tokens=2)).status_code == 200
            await until(lambda: not slow.suspected)
            assert slow.breaker.failures == 0

    run(scenario)


def test_a_worker_that_was_asked_when_the_time_was_nearly_over_is_not_suspected():
    async def scenario():
        async with rig(models=("math",), decode=1, limits={"deadline_seconds": 1.0}) as r:
            r.prefill["math"][0].first_seconds = 0.7
            r.decode[0].first_seconds = 60.0
            assert (await r.complete()).status_code == 504
            assert not any(worker.suspected or worker.breaker.failures for worker in r.state.fleet)

    run(scenario)
