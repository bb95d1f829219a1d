"""Every hazard of disaggregated serving: an answer is right or an explicit error, and never wrong text."""

import asyncio
import json

import pytest

from tests.serve.fake_vllm import GARBAGE
from tests.serve.routing import expected, rig, run, text_of, until

PLACE = {"do_remote_prefill": True, "remote_engine_id": "x", "remote_host": "h", "remote_port": 1}
BLOCKLESS = {
    "absent": None,
    "empty": {},
    "no block ids": PLACE,
    "no blocks": PLACE | {"remote_block_ids": []},
    "no blocks in any group": PLACE | {"remote_block_ids": [[], []]},
}


@pytest.mark.parametrize("params", BLOCKLESS.values(), ids=BLOCKLESS)
def test_missing_transfer_parameters_never_reach_a_decode_worker(params):
    async def scenario():
        async with rig(models=("math",), prefill=2, health={"failures": 100}) as r:
            first, second = r.prefill["math"]
            first.without_params = second.without_params = 100
            first.bad_params = second.bad_params = params
            answer = await r.complete()
            assert answer.status_code == 502
            assert "kv_transfer_params" in answer.json()["error"]["message"]
            assert "127.0.0.1" not in answer.text
            assert not any(worker.started for worker in r.decode)
            assert await r.metric("qsun_router_missing_transfer_params_total", model="math") == 4
            second.without_params = 0  # another prefill worker can do it
            for _ in range(4):
                assert (await r.complete()).json()["choices"][0]["text"] == expected("math", "a b c d", 4)

    run(scenario)


def test_a_prompt_of_one_token_needs_no_kv_cache():
    async def scenario():
        async with rig(models=("math",)) as r:
            with_params = await r.complete(prompt=[7])
            r.prefill["math"][0].without_params = 1
            without = await r.complete(prompt=[7])
            assert with_params.json()["choices"][0]["text"] == without.json()["choices"][0]["text"]

    run(scenario)


def test_the_same_prompt_to_two_models_never_mixes_even_where_decode_workers_cache_prefixes():
    async def scenario():
        def caching(worker):
            worker.prefix_caching = worker.role == "decode"

        async with rig(decode=1, prepare=caching) as r:
            for model in ("math", "code", "code", "math"):
                assert (await r.complete(model)).json()["choices"][0]["text"] == expected(model, "a b c d", 4)
            assert {body["cache_salt"] for body in r.decode[0].seen} == {"qsun-math", "qsun-code"}

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["statuses", "cut_after", "abort_after", "error_after"])
def test_a_failure_before_the_first_byte_starts_again_at_prefill(stream, fault):
    """Transfer parameters are new each time: the fake's network gives a KV cache once, and garbage after that."""

    async def scenario():
        cause = "status_5xx" if fault == "statuses" else "broken"
        async with rig(models=("math",), decode=2, limits={"attempts": 20}) as r:
            if fault == "error_after" and not stream:
                return  # an answer that is whole has no events
            for worker in r.decode:
                setattr(worker, fault, [500] if fault == "statuses" else 0)
            task = asyncio.create_task(r.stream(max_tokens=3) if stream else r.complete(max_tokens=3))
            sample = r.state.metrics.registry.get_sample_value
            await until(lambda: (sample("qsun_router_retries_total", {"cause": cause}) or 0) >= 2)
            for worker in r.decode:
                worker.cut_after = worker.abort_after = worker.error_after = None
            answer = await task
            text = text_of(answer) if stream else answer.json()["choices"][0]["text"]
            assert text == expected("math", "a b c d", 3)
            used = [json.dumps(b["kv_transfer_params"]) for worker in r.decode for b in worker.seen]
            assert len(set(used)) == len(used) >= 3

    run(scenario)


@pytest.mark.parametrize("fault", ["cut_after", "abort_after", "error_after", "no_done"])
def test_a_stream_that_breaks_later_ends_with_an_error_and_without_done(fault):
    async def scenario():
        async with rig(models=("math",)) as r:
            for worker in r.decode:
                setattr(worker, fault, True if fault == "no_done" else 2)
            *events, last = await r.stream(max_tokens=6)
            assert last["error"]["type"] == "upstream_error"
            assert text_of(events) == expected("math", "a b c d", 6 if fault == "no_done" else 2)
            assert sum(worker.started for worker in r.decode) == 1  # the client has seen text: no second try
            assert await r.metric("qsun_router_requests_total", model="math", outcome="broken_stream") == 1

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_decode_worker_killed_under_load_of_64(stream):
    """Each answer is right or an error; none is wrong, and none is cut off silently."""

    async def scenario():
        def slow(worker):
            worker.token_seconds = 0.01

        async with rig(decode=2, prepare=slow, limits={"no_worker_seconds": 10.0}) as r:
            prompts = [(("math", "code")[i % 2], f"prompt number {i % 7} of many") for i in range(64)]
            tasks = [
                asyncio.create_task(r.stream(m, p, max_tokens=30) if stream else r.complete(m, p, max_tokens=30))
                for m, p in prompts
            ]
            await until(lambda: sum(worker.started for worker in r.decode) >= 50)
            await r.decode[0].kill()
            answers = await asyncio.gather(*tasks)
            broken = 0
            for (model, prompt), answer in zip(prompts, answers, strict=True):
                whole = expected(model, prompt, 30)
                if not stream:
                    assert answer.status_code == 200  # the client had nothing yet: every one could start again
                    assert answer.json()["choices"][0]["text"] == whole
                elif answer[-1] == "[DONE]":
                    assert text_of(answer) == whole
                else:
                    broken += 1
                    assert answer[-1]["error"]["code"] == 502
                    assert whole.startswith(text_of(answer))
            assert GARBAGE not in str(answers)
            assert not stream or 0 < broken < 64
            assert all(w.in_flight == w.outstanding_tokens == 0 for w in r.state.fleet)

    run(scenario)


