"""The HTTP API on a real socket, asked by httpx and by OpenAI's own client."""

import json
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn

import qsun
from qsun.runtime.tokens.sampling import row_seed
from qsun.serve.api.app import Serving, build_app
from qsun.serve.api.completions import ServeLimits
from qsun.serve.api.metrics import Metrics
from qsun.serve.http.guard import Guard, GuardConfig
from qsun.serve.http.server import listen
from tests.engine_rig import NAMES

PROMPT = "Ann has 12 eggs and gets 8 more. How many eggs?>"


@contextmanager
def served(engine, metrics, admin=False, guard=None, limits=None):
    serving = Serving(engine, metrics, limits or ServeLimits())
    app = Guard(build_app(serving, admin), guard or GuardConfig())
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    bound = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=60) as client:
            until(lambda: server.started)
            client.serving = serving
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)


@pytest.fixture
def server(make_engine):
    metrics = Metrics()
    with served(make_engine(metrics), metrics) as client:
        yield client


def ask(client, path="/v1/completions", **body):
    return client.post(path, json={"model": "math", "prompt": PROMPT, "temperature": 0, **body})


def error_of(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


def events(response):
    lines = [line for line in response.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def count(client, metric):
    return sum(
        float(line.rpartition(" ")[2]) for line in client.get("/metrics").text.splitlines() if line.startswith(metric)
    )


def test_each_model_answers_as_generate_does(server, prefills, decode):
    for name in NAMES:
        body = ask(server, model=name, max_tokens=12).json()
        (choice,) = body["choices"]
        assert choice["text"] == qsun.generate(prefills[name], decode, [PROMPT], max_new_tokens=12)[0]
        assert body["model"] == name
        assert body["usage"]["prompt_tokens"] == 49
        assert body["usage"]["total_tokens"] == 49 + body["usage"]["completion_tokens"]


def test_models_are_the_prefill_modules(server):
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == list(NAMES)


def test_a_stream_says_what_the_whole_answer_says(server):
    settings = {"max_tokens": 20, "ignore_eos": True, "logprobs": 2, "return_token_ids": True}
    whole = ask(server, **settings).json()["choices"][0]
    *chunks, usage, done = events(ask(server, stream=True, stream_options={"include_usage": True}, **settings))
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 20
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [token for part in parts for token in part["token_ids"]] == whole["token_ids"]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    logprobs = [value for part in parts if part["logprobs"] for value in part["logprobs"]["token_logprobs"]]
    assert logprobs == pytest.approx(whole["logprobs"]["token_logprobs"], abs=1e-5)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_several_prompts_and_choices(server, prefills, decode):
    prompts = [[5, 6, 7], [8], list(range(3, 60))]
    body = ask(server, prompt=prompts, n=2, max_tokens=5, temperature=0.9, seed=7, ignore_eos=True,
               return_token_ids=True).json()  # fmt: skip
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    for index, choice in enumerate(body["choices"]):
        seed = row_seed(7, index)
        expected = qsun.generate(prefills["math"], decode, [prompts[index // 2]], max_new_tokens=5, temperature=0.9,
                                 seed=[seed], eos=())[0]  # fmt: skip
        assert choice["token_ids"] == expected
    assert body["usage"]["prompt_tokens"] == 3 + 1 + 57
    first, second = (choice["token_ids"] for choice in body["choices"][:2])
    assert first != second  # choices of one prompt draw their own random numbers


def test_the_same_seed_gives_the_same_answer_and_no_seed_gives_others(server):
    answers = [ask(server, temperature=1.0, seed=3, max_tokens=16).json()["choices"][0]["text"] for _ in range(2)]
    assert answers[0] == answers[1]
    free = {ask(server, temperature=1.0, max_tokens=16).json()["choices"][0]["text"] for _ in range(6)}
    assert len(free) > 1


def test_stop_strings(server, prefills, decode):
    free = qsun.generate(prefills["math"], decode, [PROMPT], max_new_tokens=20)[0]
    choice = ask(server, stop=[free[6:8], "\x01"], max_tokens=20).json()["choices"][0]
    assert choice["text"] == free[: free.index(free[6:8])]
    assert choice["finish_reason"] == "stop"


def test_openais_own_client(server):
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="any-key-0", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == list(NAMES)
        messages = [
            {"role": "user", "content": "count"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [{"type": "text", "text": "eggs"}]},
        ]
        chat = client.chat.completions.create(
            model="code", messages=messages, max_completion_tokens=9, temperature=0, logprobs=True, top_logprobs=3
        )
        assert chat.choices[0].message.role == "assistant"
        assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens <= 9
        assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 3
        stream = client.chat.completions.create(
            model="code", messages=messages, max_tokens=9, temperature=0, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == chat.choices[0].message.content
        completion = client.completions.create(model="tool", prompt=[PROMPT, "x"], max_tokens=4, n=2)
        assert len(completion.choices) == 4
        with pytest.raises(openai.NotFoundError, match="models are math, code, tool"):
            client.completions.create(model="poetry", prompt="x")
        with pytest.raises(openai.BadRequestError, match="does not support tools"):
            client.chat.completions.create(
                model="code", messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
            )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "math"}, "prompt: Field required"),
        ({"max_tokens": 0}, "max_tokens 0 leaves nothing to generate; use 1 or more, or set echo"),
        ({"max_tokens": 4000}, "maximum context length is 512 tokens, and the request has 2 in the prompt and 4000 in"),
        ({"max_tokens": None, "prompt": [[5] * 600]}, "600 in the prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [200]}, "token 200, outside the model's vocabulary of 128"),
        ({"prompt": ["x"] * 17}, "at most 16 items"),
        ({"prompt": ["x"] * 8, "n": 3}, "8 prompts x n 3 is over the limit of 16"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "the body is not JSON: NaN is not a number"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"suffix": "x"}, "suffix is not supported; leave it out"),
        ({"best_of": 3}, "best_of 3 is not supported; leave it out"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"temperature": True}, "temperature: Input should be a valid number"),
        ({"echo": 1}, "echo: Input should be a valid boolean"),
        ({"stop": ""}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 1 << 70}, "seed"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_wrong_body_is_told_what_is_wrong(server, body, message):
    content = json.dumps(body if body == {"model": "math"} else {"model": "math", "prompt": "x", **body})
    found = error_of(server.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}), 400)
    assert message in found


