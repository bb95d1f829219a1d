"""`--help` of every command: examples that name the command, and defaults that are not swallowed as markup."""

import re

import pytest
import typer

from qsun.cli.main import app

COMMANDS = {
    "quantize": "Default: refined.",
    "tune": "Default: 3.",
    "serve": "Default: a quarter of what is free.",
    "inspect": "",
    "eval": "",
    "check-pair": "",
    "up": "Kubernetes sketch",
    "route": "SIGHUP",
    "demo": "",
    "demo-data": "",
    "lm-eval": "lm-eval's own help",
    "bench passes": "",
    "bench kernels": "Default on a CPU",
    "bench tune-kernels": "Default: all.",
    "bench engine": "",
    "bench tasks": "",
    "bench tuning": "",
    "bench speed": "as qsun quantize leaves it",
    "bench serve": "all of /v1/models",
    "simulate": "Default: twice SUN",
}


def test_no_command_is_forgotten():
    group = typer.main.get_command(app)
    found = set()
    for name, command in group.commands.items():
        found |= {f"{name} {inner}" for inner in command.commands} if hasattr(command, "commands") else {name}
    assert found == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli, command):
    answer = cli(*command.split(), "--help")
    assert answer.code == 0
    text = re.sub(r"[│\s]+", " ", answer.out)
    assert re.search(rf"Examples?: (qsun|.*? qsun) {command}", text), text
    assert COMMANDS[command] in text
