"""The router as a client sees it: OpenAI's API, streams, what is refused."""

import asyncio
import json

import pytest
from openai import AsyncOpenAI, NotFoundError

from tests.serve.fake_vllm import expected_text, prompt_of
from tests.serve.routing import expected, rig, run, text_of, until

MESSAGES = [{"role": "user", "content": "a b c d"}]


def test_answers_come_from_the_models_own_kv_cache_and_the_shared_decode_workers():
    async def scenario():
        async with rig() as r:
            for model in ("math", "code"):
                answer = await r.complete(model)
                assert answer.status_code == 200
                assert answer.json()["choices"][0]["text"] == expected(model, "a b c d", 4)
                assert answer.json()["model"] == model
                assert "kv_transfer_params" not in answer.json()
            assert not r.network  # each KV cache was fetched, once

    run(scenario)


def test_a_stream_has_every_token_and_done_and_usage_where_it_is_asked_for():
    async def scenario():
        async with rig() as r:
            *events, done = await r.stream(max_tokens=6)
            assert done == "[DONE]"
            assert text_of(events) == expected("math", "a b c d", 6)
            assert all(event["model"] == "math" and event["choices"] and "usage" not in event for event in events)
            *events, done = await r.stream(max_tokens=6, stream_options={"include_usage": True})
            assert events[-1]["usage"]["completion_tokens"] == 6
            assert text_of(events) == expected("math", "a b c d", 6)

    run(scenario)


def test_a_stream_passes_through_unbuffered():
    async def scenario():
        async with rig(decode=1) as r:
            worker = r.decode[0]
            worker.gate = Steps()
            body = {"model": "math", "prompt": "a b", "max_tokens": 5, "stream": True}
            worker.gate.let(1)
            async with r.client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                for place in range(5):
                    line = ""
                    while not line:
                        line = await anext(lines)
                    # the worker cannot write the next token before this one was read
                    token = json.loads(line[6:])["choices"][0]["text"]
                    assert token.strip() == expected("math", "a b", 5).split()[place]
                    worker.gate.let(1)

    run(scenario)


class Steps:
    """A gate that lets a given number of tokens pass."""

    def __init__(self):
        self._permits = asyncio.Semaphore(0)

    def let(self, count):
        for _ in range(count):
            self._permits.release()

    async def wait(self):
        await self._permits.acquire()


def test_the_openai_client():
    async def scenario():
        async with rig() as r, AsyncOpenAI(base_url=r.url + "/v1", api_key="none", max_retries=0) as client:
            assert {model.id async for model in client.models.list()} == {"math", "code"}
            text = expected_text("weights of code", prompt_of({"messages": MESSAGES}), 5)
            chat = await client.chat.completions.create(model="code", messages=MESSAGES, max_completion_tokens=5)
            assert chat.choices[0].message.content == text
            assert chat.usage.completion_tokens == 5
            parts = []
            async for chunk in await client.chat.completions.create(
                model="code", messages=MESSAGES, max_tokens=5, stream=True
            ):
                parts.append(chunk.choices[0].delta.content)
            assert "".join(parts) == text
            with pytest.raises(NotFoundError, match="'poetry' is not served; use one of math, code"):
                await client.completions.create(model="poetry", prompt="a")

    run(scenario)


def test_a_chat_without_max_tokens_gets_what_limit_and_context_leave():
    async def scenario():
        async with rig(limits={"max_tokens": 7}, prepare=lambda w: setattr(w, "max_model_len", 10)) as r:
            body = {"model": "math", "messages": [{"role": "user", "content": "hi"}]}
            answer = (await r.client.post("/v1/chat/completions", json=body)).json()
            read = answer["usage"]["prompt_tokens"]
            assert answer["usage"]["completion_tokens"] == min(7, 10 - read)

    run(scenario)


def test_what_a_client_must_not_send_is_dropped():
    async def scenario():
        async with rig(decode=1) as r:
            first = await r.complete(prompt="a private prompt")
            stolen = r.decode[0].seen[0]["kv_transfer_params"]
            r.forget()
            answer = await r.complete(
                kv_transfer_params=stolen,
                ec_transfer_params=stolen,
                cache_salt="of another",
                request_id="of another",
                vllm_xargs={"kv_transfer_params": "x"},
            )
            assert answer.json()["choices"][0]["text"] == expected("math", "a b c d", 4)
            assert first.json()["choices"][0]["text"] != answer.json()["choices"][0]["text"]
            for body in r.prefill["math"][0].seen + r.decode[0].seen:
                assert body.get("kv_transfer_params") != stolen
                assert body.get("cache_salt") in (None, "qsun-math")
                assert not {"ec_transfer_params", "request_id", "vllm_xargs"} & set(body)

    run(scenario)


