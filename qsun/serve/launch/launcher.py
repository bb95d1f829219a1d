"""The router of `qsun up` over the vLLM workers that it has started, until a signal ends both."""

import asyncio
import json
import logging
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qsun.errors import QsunError
from qsun.serve.cluster.file import Cluster, with_workers
from qsun.serve.cluster.modules import ModuleChecks
from qsun.serve.cluster.names import ServedNames
from qsun.serve.launch import signals as launch_signals
from qsun.serve.launch.plan import WorkerCommand, started_urls
from qsun.serve.launch.processes import WorkerDied, WorkerProcesses, last_lines
from qsun.serve.router.process import RouterProcess

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_REPORT_SECONDS = 5.0
_PROBE_SECONDS = 120.0
_PROBE = (
    "import json, importlib.metadata as m, importlib.util as u; "
    "names = [p.name for p in m.entry_points(group='vllm.general_plugins')]; "
    "print(json.dumps({'vllm': u.find_spec('vllm') is not None, 'nixl': u.find_spec('nixl') is not None, "
    "'qsun': 'qsun' in names}))"
)


def check_environment(python: str, kernels: str, environment: Mapping[str, str]) -> None:
    """Raise QsunError if the workers' Python lacks vLLM, NIXL or, for our kernels, our plugin."""
    probe = [python, "-c", _PROBE]
    try:
        done = subprocess.run(  # noqa: S603 - an argument list, no shell
            probe, env=dict(environment), capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
        found = json.loads(done.stdout)
    except OSError as error:
        raise QsunError(f"launch.python {python} cannot be run: {error.strerror}") from None
    except (subprocess.TimeoutExpired, ValueError):
        raise QsunError(f"launch.python {python} does not work as a Python interpreter") from None
    fixes = {"vllm": "install vLLM there", "nixl": "pip install nixl there"}
    if kernels == "qsun":
        fixes["qsun"] = "pip install qsun there, or set launch.kernels: vllm"
    for name, fix in fixes.items():
        if not found[name]:
            what = "qsun plugin for vLLM" if name == "qsun" else name
            raise QsunError(f"launch.python {python} has no {what}; {fix}, or name another environment")


@dataclass(frozen=True)
class LocalCluster:
    """A cluster whose workers have been started on this machine.

    Args:
        path: of the cluster file. cluster: its content. names, checks: of its modules.
        workers: the started processes.
        report: called with lines of progress.
    """

    path: Path
    cluster: Cluster
    names: ServedNames
    checks: ModuleChecks
    workers: WorkerProcesses
    report: Callable[[str], None]

    async def serve(self, on_warm: Callable[[str], None]) -> None:
        """Run the router until SIGTERM or SIGINT; signals are ignored after that. Workers must be ready.

        Args:
            on_warm: gets the URL once every pair of workers is warm.
        Raises:
            QsunError: the address is in use, a model has no warm pair within launch.start_seconds, or a worker died
                before that (WorkerDied).
        """
        commands = [worker.command for worker in self.workers.workers]
        filled = fill_in(self.cluster, self.cluster, commands)
        process = RouterProcess(
            self.path, filled, self.names, self.checks, lambda new: fill_in(new, self.cluster, commands)
        )
        found: list[str] = []
        serving = asyncio.ensure_future(_route(process, found.append))
        watching = asyncio.ensure_future(self._watch(process, lambda: on_warm(found[0])))
        try:
            await asyncio.wait({serving, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and watching.exception() is not None:
                serving.cancel()
        finally:
            watching.cancel()
            results = await asyncio.gather(watching, serving, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _watch(self, process: RouterProcess, on_warm: Callable[[], None]) -> None:
        await self._warm(process)
        on_warm()
        while True:
            self._report_deaths()
            await asyncio.sleep(_POLL_SECONDS)

    async def _warm(self, process: RouterProcess) -> None:
        fleet = process.router.state.fleet
        started = reported = time.monotonic()
        while len(fleet.warm) < len({worker for pool in fleet.prefill.values() for worker in pool}) * len(fleet.decode):
            for worker in self.workers.newly_dead():
                raise WorkerDied(worker)
            now = time.monotonic()
            if now - started > self.cluster.launch.start_seconds:
                missing = fleet.without_a_pair()
                if missing:
                    raise QsunError(f"no pair of workers is warm for {', '.join(missing)}; read the workers' logs")
                logger.warning("only %d pairs of workers are warm; starting with them", len(fleet.warm))
                return
            if now - reported >= _REPORT_SECONDS:
                reported = now
                self.report(f"{now - started:.0f} s: waiting for first transfers, {len(fleet.warm)} pairs are warm")
            await asyncio.sleep(_POLL_SECONDS)

    def _report_deaths(self) -> None:
        """Log workers that died, which are not restarted: a person should see why. The router uses the others."""
        for worker in self.workers.newly_dead():
            logger.error("%s; it is not restarted. Its last lines:", worker.death())
            for line in last_lines(worker.log):
                logger.error("    %s", line)


async def _route(process: RouterProcess, on_listening: Callable[[str], None]) -> None:
    """Serve. The router removes its handlers at the end, and a signal after that would end us before the workers."""
    try:
        await process.serve(on_listening)
    finally:
        launch_signals.ignore()


def fill_in(cluster: Cluster, first: Cluster, commands: list[WorkerCommand]) -> Cluster:
    """Return the cluster with URLs of started workers in place of numbers.

    Args:
        cluster: as read at the start or upon SIGHUP. first: as read at the start.
    Raises:
        QsunError: the file asks for other workers of this machine than were started.
    """
    decode, shared, models = started_urls(commands)
    for where, pool in cluster.pools.items():
        if isinstance(pool.workers, int) and pool != first.pools.get(where):
            raise QsunError(f"{where}: qsun up starts workers only at its own start; list running ones, or restart it")
    changed = [model for model, entry in cluster.adapters.items() if first.adapters.get(model) != entry]
    if changed and cluster.prefill is not None and isinstance(cluster.prefill.workers, int):
        raise QsunError(
            f"models.{changed[0]}: qsun up gives adapters to workers only at its own start; list running workers in "
            "prefill.workers, or restart it"
        )
    counted = {where for where, pool in cluster.pools.items() if isinstance(pool.workers, int)}
    return with_workers(
        cluster,
        decode if "decode" in counted else None,
        {name: urls for name, urls in models.items() if f"models.{name}" in counted},
        shared if "prefill" in counted else None,
    )
