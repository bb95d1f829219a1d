"""The endpoints besides completions and chats, and what all streams have in common."""

import asyncio
import json
from functools import partial
from types import SimpleNamespace

import pytest
from starlette.requests import ClientDisconnect

from qsun._version import __version__
from qsun.serve.api import generation
from qsun.serve.api.app import build_app
from qsun.serve.api.generation import kept_alive
from qsun.serve.api.metrics import Metrics
from qsun.serve.http.wire import KEEP_ALIVE
from tests.serve.api.test_api import ask, error_of, events, served, until

ASK = [{"role": "user", "content": "count"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
def client(make_engine):
    metrics = Metrics()
    with served(make_engine(metrics), metrics) as found:
        yield found


def test_one_model_is_found_by_its_name(client, prefills):
    engine = client.serving.engine
    engine.add_module("org/x", prefills["math"])
    for path, name in (("math", "math"), ("org/x", "org/x"), ("org%2Fx", "org/x")):
        card = client.get(f"/v1/models/{path}").json()
        assert (card["id"], card["object"], card["max_model_len"]) == (name, "model", 512)
    refused = client.get("/v1/models/poetry")
    assert "models are math, code, tool, org/x" in error_of(refused, 404)
    assert refused.json()["error"]["code"] == "model_not_found"


def test_probes_may_use_head(client):
    for path in ("/health", "/ready"):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert client.get("/version").json() == {"version": __version__}


def test_tokens_of_text_and_back(client):
    whole = client.post("/tokenize", json={"model": "math", "prompt": "a b"}).json()
    assert (whole["count"], whole["max_model_len"]) == (4, 512)
    bare = client.post("/tokenize", json={"prompt": "a b", "add_special_tokens": False}).json()["tokens"]
    assert whole["tokens"][1:] == bare
    assert client.post("/detokenize", json={"tokens": bare}).json() == {"prompt": "a b"}
    chat = client.post("/tokenize", json={"messages": ASK}).json()
    body = {"model": "math", "messages": ASK, "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"] == chat["count"]
    assert "outside the vocabulary" in error_of(client.post("/detokenize", json={"tokens": [9999]}), 400)
    assert "either prompt or messages" in error_of(client.post("/tokenize", json={}), 400)


def test_a_prompt_that_is_too_long_says_so_in_the_words_that_clients_look_for(client):
    long = "word " * 200
    for path, body, field in (
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/v1/completions", {"prompt": "x" * 900_000}, "prompt"),
    ):
        refused = client.post(path, json={"model": "math", **body})
        assert "maximum context length" in error_of(refused, 400)
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)


def test_a_response_is_what_the_chat_says(client):
    body = {"model": "code", "temperature": 0}
    chat = client.post("/v1/chat/completions", json={**body, "messages": ASK, "max_tokens": 9}).json()
    asked = {**body, "input": "count", "max_output_tokens": 9}
    whole = client.post("/v1/responses", json=asked).json()
    assert whole["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    stream = client.post("/v1/responses", json={**asked, "stream": True})
    told = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    last = told[-1]["response"]
    assert told[-1]["type"] == f"response.{last['status']}"
    text = "".join(event["delta"] for event in told if event["type"] == "response.output_text.delta")
    assert text == last["output"][0]["content"][0]["text"] == whole["output"][0]["content"][0]["text"]
    assert last["usage"] == whole["usage"]


def test_tools_are_shown_by_the_template_or_refused(client):
    body = {"model": "math", "messages": ASK, "tools": [TOOL], "max_tokens": 2}
    assert "does not support tools" in error_of(client.post("/v1/chat/completions", json=body), 400)
    without = client.post("/v1/chat/completions", json={**body, "tool_choice": "none"}).json()
    tokenizer = client.serving.engine.tokenizer
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ tools | tojson }}<tool_call>" + kept
        shown = client.post("/v1/chat/completions", json=body).json()
    finally:
        tokenizer.chat_template = kept
    assert shown["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"] + len(json.dumps(TOOL))


