"""`qsun bench`: measurements that the README quotes."""

import typer

from qsun.cli.bench import adapters, engine, kernels, passes, serve, speculation, speed, tasks

app = typer.Typer(no_args_is_help=True, help="Measure passes, kernels, tuning and serving.")
app.command("passes", no_args_is_help=True)(passes.passes)
app.command("kernels")(kernels.kernels)
app.command("tune-kernels")(kernels.tune_kernels)
app.command("serve", no_args_is_help=True)(serve.serve)
app.command("speed", no_args_is_help=True)(speed.speed)
app.command("tasks", no_args_is_help=True)(tasks.tasks)
app.command("task-data", no_args_is_help=True)(tasks.task_data)
app.command("tuning", no_args_is_help=True)(tasks.tuning)
app.command("engine")(engine.engine)
app.command("speculation", no_args_is_help=True)(speculation.speculation)
app.command("adapters")(adapters.adapters)
