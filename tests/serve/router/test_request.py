"""What of a client's body reaches a worker, and what never does."""

import json

import pytest

from qsun.serve.http.guard import ClientStalled
from qsun.serve.router.endpoint import GenerationEndpoint
from qsun.serve.router.exchange.request import CHAT, COMPLETIONS, RoutedRequest
from qsun.serve.router.exchange.transfer import decode_body, prefill_body
from tests.serve.routing import expected, rig, run

REFUSED = ("echo", "prompt_logprobs", "use_beam_search", "prompt_embeds", "suffix")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["prompt_logprobs", "prompt_embeds", "suffix"])
def test_false_is_no_way_around_what_is_refused(name, stream):
    """`prompt_logprobs: false` is 0 to vLLM, and with that the decode worker computes the prompt itself."""

    async def scenario():
        async with rig(models=("math",)) as r:
            answer = await r.complete(stream=stream, **{name: False})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
            assert not any(worker.started for worker in r.workers)

    run(scenario)


@pytest.mark.parametrize("fields", [dict.fromkeys(REFUSED), {"echo": False, "use_beam_search": False}])
def test_what_is_off_is_answered_and_dropped(fields):
    async def scenario():
        async with rig(models=("math",)) as r:
            answer = await r.complete(**fields)
            assert answer.json()["choices"][0]["text"] == expected("math", "a b c d", 4)
            assert not any(name in body for worker in r.workers for body in worker.seen for name in REFUSED)

    run(scenario)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_prompt_logprobs_are_sent_to_no_worker_whatever_a_request_holds(path):
    request = RoutedRequest(path, "math", {"prompt_logprobs": 0}, False, False, 4, 4)
    assert "prompt_logprobs" not in prefill_body(request, "qsun-math")
    assert "prompt_logprobs" not in decode_body(request, "qsun-decode", "qsun-math", {}, 4)


@pytest.mark.parametrize("value", ["1e999", "-1e999", '"\\ud800"', '{"a": ["\\udfff"]}'])
def test_json_that_no_worker_can_be_sent_is_a_users_mistake(value):
    """It parses, to an infinity or to half of a character, and cannot be written again."""

    async def scenario():
        async with rig(models=("math",)) as r:
            body = '{"model": "math", "prompt": "a b", "max_tokens": 2, "temperature": ' + value + "}"
            answer = await r.client.post("/v1/completions", content=body)
            assert answer.status_code == 400
            assert "the body is not JSON" in answer.json()["error"]["message"]
            assert not any(worker.started for worker in r.workers)
            assert await r.metric("qsun_router_requests_total", outcome="400") == 1

    run(scenario)


def test_a_fault_of_the_router_counts_as_500_and_not_as_a_client_that_left():
    async def scenario():
        async with rig(models=("math",)) as r:

            def broken(*_):
                raise RuntimeError("a fault of ours")

            r.state.fleet.choose_prefill = broken
            assert (await r.complete()).status_code == 500
            assert await r.metric("qsun_router_requests_total", outcome="500") == 1
            assert await r.metric("qsun_router_requests_total", outcome="client_gone") == 0

    run(scenario)


def test_a_client_that_takes_nothing_counts_as_one_that_left():
    async def scenario():
        async with rig(models=("math",)) as r:

            async def stalled(*_):
                raise ClientStalled

            endpoint = GenerationEndpoint(r.state)
            endpoint._exchange = stalled
            body = json.dumps({"model": "math", "prompt": "a b", "max_tokens": 2}).encode()
            with pytest.raises(ClientStalled):
                await endpoint._serve({"path": COMPLETIONS, "state": {"request_id": "x"}}, body, None)
            assert await r.metric("qsun_router_requests_total", outcome="client_gone") == 1

    run(scenario)