def test_the_prompt_is_part_of_an_echo(client):
    alone = ask(client, prompt="abc", max_tokens=4).json()["choices"][0]["text"]
    assert ask(client, prompt="abc", max_tokens=4, echo=True).json()["choices"][0]["text"] == "abc" + alone
    parts = events(ask(client, prompt="abc", max_tokens=4, echo=True, stream=True))[:-1]
    assert "".join(part["choices"][0]["text"] for part in parts) == "abc" + alone
    asked = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1}
    nothing = ask(client, **asked).json()
    (choice,) = nothing["choices"]
    assert (choice["text"], choice["finish_reason"], nothing["usage"]["completion_tokens"]) == ("abc", "length", 0)
    *parts, usage, _ = events(ask(client, **asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part["choices"][0]["text"] for part in parts) == "abc"
    assert parts[0]["choices"][0]["logprobs"] == choice["logprobs"]
    assert usage["usage"]["completion_tokens"] == 0


def test_a_silent_stream_is_kept_alive_and_closed_at_once():
    closed = []

    async def scenario():
        async def slow():
            try:
                yield b"first"
                await asyncio.sleep(0.25)
                yield b"second"
                await asyncio.sleep(60)
            finally:
                closed.append(True)

        stream, seen = kept_alive(slow(), 0.1), []
        async for piece in stream:
            seen.append(piece)
            if piece == b"second":
                break
        await stream.aclose()
        return seen

    assert asyncio.run(scenario()) == [b"first", KEEP_ALIVE, KEEP_ALIVE, b"second"]
    assert closed == [True]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("sent", [0, 1, 3], ids=["before the head", "before an event", "amid events"])
def test_a_stream_that_cannot_be_sent_frees_its_slot(client, path, sent):
    body = {"prompt": "abc", "echo": True} if path == "/v1/completions" else {"messages": ASK}
    body = {"input": "count"} if path == "/v1/responses" else {**body, "ignore_eos": True}
    most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    content = json.dumps({"model": "math", most: 450, "stream": True, **body}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))],
        "query_string": b"",
        "client": ("127.0.0.1", 1),
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "server": ("127.0.0.1", 1),
        "root_path": "",
    }
    left = sent

    async def scenario():
        unread = [content]

        async def receive():
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await asyncio.get_running_loop().create_future()

        async def send(message):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError("the client is gone")

        with pytest.raises((OSError, ClientDisconnect, ExceptionGroup)):
            await build_app(client.serving, admin=False)(scope, receive, send)

    asyncio.run(scenario())
    until(lambda: 'outcome="cancelled"} 1' in client.get("/metrics").text, 20)
    assert client.serving.thread.state.models["math"].decoding == 0


def test_a_silent_stream_that_cannot_be_sent_leaves_no_task(monkeypatch):
    closed = []

    class Silent:
        updates = SimpleNamespace(close=lambda: closed.append(True))

        async def stream(self):
            await asyncio.sleep(60)
            yield b"never"

    async def receive():
        return await asyncio.get_running_loop().create_future()

    async def send(message):
        if message.get("body") == KEEP_ALIVE:
            raise OSError("the client is gone")

    async def scenario():
        response = generation._EventStream(Silent())
        with pytest.raises((OSError, ClientDisconnect, ExceptionGroup)):
            await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        return asyncio.all_tasks() - {asyncio.current_task()}

    monkeypatch.setattr(generation, "kept_alive", partial(kept_alive, seconds=0.05))
    assert not asyncio.run(scenario())
    assert closed == [True]


def test_a_client_that_leaves_a_whole_answer_frees_its_slot(client):
    import socket

    body = json.dumps({"model": "math", "prompt": [5], "max_tokens": 511, "ignore_eos": True}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as gone:
        gone.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        gone.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        until(lambda: client.serving.thread.state.models["math"].decoding == 1)
    until(lambda: client.serving.thread.state.models["math"].decoding == 0)
