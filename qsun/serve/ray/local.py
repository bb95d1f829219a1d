"""`qsun up --ray`: the applications on a Ray of this machine, or on a running cluster."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus

from qsun.errors import QsunError
from qsun.serve.cluster.schema import Cluster
from qsun.serve.http.server import listen, url_of
from qsun.serve.ray import apps as builders
from qsun.serve.ray.plan import INGRESS_APP, PlannedApp, needed_cpus, needed_resources

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_REPORT_SECONDS = 5.0
_REASON_CHARACTERS = 1000
_BUILD: dict[str, Callable[[Any], Any]] = {"engines": builders.engines, "ingress": builders.ingress}


@contextmanager
def local_ray(planned: Sequence[PlannedApp]) -> Iterator[None]:
    """Have a Ray of this machine in the block, without dashboard; every process of it ends with the block.

    It counts as many CPUs and `ray.resources` as the applications ask for: on one machine, how many share a core is the
    user's choice.
    """
    ray.init(
        address="local",
        num_cpus=max(needed_cpus(planned), os.cpu_count() or 1),
        resources=needed_resources(planned),
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(cluster: Cluster, planned: Sequence[PlannedApp]) -> str:
    """Start Serve in the Ray that this process is connected to, and deploy. Return the URL of the ingress."""
    address = cluster.listen
    bound = listen(address.host, address.port, "change listen in the file")  # finds a port for port 0
    url, port = url_of(bound), bound.getsockname()[1]
    bound.close()
    serve.start(http_options=HTTPOptions(host=address.host, port=port))
    targets = [
        serve.RunTarget(_BUILD[app.import_path.rpartition(":")[2]](app.args), app.name, app.route_prefix)
        for app in planned
    ]
    serve.run_many(targets, wait_for_applications_running=False)
    return url


def wait_until_running(planned: Sequence[PlannedApp], url: str, seconds: float, report: Callable[[str], None]) -> None:
    """Return once every application runs and every model has a warm pair of replicas.

    Raises:
        QsunError: one failed to deploy, with Serve's reason, or the time is up.
    """
    started = reported = time.monotonic()
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while (waiting := _waiting(planned) or _cold(client, url)) is not None:
            now = time.monotonic()
            if now - started > seconds:
                raise QsunError(
                    f"not ready after {seconds:g} s: {waiting}; read the logs, or raise launch.start_seconds"
                )
            if now - reported >= _REPORT_SECONDS:
                reported = now
                report(f"{now - started:.0f} s: waiting for {waiting}")
            time.sleep(_POLL_SECONDS)


def _waiting(planned: Sequence[PlannedApp]) -> str | None:
    statuses = serve.status().applications
    for app in planned:
        status = statuses.get(app.name)
        if status is not None and status.status == ApplicationStatus.DEPLOY_FAILED:
            messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
            raise QsunError(f"application {app.name} cannot be deployed: {failure_reason(messages)}")
    names = [app.name for app in planned]
    waiting = [n for n in names if n not in statuses or statuses[n].status != ApplicationStatus.RUNNING]
    return ", ".join(waiting) or None


def failure_reason(messages: Sequence[str]) -> str:
    """Return what Serve says of a deployment that failed, on one line: our own error if a replica raised one."""
    for message in messages:
        _, found, reason = message.rpartition(f"{QsunError.__name__}: ")
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


def wait_for_signal() -> None:
    """Return upon SIGINT or SIGTERM; further ones are ignored from then on."""
    try:
        while True:
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:  # raised for both (qsun/serve/launch/signals.py)
        return
