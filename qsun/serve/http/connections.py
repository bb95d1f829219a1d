"""HTTP connections that end, also those whose client sends half a request, or takes nothing and never leaves."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from qsun.serve.http.guard import ABORT

HEADER_SECONDS = 30.0
CONNECTIONS = 4096  # at a time; uvicorn answers 503 to more


class Connection(H11Protocol):
    """uvicorn's own, which waits for a request's headers without an end, with a deadline for them.

    A request's body is bounded by the guard, and the time between requests by uvicorn's keep-alive.
    """

    header_seconds = HEADER_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.scope is not None:  # a request's task does not run before this returns
            scope: Any = self.scope
            scope[ABORT] = self.transport.abort
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch()

    def _watch(self) -> None:
        """A deadline for headers, from the first byte after the last answer on, and for what a closing has to flush."""
        answering = self.cycle is not None and not self.cycle.response_complete
        between = self.cycle is not None and self.timeout_keep_alive_task is not None
        if not self.transport.is_closing() and (answering or between):
            self._forget_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
