"""The router as a client sees it: OpenAI's API, streams, what is refused."""

import asyncio

from tests.serve.routing import expected, rig, text_of


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_answers_come_from_the_models_own_kv_cache_and_the_shared_decode_workers():
    async def scenario():
        async with rig() as r:
            for model in ("math", "code"):
                answer = await r.complete(model)
                assert answer.status_code == 200
                assert answer.json()["choices"][0]["text"] == expected(model, "a b c d", 4)
                assert answer.json()["model"] == model
            assert await r.metric("qsun_router_requests_total", model="math", outcome="ok") == 1
            assert not r.network  # each KV cache was fetched, once

    run(scenario)


def test_a_stream_has_every_token_and_done():
    async def scenario():
        async with rig() as r:
            *events, done = await r.stream(max_tokens=6)
            assert done == "[DONE]"
            assert text_of(events) == expected("math", "a b c d", 6)
            assert all(event["model"] == "math" and event["choices"] and "usage" not in event for event in events)

    run(scenario)
