"""Run an application on a socket until SIGTERM or Ctrl-C, then let running requests finish."""

import ipaddress
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from qsun.errors import QsunError
from qsun.serve.guard import Guard, GuardConfig

_CONNECTIONS = 4096
_KEEP_ALIVE_SECONDS = 30


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
    app: Any, guard: GuardConfig, bound: socket.socket, drain_seconds: float, on_stop: Callable[[], None]
) -> None:
    """Serve until told to stop; requests then have drain_seconds to finish.

    Args:
        on_stop: called when the signal comes, before anything else.
    """
    config = uvicorn.Config(
        Guard(app, guard),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        lifespan="on",
    )
    _Server(config, on_stop).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Ends with exit code 0 after a signal: uvicorn would raise it again, once everything is done."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]):
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT  # a second Ctrl-C does not wait
        self.should_exit = True
