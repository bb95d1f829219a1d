"""The guard before every handler, called as a server calls it: ASGI messages in, ASGI messages out."""

import asyncio
import json

import pytest

from qsun.errors import QsunError
from qsun.serve.http.errors import HttpError
from qsun.serve.http.guard import Guard, GuardConfig


async def echo(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def ask(guard, path="/v1/x", headers=(), pieces=(b"",)):
    """Returns (status, headers, body), or None where nothing was answered."""
    sent = []
    waiting = [{"type": "http.request", "body": p, "more_body": i < len(pieces) - 1} for i, p in enumerate(pieces)]

    async def receive():
        if waiting:
            message = waiting.pop(0)
            if message["body"] is None:
                await asyncio.sleep(60)
            return message
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in [("content-type", "application/json"), *headers]]
    asyncio.run(guard({"type": "http", "path": path, "headers": raw}, receive, send))
    if not sent:
        return None
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])


def test_a_request_passes_whole_and_gets_an_id():
    status, headers, body = ask(Guard(echo, GuardConfig()), pieces=(b"ab", b"cd"))
    assert (status, body) == (200, b"abcd")
    assert len(headers[b"x-request-id"]) == 32


def test_a_sound_request_id_is_kept_and_another_is_replaced():
    guard = Guard(echo, GuardConfig())
    assert ask(guard, headers=[("X-Request-Id", "run-7.a")])[1][b"x-request-id"] == b"run-7.a"
    for bad in ("a b", "x" * 129, "a\r\nSet-Cookie: b", ""):
        assert len(ask(guard, headers=[("x-request-id", bad)])[1][b"x-request-id"]) == 32


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong-key-000", "Bearer secret-key-11", "Basic secret-key-1", "secret-key-1", "Bearer "]
)
def test_without_a_key_only_health_and_metrics_are_answered(header):
    guard = Guard(echo, GuardConfig(api_keys=("secret-key-1", "secret-key-2")))
    headers = [("authorization", header)] if header else []
    status, answer, body = ask(guard, headers=headers)
    assert status == 401
    assert answer[b"www-authenticate"] == b"Bearer"
    assert json.loads(body)["error"]["type"] == "authentication_error"
    for path in ("/admin/x", "/tokenize", "/", "/health/../v1/models"):
        assert ask(guard, path, headers)[0] == 401
    assert ask(guard, "/health", headers)[0] == 200


def test_every_key_opens():
    guard = Guard(echo, GuardConfig(api_keys=("secret-key-1", "secret-key-2")))
    for key in ("Bearer secret-key-1", "bearer secret-key-2"):
        assert ask(guard, headers=[("Authorization", key)])[0] == 200


def test_keys_that_protect_nothing_are_refused():
    for key in ("short", "with a space", "umläut-key"):
        with pytest.raises(QsunError, match="API key"):
            GuardConfig(api_keys=(key,))


def test_a_body_over_the_limit_is_refused_whether_declared_or_not():
    guard = Guard(echo, GuardConfig(max_body_bytes=4))
    assert ask(guard, pieces=(b"abcd",))[0] == 200
    for headers, pieces in (
        ([("content-length", "5")], (b"",)),
        ([], (b"abc", b"de")),
        ([("content-length", "x")], (b"",)),
    ):
        status, answer, body = ask(guard, headers=headers, pieces=pieces)
        assert status == 413
        assert "4 bytes" in json.loads(body)["error"]["message"]
        assert answer[b"connection"] == b"close"