def test_a_prefill_worker_that_is_down_is_passed_over():
    async def scenario():
        async with rig(models=("math",), prefill=2) as r:
            await r.prefill["math"][0].kill()
            for _ in range(6):
                assert (await r.complete()).json()["choices"][0]["text"] == expected("math", "a b c d", 4)

    run(scenario)


def test_a_worker_restarted_with_other_weights_gets_no_requests_and_gives_no_text():
    async def scenario():
        async with rig(models=("math",), prefill=2, health={"interval_seconds": 60.0}) as r:  # nobody looks meanwhile
            wrong = r.prefill["math"][0]
            wrong.module, wrong.served_name = "other weights", "qsun-other"
            for _ in range(4):
                assert (await r.complete()).json()["choices"][0]["text"] == expected("math", "a b c d", 4)
            state = next(worker for worker in r.state.fleet if worker.url == wrong.url)
            await until(lambda: state.state == "refused" and "serves qsun-other" in state.reason)
            assert wrong.started == 1
            assert await r.metric("qsun_router_retries_total", cause="wrong_worker") == 1

    run(scenario)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_is_full_is_not_a_faulty_one(role, status):
    """It says that it is full, and gets requests as soon as it has room again."""

    async def scenario():
        async with rig(models=("math",), decode=1, health={"cool_down_seconds": 60.0}) as r:
            full = r.prefill["math"][0] if role == "prefill" else r.decode[0]
            full.statuses = [status] * 12
            for _ in range(3):
                answer = await r.complete()
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert not any(worker.breaker.failures for worker in r.state.fleet)
            assert (await r.complete()).json()["choices"][0]["text"] == expected("math", "a b c d", 4)

    run(scenario)


def test_connections_survive_a_burst_of_clients_that_leave():
    """Afterwards every connection to a worker is free again."""

    async def scenario():
        limits = {"concurrent_requests": 8, "queued_requests": 200}
        async with rig(models=("math",), decode=2, limits=limits) as r:
            for worker in r.workers:
                worker.first_seconds = 0.05
            for _ in range(2):
                asked = [asyncio.create_task(r.complete(stream=bool(i % 2))) for i in range(100)]
                await until(lambda: r.state.admission.waiting > 50)
                for task in asked:
                    task.cancel()
                await asyncio.wait(asked)
            await until(lambda: not r.state.busy)
            assert all(worker.in_flight == worker.outstanding_tokens == 0 for worker in r.state.fleet)
            answers = await asyncio.gather(*(r.complete() for _ in range(40)))
            assert {answer.status_code for answer in answers} == {200}

    run(scenario)


def test_a_client_that_leaves_a_fast_stream_ends_it():
    """Events are ready faster than they are relayed, and a cancellation between two of them must not be lost."""

    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            body = {"model": "math", "prompt": "a b", "max_tokens": 16_000, "stream": True}
            for _ in range(3):
                async with r.client.stream("POST", "/v1/completions", json=body) as response:
                    await anext(response.aiter_lines())
            assert await r.metric("qsun_router_requests_total", outcome="client_gone") == 3

    run(scenario)


def test_a_slow_prefill_worker_is_given_up():
    async def scenario():
        async with rig(models=("math",), prefill=2, limits={"prefill_seconds": 0.2}) as r:
            slow = r.prefill["math"][0]
            slow.first_seconds = 30.0
            for _ in range(3):
                assert (await r.complete()).json()["choices"][0]["text"] == expected("math", "a b c d", 4)
            asked = [body for body in slow.seen if body["prompt"] == "a b c d"]
            assert len(asked) == slow.cancelled == 1  # the first request finds out, and the others go elsewhere
            assert await r.metric("qsun_router_retries_total", cause="timeout") == 1

    run(scenario)


def test_a_stream_that_stalls_ends_with_an_error():
    async def scenario():
        async with rig(models=("math",), decode=1, limits={"stall_seconds": 0.3}) as r:
            r.decode[0].token_seconds = 0.05
            task = asyncio.create_task(r.stream(max_tokens=50))
            await until(lambda: r.state.fleet.decode[0].in_flight and r.decode[0].started)
            await asyncio.sleep(0.2)
            r.decode[0].token_seconds = 30.0
            events = await task
            assert events[-1]["error"]["code"] == 502
            assert expected("math", "a b c d", 50).startswith(text_of(events))

    run(scenario)


def test_no_worker_at_all_is_503_and_a_worker_that_comes_back_in_time_is_used():
    async def scenario():
        async with rig(models=("math",), decode=1, limits={"no_worker_seconds": 0.3}) as r:
            await r.decode[0].kill()
            answer = await r.complete()
            assert answer.status_code == 503
            assert answer.headers["Retry-After"]
            r.settings["limits"] = {"no_worker_seconds": 20.0}
            r.apply()
            task = asyncio.create_task(r.complete())
            await r.decode[0].restart()
            assert (await task).json()["choices"][0]["text"] == expected("math", "a b c d", 4)

    run(scenario)


def test_workers_that_read_another_number_of_prompt_tokens_do_not_fit():
    async def scenario():
        async with rig(models=("math",), health={"failures": 100}) as r:
            r.prefill["math"][0].extra_prompt_tokens = 1
            answer = await r.complete()
            assert answer.status_code == 502
            assert "reads 4 prompt tokens where the prefill worker read 5" in answer.json()["error"]["message"]

    run(scenario)
