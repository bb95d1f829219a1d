"""Connections that always end: half a request, no request, an answer that nobody reads; and the end of a drain."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager, suppress

import httpx
import pytest

from qsun.serve.api.app import Serving, build_app
from qsun.serve.api.completions import ServeLimits
from qsun.serve.api.metrics import Metrics
from qsun.serve.http.connections import Connection
from qsun.serve.http.guard import Guard, GuardConfig
from qsun.serve.http.server import Draining, HttpProcess, listen
from tests.serve.api.test_api import events, until


@contextmanager
def running(app, guard=None, drain=5.0, serving=None, header_seconds=30.0, send_seconds=60.0):
    """The HTTP process in a thread; gives its address, its open connections, and a function that stops it."""
    guarded, bound = Guard(app, guard or GuardConfig()), listen("127.0.0.1", 0)
    refuse, cut_off = (serving.drain, lambda: serving.thread.stop(0)) if serving else (lambda: None, lambda: None)
    process = HttpProcess(guarded, bound, Draining(refuse, lambda: guarded.running, lambda: drain, cut_off))
    address, loops = bound.getsockname(), []

    async def serve():
        loops.append(asyncio.get_running_loop())
        await process.serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "header_seconds", header_seconds)
        patch.setattr(Connection, "send_seconds", send_seconds)
        thread.start()
        try:
            until(lambda: process._server.started)
            yield address, process._server.server_state.connections, lambda: loops[0].call_soon_threadsafe(process.stop)
        finally:
            with suppress(RuntimeError):  # it has ended already
                loops[0].call_soon_threadsafe(process.stop)
            thread.join(30)


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


async def short(scope, receive, send):
    if scope["type"] == "lifespan":
        await endless(scope, receive, send)
        return
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def received(client, seconds=5):
    """All bytes until the server closes the connection."""
    client.settimeout(seconds)
    answer = b""
    while piece := client.recv(65536):
        answer += piece
    return answer


@pytest.mark.parametrize("sent", [b"", b"POST /v1/x HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "half a request"])
def test_a_request_that_never_comes_is_not_waited_for(sent):
    with running(endless, header_seconds=0.3) as (address, connections, _), socket.create_connection(address) as client:
        client.sendall(sent)
        until(lambda: len(connections) == 1)
        with pytest.raises(ConnectionResetError):  # aborted, not closed: there is nothing to say
            assert received(client) == b""
            raise ConnectionResetError
        until(lambda: not connections)


def test_headers_of_the_next_request_have_a_deadline_too():
    with running(short, header_seconds=0.3) as (address, connections, _), socket.create_connection(address) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        client.settimeout(120)
        until(lambda: client.recv(4096).endswith(b"ok"))
        time.sleep(0.6)  # between requests it is kept alive
        assert len(connections) == 1
        client.sendall(b"GET /hea")
        until(lambda: not connections)


def test_a_reader_that_takes_nothing_is_dropped():
    with running(endless, send_seconds=0.3) as (address, connections, _), socket.create_connection(address) as client:
        client.sendall(b"GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: len(connections) == 1)
        until(lambda: not connections)


def test_answers_are_sent_at_once():
    """With Nagle's algorithm each answer on a kept-alive connection waits for the client's delayed acknowledgement."""
    with listen("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP  # by which asyncio knows to turn it off
    with running(short) as (address, connections, _), socket.create_connection(address):
        until(lambda: len(connections) == 1)
        accepted = next(iter(connections)).transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_smuggled_request_is_not_answered():
    smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 44\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with running(short) as (address, _, _), socket.create_connection(address) as client:
        client.sendall(head + smuggled)
        answer = received(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


async def slow(scope, receive, send):
    """Answers after 1.5 seconds, unless the client disconnects."""
    if scope["type"] == "lifespan":
        await endless(scope, receive, send)
        return
    await receive()
    try:
        async with asyncio.timeout(1.5):
            slow.left = (await receive())["type"] == "http.disconnect"
    except TimeoutError:
        await short(scope, lambda: asyncio.sleep(0), send)


def test_a_client_that_only_ends_its_own_direction_gets_its_answer():
    with running(slow) as (address, connections, _), socket.create_connection(address) as client:
        client.sendall(b"GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        answer = received(client)
        assert answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"ok")
        until(lambda: not connections)


def test_a_client_that_leaves_is_noticed_before_its_answer_begins():
    slow.left = None
    with running(slow) as (address, connections, _):
        with socket.create_connection(address) as client:
            client.sendall(b"GET /v1/x HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda: len(connections) == 1)
            time.sleep(0.1)
        until(lambda: not connections)
        assert slow.left is True


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
    with running(build_app(serving), drain=0.7, serving=serving) as (address, _, stop):
        url = f"http://127.0.0.1:{address[1]}/v1/completions"

        def ask(stream):
            answers[stream] = httpx.post(url, json={**body, "stream": stream}, timeout=20)

        clients = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for client in clients:
            client.start()
        until(lambda: serving.engine.state.models["math"].decoding == 2)
        stop()
        for client in clients:
            client.join(20)
    assert events(answers[True])[-1]["error"]["message"] == "the server is shutting down"
    assert answers[False].status_code == 503
    assert answers[False].json()["error"]["message"] == "the server is shutting down"