def test_what_is_no_json_is_told_so(server):
    for content in (b"{bad", b"", b"\xff\xfe", b"[" * 5000):
        response = server.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text


NOT_JSON = ("NaN", "-Infinity", "1e999", '"\\ud83d"', '{"\\udfff": [1]}', "9" * 5000, "[" * 5000)
TOOL = '[{"type": "function", "name": "f", "parameters": {"description": %s}}]'


@pytest.mark.parametrize("value", NOT_JSON, ids=lambda v: v[:10])
def test_a_body_that_no_answer_could_repeat_is_refused_whichever_field_has_it(server, value):
    head, headers = '{"model": "math", "max_tokens": 1, ', {"Content-Type": "application/json"}
    for path, fields in (
        ("/v1/completions", '"prompt": %s}'),
        ("/v1/responses", '"input": "x", "metadata": {"a": %s}}'),
        ("/v1/responses", f'"input": "x", "tool_choice": "none", "tools": {TOOL}}}'),
        ("/v1/chat/completions", '"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"x": %s}}'),
        ("/tokenize", '"prompt": "x", "unknown": %s}'),
    ):
        body = (head + fields % value).encode()
        assert "the body is not JSON: " in error_of(server.post(path, content=body, headers=headers), 400)


def test_a_chat_template_that_refuses_is_a_reason(server):
    engine = server.serving.engine
    kept = engine.tokenizer.chat_template
    try:
        engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        body = {"model": "math", "messages": [{"role": "user", "content": "x"}]}
        assert "roles must alternate" in error_of(server.post("/v1/chat/completions", json=body), 400)
        engine.tokenizer.chat_template = None
        assert "no chat template" in error_of(server.post("/v1/chat/completions", json=body), 400)
    finally:
        engine.tokenizer.chat_template = kept


def test_unknown_paths_and_methods_are_errors_in_the_same_words(server):
    assert error_of(server.get("/v1/nothing"), 404) == "Not Found"
    assert error_of(server.get("/v1/completions"), 405) == "Method Not Allowed"
    assert error_of(server.post("/admin/models", json={"name": "x", "directory": "demo"}), 404)


def test_a_full_queue_answers_429_and_takes_all_or_none(make_engine):
    metrics = Metrics()
    engine = make_engine(metrics, max_batch=1, max_waiting=3)
    with served(engine, metrics) as client, httpx.Client(base_url=client.base_url, timeout=60) as other:
        with other.stream("POST", "/v1/completions", json={"model": "math", "prompt": [5], "max_tokens": 510,
                                                           "stream": True, "ignore_eos": True}):  # fmt: skip
            until(lambda: engine.state.models["math"].decoding == 1)
            never = ask(client, prompt=[[5]] * 4, max_tokens=1)  # not even where nobody waits
            assert "4 answers are requested at once, and the queue holds 3" in error_of(never, 400)
            behind = threading.Thread(target=ask, args=(client,), kwargs={"prompt": [5], "max_tokens": 1})
            behind.start()
            until(lambda: engine.state.waiting == 1)
            full = ask(client, prompt=[[5]] * 3, max_tokens=1)
            assert "1 requests are waiting, and the limit is 3" in error_of(full, 429)
            assert 1 <= int(full.headers["retry-after"]) <= 60
            assert engine.state.waiting == 1
            assert count(client, 'qsun_requests_refused_total{model="math"}') == 3
            assert count(client, 'qsun_requests_total{model="math",outcome="cancelled"}') == 0
        behind.join(20)
        until(lambda: engine.state.models["math"].decoding == 0)
        assert ask(client, prompt=[[5]] * 3, max_tokens=1).status_code == 200


