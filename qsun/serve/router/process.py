"""The router as a process: it reloads its file upon SIGHUP and drains upon SIGTERM."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from qsun.errors import QsunError
from qsun.serve.cluster.file import Cluster, need_running_workers, read_cluster
from qsun.serve.cluster.modules import ModuleChecks
from qsun.serve.cluster.names import ServedNames
from qsun.serve.http.keys import read_keys
from qsun.serve.http.server import Draining, HttpProcess, listen
from qsun.serve.router.app import Router

logger = logging.getLogger(__name__)


class RouterProcess:
    """Serves one cluster file.

    Args:
        path: read again upon SIGHUP.
        cluster: its content, with URLs for all workers. names: of its modules.
        checks: keeps the modules that have been checked.
    Attributes:
        router: the application.
    """

    def __init__(
        self,
        path: Path,
        cluster: Cluster,
        names: ServedNames,
        checks: ModuleChecks,
    ):
        self.path, self._checks = path, checks
        self.router = Router(cluster, names, read_keys(cluster.listen.api_keys))
        self._reloading = asyncio.Lock()

    async def serve(self, on_listening: Callable[[str], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT. `on_listening` gets the URL, with the port that was found for port 0.

        Raises:
            QsunError: the address is not available.
        """
        state = self.router.state
        address = state.cluster.listen

        def refuse() -> None:
            state.draining = True

        draining = Draining(
            refuse,
            lambda: state.admission.running + state.admission.waiting,
            lambda: state.cluster.limits.drain_seconds,
            state.cut_off.set,
        )
        bound = listen(address.host, address.port, "change listen in the file")
        await HttpProcess(self.router, bound, draining, self.reload).serve(on_listening)

    async def reload(self) -> None:
        """Read the file again. A faulty one changes nothing, and its fault is logged."""
        state = self.router.state
        async with self._reloading:
            try:
                cluster, names, keys = await asyncio.to_thread(self._read)
                old = state.cluster.listen
                self.router.apply(cluster, names, keys)
            except (QsunError, OSError) as error:
                state.metrics.reloads.labels("refused").inc()
                logger.error("%s is not applied; keeping the old file: %s", self.path, error)
                return
            if (old.host, old.port) != (cluster.listen.host, cluster.listen.port):
                logger.warning("listen.host and listen.port stay %s:%d until a restart", old.host, old.port)
            state.metrics.reloads.labels("ok").inc()
            logger.info("%s is applied: %d workers", self.path, len(list(state.fleet)))

    def _read(self) -> tuple[Cluster, ServedNames, tuple[str, ...]]:
        cluster = read_cluster(self.path)
        need_running_workers(cluster)
        return cluster, self._checks.names(cluster), read_keys(cluster.listen.api_keys)
