"""Run an application on a socket until SIGTERM or Ctrl-C, then let running requests finish."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from qsun.errors import QsunError
from qsun.serve.http.connections import CONNECTIONS, Connection
from qsun.serve.http.guard import Guard, GuardConfig

_KEEP_ALIVE_SECONDS = 30
_LAST_WORDS_SECONDS = 5  # from the end of the drain until what still runs is cut


def check_exposed(host: str, keys: tuple[str, ...]) -> None:
    """Raise QsunError for an address that others can reach, without an API key."""
    if not keys and not is_loopback(host):
        raise QsunError(f"host {host} can be reached from other machines, and no API key is set; give a file of keys")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises QsunError where the address is taken or not here."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise QsunError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from None


def run_server(
    app: Any,
    guard: GuardConfig,
    bound: socket.socket,
    drain_seconds: float,
    on_stop: Callable[[], None],
    on_late: Callable[[], None],
) -> None:
    """Serve until told to stop; requests then have drain_seconds to finish.

    Args:
        on_stop: called when the signal comes, before anything else.
        on_late: called in a thread once drain_seconds are over; running requests end in its words before they are cut.
    """
    config = uvicorn.Config(
        Guard(app, guard),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(drain_seconds)) + _LAST_WORDS_SECONDS,
        lifespan="on",
        http=Connection,
        ws="none",
    )
    _Server(config, drain_seconds, on_stop, on_late).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Ends with exit code 0 after a signal: uvicorn would raise it again, once everything is done."""

    def __init__(
        self, config: uvicorn.Config, drain_seconds: float, on_stop: Callable[[], None], on_late: Callable[[], None]
    ):
        super().__init__(config)
        self._drain_seconds, self._on_stop, self._on_late = drain_seconds, on_stop, on_late

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT  # a second Ctrl-C does not wait
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        late = asyncio.ensure_future(self._give_up())
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()

    async def _give_up(self) -> None:
        await asyncio.sleep(self._drain_seconds)
        await asyncio.to_thread(self._on_late)
