"""An httpx transport to replicas through Serve's handles: the exchange sends HTTP requests, whoever carries them.

A worker's URL is http://<replica id>. A request becomes one streaming call of the replica's method `answer`, which
yields the status and headers, and then pieces of the body. Closing a response that is not complete cancels the call,
and with it the request in vLLM.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from qsun.serve.ray.calls import CALL_FAILURES, ReplicaGone, call, outcome

_PASSED_ON = ("x-request-id", "content-type", "accept-encoding", "traceparent")


class ReplicaTransport(httpx.AsyncBaseTransport):
    """Carries requests to replicas that are known. `handles` maps the id of each to its application's handle."""

    def __init__(self) -> None:
        self.handles: dict[str, Any] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        replica, limits = request.url.host, request.extensions.get("timeout", {})
        handle = self.handles.get(replica)
        if handle is None:
            raise httpx.ConnectError(f"replica {replica} is gone", request=request)
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        answer = handle.options(method_name="answer", stream=True)
        arguments = request.method, request.url.path, headers, await request.aread()
        body = _Body(call(answer, *arguments, replica=replica), request, limits)
        try:
            status, head = await body.first()
        except BaseException:
            await body.aclose()
            raise
        return httpx.Response(status, headers=head, stream=body, request=request)


class _Body(httpx.AsyncByteStream):
    """The body of an answer, as it comes."""

    def __init__(self, answer: Any, request: httpx.Request, limits: Mapping[str, float | None]):
        self._answer, self._pieces = answer, aiter(answer)
        self._request, self._seconds = request, limits.get("read")
        self._complete = False

    async def first(self) -> tuple[int, dict[str, str]]:
        head = await self._next()
        if head is None:
            raise httpx.RemoteProtocolError("an answer without a status", request=self._request)
        status, headers = head
        return status, headers

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (piece := await self._next()) is not None:
            yield piece

    async def _next(self) -> Any:
        """Return the next item; None at the end."""
        try:
            async with asyncio.timeout(self._seconds):
                return await outcome(anext(self._pieces), self._request.url.host)
        except StopAsyncIteration:
            self._complete = True
            return None
        except TimeoutError:
            raise httpx.ReadTimeout("", request=self._request) from None
        except ReplicaGone as gone:
            raise httpx.ConnectError(str(gone), request=self._request) from None
        except CALL_FAILURES as error:
            raise httpx.ReadError(_first_line(error), request=self._request) from error

    async def aclose(self) -> None:
        if not self._complete:
            self._complete = True
            with contextlib.suppress(*CALL_FAILURES):  # a call that failed raises its failure again
                self._answer.cancel()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
