"""HTTP requests over Serve handles: how each failure of a replica looks to the exchange. The handles are pretended."""

import asyncio

import httpx
import pytest

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'qsun[ray]'")

from ray.exceptions import RayActorError

from qsun.serve.ray.calls import ReplicaGone, outcome
from qsun.serve.ray.transport import ReplicaTransport
from qsun.serve.router.exchange.worker_http import cause_of


class Call:
    """What `handle.remote` returns: items, some of them exceptions, or an event to wait for."""

    def __init__(self, items):
        self._items = iter(items)
        self._failure = None
        self.cancelled = False

    def cancel(self):
        """As Serve's: a call that could not be sent raises its failure once more."""
        self.cancelled = True
        if isinstance(self._failure, Exception):  # and not a cancellation
            raise self._failure

    def __aiter__(self):
        return self

    async def __anext__(self):
        for item in self._items:
            if isinstance(item, BaseException):
                self._failure = item
                raise item
            if isinstance(item, asyncio.Event):
                await item.wait()
            return item
        raise StopAsyncIteration


class Handle:
    def __init__(self, items):
        self.call, self.arguments = Call(items), None

    def options(self, **options):
        assert options == {"method_name": "answer", "stream": True}
        return self

    def remote(self, *arguments, **named):
        self.arguments = arguments, named
        return self.call


def client(handle):
    transport = ReplicaTransport()
    transport.handles["r1"] = handle
    return httpx.AsyncClient(transport=transport)


HEAD = (200, {"content-type": "text/plain"})


def test_a_request_and_its_answer():
    async def scenario():
        handle = Handle([HEAD, b"ab", b"cd"])
        async with client(handle) as http:
            answer = await http.post("http://r1/v1/completions", json={"a": 1}, headers={"X-Request-Id": "x"})
        assert (answer.status_code, answer.content) == (200, b"abcd")
        (method, path, headers, body), named = handle.arguments
        assert (method, path, body, named) == ("POST", "/v1/completions", b'{"a":1}', {"replica": "r1"})
        assert headers["x-request-id"] == "x"
        assert not handle.call.cancelled

    asyncio.run(scenario())


def test_leaving_a_stream_cancels_the_call():
    async def scenario():
        handle = Handle([HEAD, b"ab", asyncio.Event()])
        async with client(handle) as http, http.stream("POST", "http://r1/x") as answer:
            async for piece in answer.aiter_bytes():
                assert piece == b"ab"
                break
        assert handle.call.cancelled

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("items", "cause"),
    [
        ([asyncio.CancelledError()], "connect"),
        ([RayActorError()], "broken"),
        ([HEAD, b"ab", RayActorError()], "broken"),
        ([], "broken"),
    ],
)
def test_failures_have_a_cause(items, cause):
    async def scenario():
        handle = Handle(items)
        async with client(handle) as http:
            with pytest.raises(httpx.HTTPError) as raised:
                await http.post("http://r1/x")
        assert cause_of(raised.value) == cause

    asyncio.run(scenario())


@pytest.mark.parametrize("before", [[], [HEAD], [HEAD, b"ab"]])
def test_a_replica_that_hangs_is_a_timeout(before):
    async def scenario():
        handle = Handle([*before, asyncio.Event()])
        async with client(handle) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post("http://r1/x", timeout=httpx.Timeout(0.05))
        assert handle.call.cancelled

    asyncio.run(scenario())


def test_a_replica_that_is_unknown():
    async def scenario():
        async with client(Handle([])) as http:
            with pytest.raises(httpx.ConnectError, match="replica r2 is gone"):
                await http.get("http://r2/health")

    asyncio.run(scenario())


def test_the_reason_of_a_deployment_that_failed():
    from qsun.serve.ray.local import failure_reason

    traceback = "It failed.\nTraceback:\n  File ...\nqsun.errors.QsunError: worker a ended with code 1;\nlog: b\n"
    assert failure_reason(["Failed to update.", traceback]) == "worker a ended with code 1; log: b"
    assert failure_reason(["Failed to update.", "no\nresources"]) == "Failed to update. no resources"


def test_a_call_that_is_cancelled_is_not_a_caller_that_is():
    async def scenario():
        with pytest.raises(ReplicaGone):
            await outcome(cancelled(), "r1")
        waiting = asyncio.ensure_future(outcome(asyncio.Event().wait(), "r1"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scenario())


async def cancelled():
    raise asyncio.CancelledError


def test_a_router_cancels_a_request_for_a_replica_that_is_gone():
    from qsun.serve.ray.routing import NamedReplica

    class Id:
        unique_id = "r1"

    class Replica:
        replica_id = Id

    class Pending:
        def __init__(self, replica):
            self.kwargs, self.future = {"replica": replica}, asyncio.get_running_loop().create_future()

    async def scenario():
        there, gone, anyone = Pending("r1"), Pending("r2"), Pending(None)
        for pending in (there, gone, anyone):
            assert await NamedReplica.choose_replicas(None, [Replica], pending) == [[Replica]]
        assert (there.future.done(), gone.future.cancelled(), anyone.future.done()) == (False, True, False)

    asyncio.run(scenario())
