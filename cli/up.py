"""`qsun up`: vLLM workers on this machine and the router in front of them, in one command."""

import importlib.util
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import typer
import yaml

from qsun.cli.terminal import screen
from qsun.errors import QsunError


def up(
    file: Path = typer.Argument(..., help="cluster.yaml; pools with a number of workers are started (docs/vllm.md)."),
    logs: Path = typer.Option(Path("qsun-logs"), help="Directory for the logs of the workers."),
    show: bool = typer.Option(False, "--print", help="Print the commands without running them."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout, for scripts."),
    on_ray: bool = typer.Option(False, "--ray", help="Deploy to Ray Serve, which restarts and scales workers."),
    address: str | None = typer.Option(None, help="Dashboard of a running Ray cluster, such as http://head:8265."),
    kuberay: bool = typer.Option(False, help="With --ray --print: print a RayService for KubeRay."),
) -> None:
    """Start vLLM workers on this machine and the router in front of them; Ctrl-C ends all of them.

    A worker that dies is not restarted: its last log lines are shown, and the router continues with the others.
    With --ray, Ray Serve replaces it. Without --address, Ray runs on this machine until Ctrl-C.

    Examples:

      qsun up cluster.yaml --logs logs

      qsun up cluster.yaml --print

      qsun up cluster.yaml --ray --print > serve.yaml
    """
    screen.show_log()
    if on_ray:
        _up_on_ray(file, logs, address, show, kuberay, as_json)
        return
    if address is not None or kuberay:
        raise QsunError("--address and --kuberay are for --ray; add it")
    from qsun.serve.launch import signals as launch_signals

    if show:
        _print(file, as_json)
        return
    with launch_signals.restored():
        launch_signals.interrupt_start()
        try:
            _serve(file, logs, as_json)
        except KeyboardInterrupt:
            screen.interrupted("the cluster was not warm yet, and all workers have ended")


def _planned(file: Path) -> tuple[Any, Any, Any, list[Any]]:
    """Return the cluster, its served names, its module checks and the commands of its workers."""
    from qsun.serve.cluster.file import read_cluster
    from qsun.serve.cluster.modules import ModuleChecks
    from qsun.serve.launch.plan import plan_workers

    cluster = read_cluster(file)
    checks = ModuleChecks()
    names = checks.names(cluster)
    return cluster, names, checks, plan_workers(cluster, names, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _print(file: Path, as_json: bool) -> None:
    *_, commands = _planned(file)
    if as_json:
        workers = [
            {
                "name": c.name,
                "model": c.model,
                "adapters": c.adapters,
                "url": c.url,
                "argv": c.argv,
                "environment": c.environment,
            }
            for c in commands
        ]
        typer.echo(json.dumps({"workers": workers}))
        return
    for command in commands:
        typer.echo(f"# {command.name}: {command.url}\n{command.shell()}\n")
    typer.echo(f"# then the router of {file}, in this process, with these URLs")


def _serve(file: Path, logs: Path, as_json: bool) -> None:
    import asyncio

    from qsun.serve.http.keys import read_keys
    from qsun.serve.launch.launcher import LocalCluster, check_environment
    from qsun.serve.launch.processes import WorkerDied, WorkerProcesses, last_lines

    cluster, names, checks, commands = _planned(file)
    # raises for an invalid key, before workers take minutes to start
    cluster.guard_config(read_keys(cluster.listen.api_keys))
    environment = dict(os.environ)
    probed = environment | cluster.launch.environment  # as the workers will have it: PYTHONPATH may name vLLM
    check_environment(cluster.launch.python or sys.executable, cluster.launch.kernels, probed)
    screen.note(f"starting {', '.join(command.name for command in commands)}; logs in {logs}")
    try:
        with WorkerProcesses(commands, logs, environment) as workers:
            workers.wait_until_ready(cluster.launch.start_seconds, screen.note)

            def warm(url: str) -> None:
                started = [
                    {"name": w.command.name, "url": w.command.url, "pid": w.process.pid, "log": str(w.log)}
                    for w in workers.workers
                ]
                models = list(cluster.models)
                line = json.dumps({"url": url, "models": models, "workers": started}) if as_json else f"qsun up: {url}"
                typer.echo(line)

            asyncio.run(LocalCluster(file, cluster, names, checks, workers, screen.note).serve(warm))
            screen.note("ending the workers")
    except WorkerDied as died:
        for line in last_lines(died.worker.log):
            screen.note(f"    {line}")
        raise


def _up_on_ray(file: Path, logs: Path, address: str | None, show: bool, kuberay: bool, as_json: bool) -> None:
    """Deploy a cluster file to Ray Serve, or print what would be deployed."""
    if kuberay and not show:
        raise QsunError("--kuberay only prints a RayService; add --print, and give kubectl apply what it prints")
    if address is not None and show:
        raise QsunError(f"--print deploys nothing, and --address {address} is where to deploy; leave one of them out")
    if importlib.util.find_spec("ray") is None:
        raise QsunError("--ray needs Ray: pip install 'qsun[ray]'")
    from qsun.serve.cluster.file import read_cluster
    from qsun.serve.cluster.modules import ModuleChecks
    from qsun.serve.http.keys import read_keys
    from qsun.serve.ray.plan import plan_apps

    cluster = read_cluster(file)
    here = address is None and not show
    # raises for an invalid key; elsewhere the ingress reads them, from a file that this machine need not have
    cluster.guard_config(read_keys(cluster.listen.api_keys) if here else ())
    if cluster.ray.logs is None and here:
        cluster = cluster.replace(ray=cluster.ray.model_copy(update={"logs": str(logs.resolve())}))
    planned = plan_apps(cluster, ModuleChecks().names(cluster))
    if show:
        _print_on_ray(cluster, planned, kuberay, as_json)
    elif address is not None:
        _deploy(cluster, planned, address)
    else:
        _serve_here(cluster, planned, as_json)


def _print_on_ray(cluster: Any, planned: Any, kuberay: bool, as_json: bool) -> None:
    import ray

    from qsun.serve.ray.config import ray_service, serve_config

    shown = ray_service(cluster, planned, ray.__version__) if kuberay else serve_config(cluster, planned)
    typer.echo(json.dumps(shown) if as_json else yaml.safe_dump(shown, sort_keys=False), nl=as_json)


def _deploy(cluster: Any, planned: Any, address: str) -> None:
    from qsun.serve.ray.config import put_config, ray_token, serve_config

    put_config(address, serve_config(cluster, planned), ray_token(os.environ))
    screen.note(f"{len(planned)} applications are being deployed; `serve status -a {address}` shows how they are")


def _require_ray_token() -> None:
    """Have Ray's processes require a token: they listen on every network of the machine.

    Ray reads it when it is imported. Whether a token is required is RAY_AUTH_MODE's to say: one alone changes nothing.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if not mode:
        os.environ["RAY_AUTH_MODE"] = "token"
        if not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # which only Ray's own processes get
    elif mode.lower() == "disabled":
        screen.note(
            "RAY_AUTH_MODE is disabled: whoever reaches a port of Ray on this machine can run code here; unset it"
        )


def _serve_here(cluster: Any, planned: Any, as_json: bool) -> None:
    _require_ray_token()
    from qsun.serve.launch import signals as launch_signals
    from qsun.serve.launch.launcher import check_environment
    from qsun.serve.ray.local import deploy, local_ray, wait_for_signal, wait_until_running

    launch = cluster.launch
    check_environment(launch.python or sys.executable, launch.kernels, dict(os.environ) | launch.environment)
    with launch_signals.restored():
        launch_signals.interrupt_start()
        try:
            with local_ray(planned):
                launch_signals.interrupt_start()  # again: Ray has set a handler of SIGTERM that exits at once
                url = deploy(cluster, planned)
                screen.note(f"starting {len(planned)} applications on Ray; logs of vLLM in {cluster.ray.logs}")
                wait_until_running(planned, url, launch.start_seconds, screen.note)
                models = list(cluster.models)
                typer.echo(json.dumps({"url": url, "models": models}) if as_json else f"qsun up: {url}")
                wait_for_signal()
                screen.note("ending the replicas")
        except KeyboardInterrupt:
            screen.interrupted("the cluster was not warm yet, and all replicas have ended")
