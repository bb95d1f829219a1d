"""HTTP connections that always end, even if a client sends half a request or does not read its answer.

uvicorn documents limits on the number of connections and on the time between requests, but none on the time that a
request's head takes, and it waits forever for a client that does not read. It also documents that `http` may be any
asyncio.Protocol. Ours stands between the socket and uvicorn's own protocol. Of uvicorn it relies on that protocol's
constructor and on `Config.loaded_app`, which are not documented. (hypercorn and granian do not bound slow readers
either, and granian runs applications in processes of its own.)
"""

import asyncio
import copy
from typing import Any

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from qsun.serve.http.guard import ClientStalled

HEADER_SECONDS = 30.0
SEND_SECONDS = 60.0
CONNECTIONS = 4096  # at a time; uvicorn answers 503 to more
_PROBE_SECONDS = 1.0
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"  # clients skip it (RFC 9110, 15.2)


class Connection(asyncio.Protocol):
    """One connection. A request's body is bounded by the guard, and the time between requests by uvicorn.

    Attributes:
        header_seconds: from a connection's or a request's first byte until its head must be complete.
        send_seconds: after which a client that reads nothing is dropped.
    """

    header_seconds = HEADER_SECONDS
    send_seconds = SEND_SECONDS

    def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None):
        config = copy.copy(config)
        self._app, config.loaded_app = config.loaded_app, self._answer
        self._inner = H11Protocol(config, server_state, app_state, _loop)
        self._loop = asyncio.get_running_loop()
        self._deadline: asyncio.TimerHandle | None = None
        self._answering = 0  # the next of pipelined requests may begin before the last one's handler returns
        self._silent = self._half_closed = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._inner.connection_made(transport)
        self._start_deadline()

    def data_received(self, data: bytes) -> None:
        self._start_deadline()
        self._inner.data_received(data)

    def eof_received(self) -> bool:
        """Keep the connection open for the answer: the client has closed its own direction, or all of it."""
        self._half_closed = True
        self._probe()
        return bool(self._answering)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def _start_deadline(self) -> None:
        if not self._answering and self._deadline is None:
            self._deadline = self._loop.call_later(self.header_seconds, self._transport.abort)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _probe(self) -> None:
        """Find out whether a half-closed client is still there: one that has left resets the connection.

        Once an answer has begun, its own pieces show that.
        """
        if self._silent and not self._transport.is_closing():
            self._transport.write(_PROBE)
            self._loop.call_later(_PROBE_SECONDS, self._probe)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request whose head is complete to the application."""
        self._answering += 1
        self._silent = scope["http_version"] != "1.0"  # which has no interim responses
        self._stop_deadline()
        stalled = False

        async def send_within(message: Message) -> None:
            nonlocal stalled
            self._silent = False
            try:
                async with asyncio.timeout(self.send_seconds):
                    await send(message)
            except TimeoutError:
                stalled = True
                raise ClientStalled from None

        try:
            await self._app(scope, receive, send_within)
        except Exception:
            if not stalled:
                raise
            self._transport.abort()  # closing would wait until the client has read what is buffered
        finally:
            self._answering -= 1
            self._silent = False
            self._loop.call_soon(self._answered)

    def _answered(self) -> None:
        if self._half_closed and not self._answering:
            self._transport.close()
        if self._transport.is_closing():
            self._start_deadline()  # for the client to read what is buffered