def test_a_body_with_two_lengths_ends_the_connection():
    """Its second half could be read as another request, past a proxy's checks."""
    headers = [("Content-Length", "2"), ("Transfer-Encoding", "chunked")]
    status, answer, body = ask(Guard(echo, GuardConfig()), headers=headers)
    assert (status, answer[b"connection"]) == (400, b"close")
    assert "cannot be combined" in json.loads(body)["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for():
    status, _, _ = ask(Guard(echo, GuardConfig(body_seconds=0.05)), pieces=(b"a", None))
    assert status == 408


def test_a_client_that_leaves_before_its_body_is_whole_is_forgotten():
    guard = Guard(echo, GuardConfig())

    async def gone():
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError(message)

    asyncio.run(guard({"type": "http", "path": "/v1/x", "headers": []}, gone, send))
    assert guard.running == 0


def test_more_requests_than_the_limit_are_told_when_to_come_again():
    async def scenario():
        release = asyncio.Event()

        async def slow(scope, receive, send):
            await release.wait()
            await echo(scope, receive, send)

        guard = Guard(slow, GuardConfig(max_requests=1))

        def one():
            sent = []

            async def receive():
                return {"type": "http.request", "body": b""}

            async def send(message):
                sent.append(message)

            return sent, guard({"type": "http", "path": "/v1/x", "headers": []}, receive, send)

        first, running = one()
        task = asyncio.create_task(running)
        while not guard.running:
            await asyncio.sleep(0)
        second, refused = one()
        await refused
        release.set()
        await task
        return first[0], second[0], guard.running

    first, second, running = asyncio.run(scenario())
    assert (first["status"], second["status"], running) == (200, 429, 0)
    assert dict(second["headers"])[b"retry-after"] == b"1"


def test_an_error_of_a_handler_becomes_an_answer_and_frees_the_place():
    async def fails(scope, receive, send):
        raise HttpError(400, "max_tokens 0 is out of range; use 1 or more", "max_tokens")

    guard = Guard(fails, GuardConfig())
    status, _, body = ask(guard)
    assert status == 400
    assert json.loads(body)["error"]["param"] == "max_tokens"
    assert guard.running == 0


def test_requests_whose_bodies_are_still_coming_count():
    """Otherwise any number of requests could pass while their bodies are incomplete."""
    most = 0

    async def counting(scope, receive, send):
        nonlocal most
        most = max(most, guard.running)
        await asyncio.sleep(0.05)
        await echo(scope, receive, send)

    guard = Guard(counting, GuardConfig(max_requests=2))

    async def one():
        sent, pieces = [], [b"a", b"b"]

        async def receive():
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        await guard({"type": "http", "path": "/v1/x", "headers": headers}, receive, send)
        return sent[0]["status"]

    async def all_at_once():
        return await asyncio.gather(*(one() for _ in range(10)))

    statuses = asyncio.run(all_at_once())
    assert sorted(statuses) == [200] * 2 + [429] * 8
    assert (most, guard.running) == (2, 0)


def test_a_status_path_takes_no_long_body():
    guard = Guard(echo, GuardConfig())
    assert ask(guard, "/health", pieces=(b"x" * 5000,))[0] == 413
    assert ask(guard, "/v1/x", pieces=(b"x" * 5000,))[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
def test_a_body_must_say_that_it_is_json(kind):
    """A web page of any site can send the other kinds to this machine without asking the server first."""
    guard = Guard(echo, GuardConfig(host="127.0.0.1"))
    status, _, body = ask(guard, headers=[("Content-Type", kind)], pieces=(b"{}",))
    assert status == 415
    said = f"Content-Type {kind!r} is not supported" if kind else "the body has no Content-Type"
    assert json.loads(body)["error"]["message"] == f"{said}; send application/json"
    assert ask(guard, headers=[("Content-Type", kind)])[0] == 200  # there is no body
    for sound in ("Application/JSON; charset=utf-8", "application/vnd.api+json"):
        assert ask(guard, headers=[("Content-Type", sound)], pieces=(b"{}",))[0] == 200
    with_keys = Guard(echo, GuardConfig(host="127.0.0.1", api_keys=("a-long-key",)))
    headers = [("Content-Type", kind), ("Authorization", "Bearer a-long-key")]  # which a page cannot send unasked
    assert ask(with_keys, headers=headers, pieces=(b"{}",))[0] == 200


LOCAL = (
    "localhost:8000",
    "LOCALHOST",
    "localhost.",
    "127.0.0.1:8000",
    "127.8.0.1",
    "[::1]:8000",
    "a.localhost:80",
    "0.0.0.0:8000",
)
LOCAL += ("host.docker.internal:8000", "myhost:8000", "192.168.0.7", "")
OTHER = ("evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.org", "internal.evil.example", "[")


@pytest.mark.parametrize("host", OTHER)
def test_without_keys_a_page_whose_site_resolves_to_this_machine_gets_no_answer(host):
    """Its browser takes the server for a part of that site (DNS rebinding), and only `Host` shows it."""
    guard = Guard(echo, GuardConfig(host="127.0.0.1"))
    status, _, body = ask(guard, headers=[("Host", host)])
    assert status == 403
    assert "use localhost, also in a proxy, or start with API keys" in json.loads(body)["error"]["message"]
    assert ask(guard, "/health", headers=[("Host", host)])[0] == 200  # a probe may come by any name
    with_keys = Guard(echo, GuardConfig(host="127.0.0.1", api_keys=("a-long-key",)))
    assert ask(with_keys, headers=[("Host", host), ("Authorization", "Bearer a-long-key")])[0] == 200
    exposed = Guard(echo, GuardConfig(host="0.0.0.0"))  # noqa: S104
    assert ask(exposed, headers=[("Host", host)])[0] == 200


@pytest.mark.parametrize("host", LOCAL)
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_without_keys_this_machine_is_served_by_any_of_its_names(address, host):
    assert ask(Guard(echo, GuardConfig(host=address)), headers=[("Host", host)])[0] == 200


def test_without_keys_a_client_that_names_no_host_is_no_browser():
    assert ask(Guard(echo, GuardConfig(host="127.0.0.1")))[0] == 200