def test_a_client_that_leaves_frees_its_slot(make_engine):
    metrics = Metrics()
    engine = make_engine(metrics)
    with served(engine, metrics) as client:
        long = {"model": "math", "prompt": [5, 6], "max_tokens": 510, "ignore_eos": True}
        with (
            httpx.Client(base_url=client.base_url) as leaving,
            leaving.stream("POST", "/v1/completions", json={**long, "stream": True}) as stream,
        ):
            next(stream.iter_bytes())
        until(lambda: engine.state.models["math"].decoding == 0)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{client.base_url}/v1/completions", json=long, timeout=httpx.Timeout(10, read=0.05))
        until(lambda: count(client, 'qsun_requests_total{model="math",outcome="cancelled"}') == 2)
        assert engine.state.models["math"].decoding == 0


def test_an_answer_that_takes_too_long_is_given_up(make_engine):
    metrics = Metrics()
    with served(make_engine(metrics), metrics, limits=ServeLimits(max_tokens=500, seconds=1e-6)) as client:
        assert "not done within" in error_of(ask(client), 504)
        *_, last = events(ask(client, stream=True))
        assert last["error"]["type"] == "timeout_error"  # and no [DONE]
        assert count(client, 'qsun_requests_total{model="math",outcome="timeout"}') == 2
        assert count(client, 'qsun_requests_total{model="math",outcome="cancelled"}') == 0
        assert "over this server's limit of 500" in error_of(ask(client, max_tokens=501), 400)


def test_a_chat_without_a_number_leaves_room_for_others(make_engine):
    """KV is reserved for the whole answer; with all positions for each, only one request would run at a time."""
    chat = {"model": "math", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    for default in (7, 0):
        metrics = Metrics()
        with served(make_engine(metrics, kv_tokens=90), metrics, limits=ServeLimits(default_tokens=default)) as client:
            usage = client.post("/v1/chat/completions", json=chat).json()["usage"]
            assert usage["completion_tokens"] == (default or 91 - usage["prompt_tokens"])


def test_modules_come_and_go_where_administration_is_on(make_engine, base_directory, tmp_path):
    metrics = Metrics()
    engine = make_engine(metrics)
    with served(engine, metrics, admin=True) as client:
        add = {"name": "base", "directory": str(base_directory)}
        assert client.post("/admin/models", json=add).status_code == 201
        assert "already served" in error_of(client.post("/admin/models", json=add), 400)
        assert "not a directory" in error_of(
            client.post("/admin/models", json={**add, "name": "x", "directory": "no"}), 400
        )
        other = {"name": "other", "directory": "demo"}
        assert "does not fit decode module" in error_of(client.post("/admin/models", json=other), 400)
        assert ask(client, model="base").status_code == 200
        with client.stream("POST", "/v1/completions", json={"model": "base", "prompt": [5], "max_tokens": 200,
                                                            "stream": True, "ignore_eos": True}) as stream:  # fmt: skip
            lines = stream.iter_lines()
            next(lines)
            gone = client.delete("/admin/models/base")
            assert (gone.status_code, gone.json()["deleted"]) == (200, True)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert error_of(ask(client, model="base"), 404)
        assert error_of(client.delete("/admin/models/base"), 404)


def test_the_engines_failure_is_everybodys_answer(make_engine):
    metrics = Metrics()
    engine = make_engine(metrics)

    def fails():
        raise RuntimeError("out of memory")

    with served(engine, metrics) as client:
        engine.step = fails
        assert "out of memory" in error_of(ask(client), 500)
        assert error_of(ask(client), 503)
        assert client.get("/health").status_code == client.get("/ready").status_code == 503


def test_counters_add_up(server):
    for number in range(6):
        ask(server, model=NAMES[number % 3], max_tokens=3, ignore_eos=True)
    assert count(server, "qsun_requests_total") == 6
    assert count(server, "qsun_generated_tokens_total") == 18
    assert count(server, "qsun_ttft_seconds_count") == count(server, "qsun_tpot_seconds_count") == 6
    assert count(server, "qsun_requests_decoding") == count(server, "qsun_requests_waiting") == 0
    assert count(server, "qsun_prefix_cache_hit_tokens_total") == 3 * 32


def test_keys_guard_v1_and_leave_health_open(make_engine):
    metrics = Metrics()
    with served(make_engine(metrics), metrics, guard=GuardConfig(api_keys=("a-long-key",))) as client:
        assert error_of(ask(client), 401)
        assert client.get("/health").status_code == 200
        assert ask(client).status_code == 401
        client.headers["Authorization"] = "Bearer a-long-key"
        assert ask(client).status_code == 200
