"""`qsun lm-eval`: lm-eval's own command line, in which the model `qsun` and qsun's tasks are known."""

import sys
from typing import Any

import typer

PASS_THROUGH: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],  # `run --help` is lm-eval's
}
_INCLUDE = "--include_path"


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with its own arguments; --model qsun is a pair of modules.

    --include_path is added where you give none, so that qsun_demo, gsm8k_local, humaneval_local and bfcl_simple are
    found; `qsun lm-eval run --help` is lm-eval's own help.

    Examples:

      qsun lm-eval --model qsun --model_args decode=out/int4,prefill=out/math --tasks qsun_math --batch_size auto

      qsun lm-eval --model qsun --model_args decode=out/int4 --tasks gsm8k_local --metadata data_dir=data
    """
    arguments = list(context.args)
    if arguments in ([], ["--help"], ["-h"]):
        typer.echo(context.get_help())
        return
    from lm_eval.__main__ import cli_evaluate

    import qsun.eval.harness.lm  # noqa: F401  registers the model
    from qsun.eval.tasks import tasks_directory

    if len(arguments) > 1 and not any(argument.split("=")[0] == _INCLUDE for argument in arguments):
        arguments += [_INCLUDE, str(tasks_directory())]
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
