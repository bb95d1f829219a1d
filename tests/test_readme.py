"""The README is true: its commands run, its make targets and extras exist, its links point somewhere."""

import json
import re
import shlex
import signal
import subprocess
import sys

import httpx
import pytest

from tests.places import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(<!-- not run.*?-->\n)?```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for skip, kind, body in BLOCKS if kind == "sh" and not skip for line in body.splitlines() if line]
HANGS = 3600  # seconds: only against a test that never ends


@pytest.mark.slow
def test_commands_and_python_run(cli, tmp_path, monkeypatch, pictures):
    """In this process, as each start takes seconds; the server is one of its own."""
    monkeypatch.chdir(tmp_path)
    ran = [shlex.split(line, comments=True)[1:] for line in COMMANDS if line.startswith("qsun ")]
    assert len(ran) >= 6
    for arguments in ran:
        if arguments[0] == "serve":
            answers_and_ends([sys.executable, "-m", "qsun.cli.main", *arguments])
        else:
            answer = cli(*arguments)
            assert answer.code == 0, f"{arguments}\n{answer.err}"
    for _, kind, body in BLOCKS:
        if kind == "python":
            exec(compile(body, "README.md", "exec"), {})  # noqa: S102
    assert (tmp_path / "out/demo-int4/errors.png").stat().st_size > 10_000


def answers_and_ends(command):
    """Start the server on a free port, ask what the README's curl asks, and stop it with Ctrl-C."""
    request = shlex.split(next(line for line in COMMANDS if line.startswith("curl ")))
    path, body = request[1].partition(":8000")[2], request[-1].encode()
    server = subprocess.Popen([*command, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"]
        answer = httpx.post(url + path, content=body, headers={"Content-Type": "application/json"}, timeout=HANGS)
        assert answer.json()["choices"][0]["text"]
        server.send_signal(signal.SIGINT)
        assert server.wait(HANGS) == 0
    finally:
        server.kill()
        server.stdout.close()


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in COMMANDS if line.startswith("make ") for word in shlex.split(line, comments=True)[1:]}
    named |= set(re.findall(r"`make (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert named
    assert named <= targets


def test_extras_exist():
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = {extra for group in re.findall(r"[`.]\[([a-z,]+)\][`']", README) for extra in group.split(",")}
    assert {"serve", "eval"} <= named <= set(extras)


def test_ci_runs_the_readmes_test_command():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert len(targets) > 20 or page != "README.md"
    for target in targets:
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target
