"""The HTTP process of `qsun serve` and `qsun route`: listen, serve, finish running requests at SIGTERM."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from qsun.errors import QsunError
from qsun.serve.http.connections import CONNECTIONS, Connection

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 30
_DRAIN_POLL_SECONDS = 0.05
_LAST_BYTES_SECONDS = 5  # for requests that were cut off to send their error
_NOTICE_SECONDS = 0.5  # so that health probes see /ready answer 503, even if nothing runs


def listen(host: str, port: int, fix: str = "choose another --port") -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises QsunError with the fix if it is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off for sockets that say that they are TCP, and accepted ones inherit it
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise QsunError(f"cannot listen on {host}:{port}: {error.strerror or error}; {fix}") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True)
class Draining:
    """What the application does when the process is to end.

    Attributes:
        refuse: accept no new requests from now on, and say so at /ready.
        running: number of requests that run or wait.
        seconds: time for running requests to finish; called when the drain begins.
        cut_off: end what still runs, with an error to its client; must not block.
    """

    refuse: Callable[[], None]
    running: Callable[[], int]
    seconds: Callable[[], float]
    cut_off: Callable[[], None]


class HttpProcess:
    """Serves an ASGI application until it is stopped.

    Args:
        bound: from `listen`; closed at the end.
        on_hangup: called on SIGHUP; without it, SIGHUP keeps its default action.
    """

    def __init__(
        self, app: Any, bound: socket.socket, draining: Draining, on_hangup: Callable[[], Awaitable[None]] | None = None
    ):
        self._bound, self._draining, self._on_hangup = bound, draining, on_hangup
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
        )
        self._server = _Server(config)
        self._tasks: set[asyncio.Future[None]] = set()
        self._stopping = False

    async def serve(self, on_listening: Callable[[str], None] | None = None) -> None:
        """Serve until `stop`, SIGTERM or SIGINT. `on_listening` gets the URL once signals are handled."""
        with self._bound, self._signals():
            if on_listening:
                on_listening(url_of(self._bound))
            await self._server.serve(sockets=[self._bound])

    def stop(self) -> None:
        """Let running requests finish; a second call ends them at once."""
        if self._stopping:
            self._server.force_exit = self._server.should_exit = True
            return
        self._stopping = True
        self._start(self._drain())

    async def _drain(self) -> None:
        self._draining.refuse()
        seconds = self._draining.seconds()
        logger.info("draining: %d requests have %g seconds", self._draining.running(), seconds)
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        await asyncio.sleep(min(_NOTICE_SECONDS, seconds))
        while self._draining.running() and loop.time() < until:
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        if self._draining.running():
            logger.warning("%d requests are cut off after %g seconds", self._draining.running(), seconds)
            self._draining.cut_off()
        self._server.should_exit = True

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        handlers: dict[int, Callable[[], None]] = {signal.SIGTERM: self.stop, signal.SIGINT: self.stop}
        hangup = self._on_hangup
        if hangup is not None:
            handlers[signal.SIGHUP] = lambda: self._start(hangup())
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own, which stop listening at once."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