def test_a_users_mistake_passes_through_and_is_not_tried_again():
    async def scenario():
        async with rig() as r:
            r.prefill["math"][0].statuses = [400]
            answer = await r.complete()
            assert (answer.status_code, answer.json()["error"]["message"]) == (400, "told to answer 400")
            for worker in r.decode:
                worker.statuses = [422]
            answer = await r.complete()
            assert answer.status_code == 422
            assert sum(worker.started for worker in r.decode) == 1
            assert await r.metric("qsun_router_requests_total", model="math", outcome="422") == 1
            assert all(worker.breaker.state == "closed" for worker in r.state.fleet)

    run(scenario)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"echo": True}, "echo"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"prompt": "word " * 100}, "prompt"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
    ],
    ids=lambda value: json.dumps(value)[:30],
)
def test_what_cannot_be_right_is_refused_before_any_worker_sees_it(change, param):
    async def scenario():
        async with rig(models=("math",), limits={"max_tokens": 100, "prompt_tokens": 100}) as r:
            answer = await r.client.post("/v1/completions", json={"model": "math", "prompt": "a b"} | change)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            assert not any(worker.started for worker in r.workers)

    run(scenario)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": NaN}', b"[" * 5000, b"\xff"])
def test_a_body_that_is_no_request(body):
    async def scenario():
        async with rig(models=("math",)) as r:
            headers = {"Content-Type": "application/json"}
            assert (await r.client.post("/v1/completions", content=body, headers=headers)).status_code == 400

    run(scenario)


@pytest.mark.parametrize(
    ("headers", "status"), [({"Host": "evil.example"}, 403), ({"Content-Type": "text/plain"}, 415), ({}, 200)], ids=str
)
def test_without_keys_a_web_page_of_another_site_gets_no_answer(headers, status):
    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            body = json.dumps({"model": "math", "prompt": "a", "max_tokens": 1})
            sent = {"Content-Type": "application/json"} | headers
            assert (await r.client.post("/v1/completions", content=body, headers=sent)).status_code == status
            r.apply()
            r.router.use_keys(())
            assert (await r.client.post("/v1/completions", content=body, headers=sent)).status_code == status

    run(scenario)


def test_limits_of_body_and_keys(tmp_path):
    async def scenario():
        async with rig(models=("math",), limits={"body_bytes": 300}) as r:
            assert (await r.complete(prompt="x" * 400)).status_code == 413
            r.router.apply(r.cluster(), r.names, ("a-secret-key",))
            assert (await r.complete()).status_code == 401
            headers = {"Authorization": "Bearer a-secret-key"}
            body = {"model": "math", "prompt": "a", "max_tokens": 1}
            assert (await r.client.post("/v1/completions", json=body, headers=headers)).status_code == 200
            assert (await r.client.get("/ready")).status_code == 200  # a load balancer has no key

    run(scenario)


def test_too_many_requests_wait_and_then_get_429():
    async def scenario():
        limits = {"concurrent_requests": 1, "queued_requests": 1, "queue_seconds": 20}
        async with rig(models=("math",), limits=limits) as r:
            for worker in r.decode:
                worker.gate = asyncio.Event()
            first = asyncio.create_task(r.complete())
            await until(lambda: r.state.admission.running == 1)
            second = asyncio.create_task(r.complete())
            await until(lambda: r.state.admission.waiting == 1)
            third = await r.complete()
            assert third.status_code == 429
            assert int(third.headers["Retry-After"]) >= 1
            assert await r.metric("qsun_router_queued", busy=True) == 1
            for worker in r.decode:
                worker.gate.set()
            assert [(await task).status_code for task in (first, second)] == [200, 200]

    run(scenario)


def test_a_queue_that_does_not_move_is_left_with_429():
    async def scenario():
        limits = {"concurrent_requests": 1, "queued_requests": 5, "queue_seconds": 0.1}
        async with rig(models=("math",), limits=limits) as r:
            for worker in r.decode:
                worker.gate = asyncio.Event()
            first = asyncio.create_task(r.complete())
            await until(lambda: r.state.admission.running == 1)
            assert (await r.complete()).status_code == 429
            for worker in r.decode:
                worker.gate.set()
            assert (await first).status_code == 200

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline(stream):
    """504 where nothing was sent yet; an error event where something was."""

    async def scenario():
        async with rig(models=("math",), decode=1, limits={"deadline_seconds": 0.5}) as r:
            worker = r.decode[0]
            worker.gate = asyncio.Event()
            answer = await r.complete(stream=stream)
            assert answer.status_code == 504
            await until(lambda: worker.cancelled == 1)
            worker.gate, worker.token_seconds = None, 0.2
            events = await r.stream(max_tokens=20)
            assert events[-1]["error"]["code"] == 504
            assert expected("math", "a b c d", 20).startswith(text_of(events))

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_at_the_worker(stream):
    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            worker = r.decode[0]
            worker.gate = Steps()
            worker.gate.let(2 if stream else 0)
            task = asyncio.create_task(r.complete(max_tokens=50, stream=stream))
            await until(lambda: worker.started == 1)
            task.cancel()
            await until(lambda: worker.cancelled == 1)
            await until(lambda: not r.state.busy)
            assert all(w.in_flight == w.outstanding_tokens == 0 for w in r.state.fleet)
            assert await r.metric("qsun_router_requests_total", model="math", outcome="client_gone") == 1

    run(scenario)


def test_ready_names_what_is_missing_and_metrics_add_up():
    async def scenario():
        async with rig(ready=False, prepare=lambda w: setattr(w, "healthy", w.module != "weights of code")) as r:
            await until(lambda: r.state.fleet.without_a_pair() == ["code"])
            answer = await r.client.get("/ready")
            assert answer.status_code == 503
            assert answer.json()["models_without_workers"] == ["code"]
            (faulty,) = [worker for worker in answer.json()["workers"] if worker["model"] == "code"]
            assert (faulty["state"], faulty["reason"]) == ("refused", "/health answers 503")
            assert (await r.client.get("/ready/any")).status_code == 200  # for a load balancer: the others are served
            r.prefill["code"][0].healthy = True
            await r.ready()
            assert (await r.client.get("/ready")).status_code == 200
            assert await r.metric("qsun_router_warm_pairs") == 4
            for _ in range(3):
                await r.stream(max_tokens=4)
            await r.complete("poetry")
            assert await r.metric("qsun_router_requests_total", model="math", outcome="ok") == 3
            assert await r.metric("qsun_router_requests_total", model="-", outcome="404") == 1
            assert await r.metric("qsun_router_generated_tokens_total", model="math") == 12
            assert await r.metric("qsun_router_prompt_tokens_total", model="math") == 12
            assert await r.metric("qsun_router_ttft_seconds_count", model="math") == 3
            assert await r.metric("qsun_router_in_flight") == 0
            assert await r.metric("qsun_router_worker_state", role="decode", state="ready") == 1
            assert await r.metric("qsun_router_outstanding_tokens", role="decode") == 0

    run(scenario)


def test_a_load_balancer_leaves_out_a_router_that_serves_nothing_or_drains():
    async def scenario():
        async with rig(models=("math",), decode=1, ready=False, prepare=lambda w: setattr(w, "healthy", False)) as r:
            assert (await r.client.get("/ready/any")).status_code == 503
            for worker in r.workers:
                worker.healthy = True
            await r.ready()
            r.router.apply(r.cluster(), r.names, ("a-secret-key",))
            assert (await r.client.get("/ready/any")).status_code == 200  # a probe has no key
            r.state.draining = True
            assert (await r.client.get("/ready/any")).status_code == 503
            assert (await r.client.get("/health")).status_code == 200

    run(scenario)


def test_models_one_by_one_and_health_without_a_body():
    async def scenario():
        async with rig(models=("math", "org/code")) as r:
            for name in ("math", "org/code", "org%2Fcode"):
                card = (await r.client.get(f"/v1/models/{name}")).json()
                assert (card["id"], card["object"]) == (name.replace("%2F", "/"), "model")
            answer = await r.client.get("/v1/models/none")
            assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
            assert (await r.client.head("/health")).status_code == 200

    run(scenario)


def test_the_request_id_is_the_clients_and_workers_never_see_the_same_twice():
    async def scenario():
        async with rig(models=("math",)) as r:
            for _ in range(2):
                body = {"model": "math", "prompt": "a b", "max_tokens": 1}
                answer = await r.client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
                assert answer.headers["X-Request-Id"] == "mine"
            ids = [body["headers"][b"x-request-id"] for body in r.prefill["math"][0].seen]
            assert len(set(ids)) == 2
            assert all(request_id.startswith(b"mine.1.") for request_id in ids)

    run(scenario)
