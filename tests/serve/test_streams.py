"""Streams: what counts as a beginning, and how long one may last."""

from tests.serve.fake_vllm import expected_text, prompt_of
from tests.serve.routing import expected, parsed, rig, run, text_of, until

MESSAGES = [{"role": "user", "content": "a b c d"}]


def state_of(r, fake):
    return next(worker for worker in r.router.fleet if worker.url == fake.url)


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
    """The role is no proof of anything: such a worker's circuit opens."""

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
