"""`qsun up` without an address: a Ray of this machine, on its loopback address, and the applications on it."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from qsun.errors import QsunError
from qsun.progress import Note
from qsun.serve.cluster.schema import Cluster, Listen
from qsun.serve.http.server import listen, url_of
from qsun.serve.ray.calls import CALL_FAILURES
from qsun.serve.ray.config import put_config, serve_config
from qsun.serve.ray.engine.command import free_ports
from qsun.serve.ray.engine.logs import logs_in_use, wait_until_unused
from qsun.serve.ray.engine.watchdog import GRACE_SECONDS
from qsun.serve.ray.plan import INGRESS, INGRESS_APP, LAST_SECONDS, PlannedApp, needed_resources
from qsun.serve.ray.signals import UpSignals

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_REPORT_SECONDS = 5.0
_REASON_CHARACTERS = 1000
_OUR_ERROR = f"{QsunError.__name__}: "

Planned = Sequence[PlannedApp]


def serve_here(
    cluster: Cluster,
    planned: Planned,
    token: str | None,
    read: Callable[[], tuple[Cluster, Planned]],
    on_ready: Callable[[str], None],
    report: Note,
) -> None:
    """Serve a cluster from a Ray of this machine until SIGINT or SIGTERM; SIGHUP reads its file again.

    Args:
        planned: its applications. token: of Ray, if it is to require one. read: gives both anew.
        on_ready: gets the URL once every model has a warm pair. report: called with lines of progress.
    Raises:
        KeyboardInterrupt: there was a signal before that.
        QsunError: the address is taken, resources are too few, or an application cannot be deployed.
    """
    assert cluster.ray.logs is not None
    url, port = _free_address(cluster)
    with UpSignals() as signals, local_ray(planned, Path(cluster.ray.logs), signals) as dashboard:
        served = LocalServe(dashboard, url, cluster.listen.model_copy(update={"port": port}), token, report)
        report(f"starting {len(planned)} applications on Ray; logs of vLLM in {cluster.ray.logs}")
        served.apply(cluster, planned)
        on_ready(url)
        until_interrupted(signals, lambda: served.reload(read))
        report("finishing running requests, and ending the replicas")
        served.drain()


class LocalServe:
    """The applications on this machine's Ray.

    Args:
        dashboard, url: addresses of Ray's dashboard and of the ingress. listen: where it listens, whatever files say.
        token, report: as for `serve_here`.
    """

    def __init__(self, dashboard: str, url: str, listen: Listen, token: str | None, report: Note):
        self._dashboard, self._url, self._listen, self._token, self._report = dashboard, url, listen, token, report
        self._running: tuple[Cluster, Planned] | None = None

    def apply(self, cluster: Cluster, planned: Planned) -> None:
        """Deploy, and return once every application runs and every model has a warm pair of replicas."""
        listening = cluster.replace(listen=self._listen)
        put_config(self._dashboard, serve_config(listening, planned), self._token)
        wait_until_running(planned, self._url, cluster.launch.start_seconds, self._report)
        self._running = cluster, planned

    def reload(self, read: Callable[[], tuple[Cluster, Planned]]) -> None:
        """Apply a changed file. If that fails, deploy what ran before.

        Raises:
            QsunError: the file has a fault, or what it describes does not run.
        """
        assert self._running is not None
        before = self._running
        cluster, planned = read()
        _check_room(planned)
        try:
            self.apply(cluster, planned)
        except Exception as error:
            self._report("the changed file does not run; restoring the previous one")
            self.apply(*before)
            raise QsunError(f"the changed file is not applied: {_line(error)}") from error
        old, new = before[0].listen, cluster.listen
        if (old.host, old.port) != (new.host, new.port):
            self._report(f"listen.host and listen.port are those of {self._url} until a restart")
        self._report("the changed file is applied")

    def drain(self) -> None:
        """Have the ingress refuse new requests, and return once it has finished the running ones or cut them off."""
        assert self._running is not None
        seconds = self._running[0].limits.drain_seconds + LAST_SECONDS
        try:
            handle = serve.get_deployment_handle(INGRESS, app_name=INGRESS_APP)
            handle.broadcast("drain").results(timeout_s=seconds + LAST_SECONDS)
        except (TimeoutError, *CALL_FAILURES) as error:
            logger.warning("running requests may be cut off: %s", type(error).__name__)


@contextmanager
def local_ray(planned: Planned, logs: Path, signals: UpSignals) -> Iterator[str]:
    """Have a Ray of this machine in the block, which gets its dashboard's URL; every process of it ends with the block.

    Replicas end in order, unless the block raises.

    It counts as many CPUs and `ray.resources` as the applications ask for: on one machine, how many share a core is the
    user's choice.

    Args:
        logs: directory of the replicas' logs. signals: those of this process.
    Raises:
        QsunError: Ray does not start, or there are too few GPUs.
    """
    others = logs_in_use(logs)  # of another qsun up
    needed = needed_resources(planned, updating=True)
    cpus = math.ceil(needed.pop("CPU", 0))
    needed.pop("GPU", None)  # Ray counts those that are visible
    try:
        context = ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            resources={name: math.ceil(amount) for name, amount in needed.items()},
            dashboard_port=free_ports(1)[0],
            log_to_driver=False,
            configure_logging=False,
        )
    except Exception as error:  # its own class, as it gives up after 30 s on a busy machine
        raise QsunError(f"Ray does not start on this machine: {str(error)[:_REASON_CHARACTERS]}") from error
    try:
        _check_room(planned)
        signals.take()  # again: Ray has set a handler of SIGTERM that exits at once
        yield f"http://{context.dashboard_url}"
        serve.shutdown()
    finally:
        _shut_down(signals)
        wait_until_unused(logs, 2 * GRACE_SECONDS, others)


def _shut_down(signals: UpSignals) -> None:
    """End Ray, which resets SIGTERM's action in the midst of it, in a thread: only the main one can set it again."""
    ending = threading.Thread(target=ray.shutdown)
    ending.start()
    while ending.is_alive():
        signals.disregard()
        ending.join(0.01)


