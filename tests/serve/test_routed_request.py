"""What of a client's body reaches a worker, and what never does."""

import pytest

from qsun.serve.routed_request import CHAT, COMPLETIONS, RoutedRequest
from qsun.serve.transfer import decode_body, prefill_body
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
