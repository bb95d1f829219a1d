"""The router as a process: start, reload upon SIGHUP, drain upon SIGTERM."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from qsun.errors import QsunError
from qsun.serve.cluster.file import Cluster, read_cluster
from qsun.serve.cluster.modules import ModuleChecks, ServedNames
from qsun.serve.http.connections import CONNECTIONS, Connection
from qsun.serve.http.keys import read_keys
from qsun.serve.router.app import Router

logger = logging.getLogger(__name__)

_DRAIN_POLL_SECONDS = 0.05
_LAST_BYTES_SECONDS = 2  # for what was cut off to say so
_FIRST_NOTICE_SECONDS = 0.5  # in which whoever polls /ready may see the 503 although nothing is in flight


class RouterProcess:
    """Serves one cluster file.

    Args:
        path: read again upon SIGHUP.
        cluster: what it held, with URLs for all workers.
        names: of its modules. checks: which has them in its cache.
        prepare: what a file that was read anew must pass, and may be changed by (`qsun up` puts in its workers' URLs);
            default: it lists running workers.
    Attributes:
        router: the application.
    """

    def __init__(
        self,
        path: Path,
        cluster: Cluster,
        names: ServedNames,
        checks: ModuleChecks,
        prepare: Callable[[Cluster], Cluster] | None = None,
    ):
        self.path, self._checks = path, checks
        self._prepare = prepare or with_running_workers
        self.router = Router(cluster, names, keys_of(cluster))
        self._reloading = asyncio.Lock()
        self._leaving: asyncio.Task[None] | None = None

    async def serve(self, on_listening: Callable[[str], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT. `on_listening` gets the URL, with the port that was found for port 0.

        Raises:
            QsunError: the address cannot be had.
        """
        listen = self.router.state.cluster.listen
        sockets = [_bound(listen.host, listen.port)]
        config = uvicorn.Config(
            self.router,
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            http=Connection,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
        )
        server = _Server(config)
        loop = asyncio.get_running_loop()
        reloads: set[asyncio.Task[None]] = set()

        def hang_up() -> None:
            task = asyncio.ensure_future(self.reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        for stop in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(stop, self._leave, server)
        if on_listening:
            host = f"[{listen.host}]" if ":" in listen.host else listen.host
            on_listening(f"http://{host}:{sockets[0].getsockname()[1]}")
        try:
            await server.serve(sockets=sockets)
        finally:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def reload(self) -> None:
        """Read the file again. One that is not sound changes nothing, and its fault is logged."""
        async with self._reloading:
            try:
                cluster, names, keys = await asyncio.to_thread(self._read)
                old = self.router.state.cluster.listen
                self.router.apply(cluster, names, keys)
            except (QsunError, OSError) as error:
                self.router.state.metrics.reloads.labels("refused").inc()
                logger.error("%s was not taken, the old one stays: %s", self.path, error)
                return
            if (old.host, old.port) != (cluster.listen.host, cluster.listen.port):
                logger.warning("listen.host and listen.port stay %s:%d until a restart", old.host, old.port)
            self.router.state.metrics.reloads.labels("ok").inc()
            logger.info("%s was taken: %d workers", self.path, len(list(self.router.state.fleet)))

    def _read(self) -> tuple[Cluster, ServedNames, tuple[str, ...]]:
        cluster = self._prepare(read_cluster(self.path))
        return cluster, self._checks.names(cluster), keys_of(cluster)

    def _leave(self, server: uvicorn.Server) -> None:
        """The first signal drains, a second one ends at once."""
        if self._leaving is not None:
            server.force_exit = server.should_exit = True
            return
        self._leaving = asyncio.ensure_future(self._drain(server))

    async def _drain(self, server: uvicorn.Server) -> None:
        self.router.state.draining = True
        seconds = self.router.state.cluster.limits.drain_seconds
        logger.info("draining: %d requests have %g seconds", self.router.state.admission.running, seconds)
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        await asyncio.sleep(min(_FIRST_NOTICE_SECONDS, seconds))
        while self.router.state.busy and loop.time() < until:
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        if self.router.state.busy:
            logger.warning("%d requests are cut off after %g seconds", self.router.state.admission.running, seconds)
            self.router.state.cut_off.set()
        server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which stop listening at once."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def with_running_workers(cluster: Cluster) -> Cluster:
    """The cluster as it is. Raises QsunError where it has a number in place of URLs."""
    cluster.need_running_workers()
    return cluster


def keys_of(cluster: Cluster) -> tuple[str, ...]:
    """API keys of the file that the cluster names; none where it names none."""
    return read_keys(cluster.listen.api_keys)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise QsunError(f"listen {host}:{port} cannot be had: {error.strerror}; change listen in the file") from None
    listener.listen(2048)
    return listener
