"""`qsun route`: the router in front of vLLM workers."""

import json
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import screen


def route(
    file: Path = typer.Argument(..., help="cluster.yaml: modules, workers, policy and limits (docs/routing.md)."),
    check: bool = typer.Option(False, "--check", help="Check the file, the modules and the workers, and exit."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Serve many models from running vLLM workers: prefill workers for each model, shared decode workers.

    SIGHUP reloads the file, SIGTERM finishes running requests and exits.

    Examples:

      qsun route cluster.yaml

      qsun route cluster.yaml --check --json
    """
    import asyncio

    from qsun.serve.cluster.file import need_running_workers, read_cluster
    from qsun.serve.cluster.modules import ModuleChecks
    from qsun.serve.http.keys import read_keys
    from qsun.serve.router.process import RouterProcess

    screen.show_log()
    cluster = read_cluster(file)
    need_running_workers(cluster)
    cluster.guard_config(read_keys(cluster.listen.api_keys))  # raises for an invalid key
    checks = ModuleChecks()
    names = checks.names(cluster)
    if check:
        raise typer.Exit(0 if _checked(cluster, names, as_json) else 2)

    def listening(url: str) -> None:
        typer.echo(json.dumps({"url": url, "models": list(cluster.models)}) if as_json else f"qsun route: {url}")

    asyncio.run(RouterProcess(file, cluster, names, checks).serve(listening))


def _checked(cluster: Any, names: Any, as_json: bool) -> bool:
    """Print what each worker reports. Return whether all of them match the cluster file."""
    import asyncio

    from qsun.serve.router.check import check_workers

    found = asyncio.run(check_workers(cluster, names))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        for worker in found["workers"]:
            typer.echo(f"{worker['role']:<8}{worker['url']}  {worker['served_name']}  {worker['fault'] or 'OK'}")
    return found["ok"]
