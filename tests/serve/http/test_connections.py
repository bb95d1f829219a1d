"""Connections that end: half a request, nothing at all, an answer that nobody takes; and the last words of a drain."""

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from qsun.serve.api.app import Serving, build_app
from qsun.serve.api.completions import ServeLimits
from qsun.serve.api.metrics import Metrics
from qsun.serve.http import server as server_module
from qsun.serve.http.connections import Connection
from qsun.serve.http.guard import GuardConfig
from qsun.serve.http.server import listen, run_server
from tests.serve.api.test_api import events, until


@contextmanager
def running(app, monkeypatch, guard=None, drain=5.0, on_late=lambda: None):
    """The server of `qsun serve` in a thread; gives its address and itself."""
    servers = []
    original = server_module._Server.__init__

    def remember(self, *arguments):
        original(self, *arguments)
        servers.append(self)

    monkeypatch.setattr(server_module._Server, "__init__", remember)
    bound = listen("127.0.0.1", 0)
    arguments = (app, guard or GuardConfig(), bound, drain, lambda: None, on_late)
    thread = threading.Thread(target=run_server, args=arguments)
    thread.start()
    try:
        until(lambda: servers and servers[0].started)
        yield bound.getsockname(), servers[0]
    finally:
        servers[0].should_exit = True
        thread.join(30)
        bound.close()


async def endless(scope, receive, send):
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})


@pytest.mark.parametrize("sent", [b"", b"POST /v1/x HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "half a request"])
def test_a_request_that_never_comes_is_not_waited_for(monkeypatch, sent):
    monkeypatch.setattr(Connection, "header_seconds", 0.3)
    with running(endless, monkeypatch) as (address, server), socket.create_connection(address) as client:
        client.sendall(sent)
        until(lambda: len(server.server_state.connections) == 1)
        client.settimeout(5)
        with pytest.raises(ConnectionResetError):  # aborted, not closed: there is nothing to say
            assert client.recv(1) == b""
            raise ConnectionResetError
        until(lambda: not server.server_state.connections)


def test_headers_of_the_next_request_have_a_deadline_too(monkeypatch):
    async def short(scope, receive, send):
        if scope["type"] == "lifespan":
            await endless(scope, receive, send)
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    monkeypatch.setattr(Connection, "header_seconds", 0.3)
    with running(short, monkeypatch) as (address, server), socket.create_connection(address) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        client.settimeout(5)
        until(lambda: client.recv(4096).endswith(b"ok"))
        time.sleep(0.6)  # between requests it is kept alive
        assert len(server.server_state.connections) == 1
        client.sendall(b"GET /hea")
        until(lambda: not server.server_state.connections)


def test_a_reader_that_takes_nothing_is_dropped(monkeypatch):
    guard = GuardConfig(send_seconds=0.3)
    with running(endless, monkeypatch, guard) as (address, server), socket.create_connection(address) as client:
        client.sendall(b"GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: len(server.server_state.connections) == 1)
        until(lambda: not server.server_state.connections, 5)


def test_what_still_runs_after_the_drain_ends_in_words(make_engine, monkeypatch):
    metrics = Metrics()
    serving = Serving(make_engine(metrics), metrics, ServeLimits())
    slow = serving.engine.step

    def step():
        time.sleep(0.02)
        return slow()

    monkeypatch.setattr(serving.engine, "step", step)
    body = {"model": "math", "prompt": [5], "max_tokens": 500, "ignore_eos": True}
    answers = {}
    with running(build_app(serving), monkeypatch, drain=0.5, on_late=serving.thread.stop) as (address, server):
        url = f"http://127.0.0.1:{address[1]}/v1/completions"

        def ask(stream):
            answers[stream] = httpx.post(url, json={**body, "stream": stream}, timeout=20)

        clients = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for client in clients:
            client.start()
        until(lambda: serving.engine.state.models["math"].decoding == 2)
        server.should_exit = True
        for client in clients:
            client.join(20)
    assert events(answers[True])[-1]["error"]["message"] == "the server is shutting down"
    assert answers[False].status_code == 503
    assert answers[False].json()["error"]["message"] == "the server is shutting down"
