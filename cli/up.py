"""`qsun up`: vLLM workers on this machine and the router in front of them, in one command."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import screen


def up(
    file: Path = typer.Argument(..., help="cluster.yaml; pools with a number of workers are started (docs/vllm.md)."),
    logs: Path = typer.Option(Path("qsun-logs"), help="Directory for the logs of the workers."),
    show: bool = typer.Option(False, "--print", help="Print the commands without running them."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout, for scripts."),
) -> None:
    """Start vLLM workers on this machine and the router in front of them; Ctrl-C ends all of them.

    A worker that dies is not restarted: its last log lines are shown, and the router continues with the others.

    Examples:

      qsun up cluster.yaml --logs logs

      qsun up cluster.yaml --print
    """
    from qsun.serve.launch import signals as launch_signals

    screen.show_log()
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
            {"name": c.name, "model": c.model, "url": c.url, "argv": c.argv, "environment": c.environment}
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
