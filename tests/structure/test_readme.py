"""The README is true: its commands run, its make targets exist, its links point somewhere."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.places import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines() if line.strip()]


@pytest.mark.slow
def test_commands_and_python_run(tmp_path):
    ran = [line for line in COMMANDS if line.startswith("qsun ")]
    assert len(ran) >= 4
    for line in ran:
        command = [sys.executable, "-m", "qsun.cli.main", *shlex.split(line, comments=True)[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    for kind, body in BLOCKS:
        if kind == "python":
            subprocess.run([sys.executable, "-c", body], cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "out/demo-int4/errors.png").stat().st_size > 10_000


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in COMMANDS if line.startswith("make ") for word in shlex.split(line, comments=True)[1:]}
    named |= set(re.findall(r"`make (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert named
    assert named <= targets


def test_ci_runs_the_readmes_test_command():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target