def _check_room(planned: Planned) -> None:
    """Raise QsunError if this Ray has less of a resource than the applications take."""
    has = ray.cluster_resources()
    for name, amount in needed_resources(planned).items():
        if amount > has.get(name, 0):
            raise QsunError(
                f"the workers need {amount:g} {name}, and Ray has {has.get(name, 0):g} on this machine; start fewer, "
                "have several share a GPU with ray.gpus, or restart qsun up after a change of the file"
            )


def _free_address(cluster: Cluster) -> tuple[str, int]:
    """Return the URL and port to listen on, a free one for port 0. Raises QsunError if the address is taken."""
    with listen(cluster.listen.host, cluster.listen.port, "change listen in the file") as bound:
        return url_of(bound), bound.getsockname()[1]


def wait_until_running(planned: Planned, url: str, seconds: float, report: Note) -> None:
    """Return once every application runs and every model has a warm pair of replicas.

    Raises:
        QsunError: one failed to deploy, with Serve's reason, or the time is up.
    """
    started = reported = time.monotonic()
    told: set[str] = set()
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while (waiting := _waiting(planned) or _cold(client, url)) is not None:
            now = time.monotonic()
            if now - started > seconds:
                raise QsunError(
                    f"not ready after {seconds:g} s: {waiting}; read the logs, or raise launch.start_seconds"
                )
            for failure in _failures(planned) - told:
                told.add(failure)
                report(f"{failure}; Serve tries again")
            if now - reported >= _REPORT_SECONDS:
                reported = now
                report(f"{now - started:.0f} s: waiting for {waiting}")
            time.sleep(_POLL_SECONDS)


def _waiting(planned: Planned) -> str | None:
    statuses = serve.status().applications
    for app in planned:
        status = statuses.get(app.name)
        if status is not None and status.status == ApplicationStatus.DEPLOY_FAILED:
            messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
            raise QsunError(f"application {app.name} cannot be deployed: {failure_reason(messages)}")
    names = [app.name for app in planned]
    waiting = [n for n in names if n not in statuses or statuses[n].status != ApplicationStatus.RUNNING]
    return ", ".join(waiting) or None


def _failures(planned: Planned) -> set[str]:
    """Return why replicas have failed to start so far, in our own words."""
    found = serve.status().applications
    statuses = [found[app.name] for app in planned if app.name in found]
    messages = [deployment.message for status in statuses for deployment in status.deployments.values()]
    return {failure_reason([message]) for message in messages if _OUR_ERROR in message}


def failure_reason(messages: Sequence[str]) -> str:
    """Return what Serve says of a deployment that failed, on one line: our own error if a replica raised one."""
    for message in messages:
        _, found, reason = message.rpartition(_OUR_ERROR)
        if found:
            return " ".join(reason.split())[:_REASON_CHARACTERS]
    return " ".join(" ".join(messages).split())[-_REASON_CHARACTERS:]


def _cold(client: httpx.Client, url: str) -> str | None:
    try:
        answer = client.get(f"{url}/ready")
    except httpx.HTTPError as error:
        return f"{INGRESS_APP} ({type(error).__name__})"
    if answer.status_code == 200:
        return None
    try:
        models = answer.json()["models_without_workers"]
    except (ValueError, KeyError, TypeError):
        return f"{INGRESS_APP} (status {answer.status_code})"
    return f"first transfers of {', '.join(models)}"


def until_interrupted(signals: UpSignals, reload: Callable[[], None]) -> None:
    """Return upon SIGINT or SIGTERM. SIGHUP calls `reload`, whose faults are logged and change nothing else."""
    try:
        while True:
            if signals.hangup.wait(_POLL_SECONDS):
                signals.hangup.clear()
                try:
                    reload()
                except Exception as error:  # Ray has many, and what runs goes on
                    logger.error("%s", _line(error))
    except KeyboardInterrupt:
        return


def _line(error: Exception) -> str:
    if isinstance(error, QsunError | OSError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[-_REASON_CHARACTERS:]}"
