"""Which parts of a client's body reach a worker, and which never do."""

import json

import pytest

from qsun.serve.http.guard import ClientStalled
from qsun.serve.router.endpoint import GenerationEndpoint
from qsun.serve.router.exchange.request import CHAT, COMPLETIONS, RoutedRequest
from qsun.serve.router.exchange.transfer import decode_body, prefill_body
from tests.serve.fake_vllm import expected_text, prompt_of
from tests.serve.routing import expected, parsed, rig, run

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
    """It parses, to an infinity or half of a character, but cannot be serialized again."""

    async def scenario():
        async with rig(models=("math",)) as r:
            body = '{"model": "math", "prompt": "a b", "max_tokens": 2, "temperature": ' + value + "}"
            headers = {"Content-Type": "application/json"}
            answer = await r.client.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code == 400
            assert "the body is not JSON" in answer.json()["error"]["message"]
            assert not any(worker.started for worker in r.workers)
            assert await r.metric("qsun_router_requests_total", outcome="400") == 1

    run(scenario)


NULLS = ("ignore_eos", "min_tokens", "logprobs", "tools", "response_format", "stream_options", "stop", "n", "echo", "x")


def test_null_in_any_optional_field_asks_for_nothing():
    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            answer = await r.complete(**dict.fromkeys(NULLS))
            assert answer.json()["choices"][0]["text"] == expected("math", "a b c d", 4)
            assert not any(name in body for worker in r.workers for body in worker.seen for name in NULLS)
            message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}
            asked = {"model": "math", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}, message]}
            assert (await r.client.post(CHAT, json=asked)).status_code == 200
            assert r.decode[0].seen[-1]["messages"][-1] == {"role": "assistant", "content": None}

    run(scenario)


NEUTRAL = {
    "echo": False,
    "suffix": "",
    "best_of": 1,
    "repetition_penalty": 1.0,
    "features": {},
    "use_beam_search": False,
}


def test_neutral_and_unknown_fields_are_accepted_and_unknown_ones_passed_on():
    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            options = {"include_usage": False, "continuous_usage_stats": False}
            answer = await r.complete(stream_options=options, **NEUTRAL)
            assert answer.json()["choices"][0]["text"] == expected("math", "a b c d", 4)
            seen = r.decode[0].seen[-1]
            assert (seen["repetition_penalty"], seen["features"]) == (1.0, {})
            assert "stream_options" not in seen

    run(scenario)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ASKED = {"model": "math", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 3, "tools": TOOLS}
CONSTRAINTS = {
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["yes", "no"]},
    "guided_json": {"type": "object"},
    "parallel_tool_calls": False,
}


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_reach_both_workers_and_constraints_only_the_decode_worker(choice):
    """The prompt contains the tools, so both workers need them; the prefill worker's token is unconstrained."""

    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            constraints = dict(CONSTRAINTS)
            if isinstance(choice, dict):
                del constraints["structured_outputs"]  # vLLM refuses both
            body = ASKED | constraints | {"tool_choice": choice}
            answer = (await r.client.post(CHAT, json=body)).json()
            whole = expected_text("weights of math", prompt_of(ASKED), 3)
            assert answer["choices"][0]["message"]["content"] == whole
            (filled,), (decoded,) = r.prefill["math"][0].seen, r.decode[0].seen
            assert filled["tools"] == decoded["tools"] == TOOLS
            assert filled["tool_choice"] == "none"
            assert {name: decoded[name] for name in constraints} == constraints
            assert decoded["tool_choice"] == choice

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prefill_worker_that_hides_the_tools_gives_no_answer(stream):
    """Its prompt is another one, and the first event already shows it: the client gets no text of a wrong KV cache."""

    async def scenario():
        async with rig(models=("math",), decode=1, limits={"attempts": 2}) as r:
            r.prefill["math"][0].hides_tools = True
            answer = await r.client.post(CHAT, json=ASKED | {"tool_choice": "auto", "stream": stream})
            assert answer.status_code == 502
            assert "prompt tokens where the prefill worker read" in answer.json()["error"]["message"]

    run(scenario)


@pytest.mark.parametrize(
    "wanted", [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
def test_a_stream_shows_the_usage_that_the_client_asked_for(wanted):
    """With tools the router asks for the usage of every event, for itself."""

    async def scenario():
        async with rig(models=("math",)) as r:
            body = ASKED | {"stream": True} | ({"stream_options": wanted} if wanted else {})
            async with r.client.stream("POST", CHAT, json=body) as response:
                events = [parsed(line) async for line in response.aiter_lines() if line]
            assert events.pop() == "[DONE]"
            last = events.pop() if wanted else {"choices": [], "usage": True}
            assert not last["choices"] and last["usage"]
            assert all(("usage" in event) == ("continuous_usage_stats" in wanted) for event in events)
            assert len(events) == 4

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
                await endpoint._serve({"path": COMPLETIONS, "headers": [], "state": {"request_id": "x"}}, body, None)
            assert await r.metric("qsun_router_requests_total", outcome="client_gone") == 1

    run(scenario)
