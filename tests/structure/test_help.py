"""`--help` of every command: examples that name the command, and defaults that are not swallowed as markup."""

import re
import resource
import subprocess
import sys

import pytest
import typer

from qsun.cli.main import app

COMMANDS = {
    "quantize": "Default: refined.",
    "tune": "Default: 3.",
    "generate": "Default: standard input is one prompt.",
    "serve": "Default: a quarter of what is free.",
    "inspect": "",
    "eval": "",
    "check-pair": "",
    "up": "",
    "route": "SIGHUP",
    "demo": "",
    "demo-data": "",
    "lm-eval": "lm-eval's own help",
    "version": "",
    "bench passes": "",
    "bench kernels": "Default on a CPU",
    "bench tune-kernels": "Default: all.",
    "bench engine": "",
    "bench adapters": "",
    "bench speculation": "",
    "bench tasks": "",
    "bench task-data": "",
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


HELP_OF_ALL = """
import sys
from qsun.cli.main import main
for command in sys.argv[1:]:
    sys.argv = ["qsun", *command.split(), "--help"]
    try:
        main()
    except SystemExit as leave:
        assert leave.code in (None, 0), command
    loaded = {"torch", "transformers", "numpy", "numba", "matplotlib"} & set(sys.modules)
    assert not loaded, f"qsun {command} --help imports {loaded}"
"""


def test_help_imports_nothing_heavy():
    commands = ["", "bench", *COMMANDS]
    line = [sys.executable, "-c", HELP_OF_ALL, *commands]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_help_takes_less_than_a_second():
    """Of the processor's time: other work on the machine must not decide."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "qsun.cli.main", "--help"], capture_output=True, check=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
