"""`qsun up`: vLLM workers as replicas of Ray Serve, here or on a cluster, and the router in front of them."""

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
    file: Path = typer.Argument(..., help="cluster.yaml: modules, numbers of workers, limits (docs/ray.md)."),
    address: str | None = typer.Option(None, help="Dashboard of a running Ray cluster, such as http://head:8265."),
    logs: Path = typer.Option(Path("qsun-logs"), help="Directory for the workers' logs, without --address."),
    show: bool = typer.Option(False, "--print", help="Print the config for `serve deploy`, and run nothing."),
    kuberay: bool = typer.Option(False, help="With --print: print a RayService for KubeRay."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout, for scripts."),
) -> None:
    """Start vLLM workers on Ray Serve and the router in front of them. Ray replaces workers that die.

    Without --address, Ray runs on this machine until Ctrl-C, and SIGHUP applies a changed file.

    Examples:

      qsun up cluster.yaml --logs logs

      qsun up cluster.yaml --address http://head:8265

      qsun up cluster.yaml --print > serve.yaml
    """
    screen.show_log()
    if kuberay and not show:
        raise QsunError("--kuberay only prints a RayService; add --print, and give kubectl apply what it prints")
    if address is not None and show:
        raise QsunError(f"--print deploys nothing, and --address {address} is where to deploy; leave one of them out")
    if show:
        _print(*_planned(file), kuberay, as_json)
    elif address is not None:
        _deploy(*_planned(file), address)
    else:
        _serve_here(file, logs, as_json)


def _planned(file: Path, logs: Path | None = None) -> tuple[Any, Any]:
    """Return the cluster and its applications. logs: of workers on this machine; None: Ray is elsewhere."""
    from qsun.serve.cluster.file import read_cluster
    from qsun.serve.cluster.modules import ModuleChecks, with_one_dtype
    from qsun.serve.http.keys import read_keys
    from qsun.serve.ray.plan import plan_apps

    cluster = read_cluster(file)
    # raises for an invalid key; elsewhere the ingress reads them, from a file that this machine need not have
    cluster.guard_config(() if logs is None else read_keys(cluster.listen.api_keys))
    if logs is not None and cluster.ray.logs is None:
        cluster = cluster.replace(ray=cluster.ray.model_copy(update={"logs": str(logs.resolve())}))
    names = ModuleChecks().names(cluster)
    cluster = with_one_dtype(cluster)
    return cluster, plan_apps(cluster, names)


def _print(cluster: Any, planned: Any, kuberay: bool, as_json: bool) -> None:
    from qsun.serve.ray.config import ray_service, serve_config

    if kuberay:
        import ray

        shown = ray_service(cluster, planned, ray.__version__)
    else:
        shown = serve_config(cluster, planned)
    typer.echo(json.dumps(shown) if as_json else yaml.safe_dump(shown, sort_keys=False), nl=as_json)


def _deploy(cluster: Any, planned: Any, address: str) -> None:
    from qsun.serve.ray.config import put_config, ray_token, serve_config

    put_config(address, serve_config(cluster, planned), ray_token(os.environ))
    screen.note(f"{len(planned)} applications are being deployed; `serve status -a {address}` shows their state")


def _serve_here(file: Path, logs: Path, as_json: bool) -> None:
    def read() -> tuple[Any, Any]:
        from qsun.serve.ray.engine.environment import check_environment

        cluster, planned = _planned(file, logs)
        launch = cluster.launch
        environment = dict(os.environ) | launch.environment
        check_environment(launch.python or sys.executable, launch.kernels, environment, not cluster.one_engine)
        return cluster, planned

    cluster, planned = read()
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")  # before Ray's variables are set
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15, which vLLM inherits, starves it beside other work
    _keep_ray_private()
    from qsun.serve.ray.config import ray_token
    from qsun.serve.ray.local import serve_here

    def ready(url: str) -> None:
        found = {"url": url, "models": list(cluster.models), "logs": cluster.ray.logs}
        typer.echo(json.dumps(found) if as_json else f"qsun up: {url}")

    try:
        serve_here(cluster, planned, ray_token(os.environ), read, ready, screen.note)
    except KeyboardInterrupt:
        screen.interrupted("the cluster was not warm yet; all replicas have ended")


def _keep_ray_private() -> None:
    """Have Ray's processes listen on the loopback address, and require a token. Ray reads this when it is imported.

    Its switch for Windows and macOS chooses the address. RAY_AUTH_MODE decides whether a token is required; a token
    alone changes nothing.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if not mode:
        os.environ["RAY_AUTH_MODE"] = "token"
        if not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # which only Ray's own processes get
    elif mode.lower() == "disabled":
        screen.note("RAY_AUTH_MODE is disabled: other users of this machine can run code as you through Ray; unset it")
