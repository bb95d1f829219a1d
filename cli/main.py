"""`qsun`: the commands, and how errors are shown."""

import io
import os
import re
import sys
from pathlib import Path

import typer

from qsun._version import __version__
from qsun.cli import (
    bench,
    check_pair,
    demo,
    demo_data,
    evaluate,
    generate,
    inspect,
    lm_eval,
    quantize,
    route,
    serve,
    simulate,
    tune,
    up,
)
from qsun.cli.terminal import screen
from qsun.cli.terminal.extras import missing_package
from qsun.errors import QsunError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize, tune and serve the shared decode module of SUN: many fine-tuned models, one int4 decoder.",
)
app.command("quantize", no_args_is_help=True, help=quantize.EXAMPLES)(quantize.quantize)
app.command("tune", no_args_is_help=True)(tune.tune)
app.command("eval", no_args_is_help=True, help=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("generate", no_args_is_help=True)(generate.generate)
app.command("serve", no_args_is_help=True)(serve.serve)
app.command("inspect", no_args_is_help=True)(inspect.inspect)
app.command("check-pair", no_args_is_help=True)(check_pair.check_pair)
app.command("route", no_args_is_help=True)(route.route)
app.command("up", no_args_is_help=True)(up.up)
app.command("demo")(demo.demo)
app.command("demo-data", no_args_is_help=True)(demo_data.demo_data)
app.command("simulate", no_args_is_help=True)(simulate.simulate)
app.command("lm-eval", context_settings=lm_eval.PASS_THROUGH)(lm_eval.lm_eval)
app.add_typer(bench.app, name="bench")


@app.command("version")
def version() -> None:
    """Print the version.

    Example:

      qsun version
    """
    typer.echo(f"qsun {__version__}")


@app.callback(invoke_without_command=True)
def _root(show: bool = typer.Option(False, "--version", "-V", help="Print the version and exit.")) -> None:
    if show:
        version()
        raise typer.Exit


def main() -> None:
    """Entry point. Errors that a user can fix are one line on stderr and exit code 2; Ctrl-C is one line and 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no encoding of a terminal ends a command
    try:
        app([_with_home(argument) for argument in sys.argv[1:]], prog_name="qsun")
    except screen.Interrupted:
        raise
    except SystemExit as leaving:
        if leaving.code == screen.Interrupted.EXIT_CODE:
            screen.error("interrupted")
        raise
    except QsunError as error:
        screen.error(str(error))
        sys.exit(2)
    except ModuleNotFoundError as error:
        message = missing_package(error)
        if message is None:
            raise
        screen.error(message)
        sys.exit(2)
    except OSError as error:
        screen.error(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
        sys.exit(2)


def _with_home(argument: str) -> str:
    """Expand ~ in --out=~/models and math=~/models, where shells leave it."""
    return re.sub(r"^([-\w.]+=)~(?=/)", lambda found: found[1] + str(Path.home()), argument)


if __name__ == "__main__":
    main()
