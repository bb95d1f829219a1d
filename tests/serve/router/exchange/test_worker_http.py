"""Requests to workers on their way: how long each step may take, and what a failure is called."""

import asyncio
import socket

import httpx
import pytest

from qsun.serve.cluster.schema import RequestLimits
from qsun.serve.router.exchange.health import _WARM_UP
from qsun.serve.router.exchange.state import _http
from qsun.serve.router.exchange.worker_http import WorkerFailed, cause_of, prefill
from qsun.serve.router.workers.worker import Breaker, Worker
from tests.serve.fake_vllm import answer, listening


@pytest.mark.parametrize(("seconds", "to_connect"), [(120.0, 10.0), (3.0, 3.0)])
def test_a_worker_that_cannot_be_reached_is_given_up_long_before_a_prompt_that_takes_long(seconds, to_connect):
    asked = []

    def unreachable(request):
        asked.append(request.extensions["timeout"])
        raise httpx.ConnectTimeout("", request=request)

    async def scenario():
        worker = Worker("http://w", "prefill", "qsun-math", Breaker(3, 1.0))
        async with httpx.AsyncClient(transport=httpx.MockTransport(unreachable)) as client:
            with pytest.raises(WorkerFailed) as failed:
                await prefill(client, worker, _WARM_UP, "qsun-math", "x", seconds)
        return failed.value

    assert asyncio.run(scenario()).cause == "connect"  # it counts for the circuit: no answer of it can be slow
    (limits,) = asked
    assert (limits["connect"], limits["read"]) == (to_connect, seconds)


def test_a_read_that_takes_long_is_no_failure_to_connect():
    assert cause_of(httpx.ReadTimeout("")) == "timeout"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
def test_connections_to_a_machine_that_died_break_whether_they_are_silent_or_have_sent():
    """Keep-alive probes silent connections only; what was sent and not acknowledged has a limit of its own."""

    async def app(scope, receive, send):
        await answer(send, {})

    async def scenario():
        async with listening(app) as server, httpx.AsyncClient(transport=_http(RequestLimits())) as client:
            response = await client.get(server.url)
            used = response.extensions["network_stream"].get_extra_info("socket")
            assert used.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert used.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 25_000

    asyncio.run(scenario())
