"""Programs of a language model: right ones pass, wrong and harmful ones fail, and nothing outside changes."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qsun.eval.tasks.sandbox import Outcome, SandboxLimits, run_program

PATIENT = SandboxLimits(cpu_seconds=20, wall_seconds=120)  # for programs that end by themselves, on a busy machine too


FOREVER = "while True:\n    pass"


def run(text, limits=PATIENT):
    return run_program(textwrap.dedent(text), limits)


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "from typing import List\nimport math, re, collections, heapq, hashlib\nassert math.gcd(4, 6) == 2",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1).x == 1",
        "print('x' * 1000)\nimport sys\nprint('y', file=sys.stderr)",
        "print = os = None",
        "if __name__ == '__main__':\n    raise SystemExit",
        "import numpy\nassert numpy.arange(4).sum() == 6",
        "",
    ],
)
def test_what_reaches_its_end_passes(program):
    if "numpy" in program:
        pytest.importorskip("numpy")
    assert run_program(program, PATIENT) == Outcome(True)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "left before its end"),
        ("raise SystemExit", "left before its end"),
        ("import os\nos._exit(0)", "left before its end"),
        ("quit()", "left before its end"),
        ("print('passed')\nraise KeyboardInterrupt", "KeyboardInterrupt"),
        (FOREVER, "left before its end"),
        ("import time\ntime.sleep(60)", "ran for more than 1 seconds"),
        ("x = [0]\nwhile True:\n    x += x", "MemoryError"),
        ("x = 'a' * (8 << 30)", "MemoryError"),
        ("while True:\n    print('x' * 1000)", "wrote more than 65536 bytes"),
        ("input()", "EOFError"),
        ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)", "left before its end"),
        ("import os\nwhile True:\n    os.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import os\nos.system('true')", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import shutil\nshutil.rmtree('/')", "PermissionError"),
    ],
)
def test_what_does_not_fails(program, says):
    cpu_seconds = 1 if program == FOREVER else 20
    wall_seconds = 1 if "sleep" in program else 120
    limits = SandboxLimits(cpu_seconds, wall_seconds, memory_bytes=1 << 28)
    outcome = run_program(program, limits)
    assert not outcome.passed
    assert says in outcome.reason


def test_a_fork_bomb_that_reaches_around_ends_with_the_program():
    marker = f"bomb-{os.getpid()}"
    program = f"""
        import ctypes, time
        libc = ctypes.CDLL(None)
        libc.prctl(15, b"{marker}", 0, 0, 0)  # their name
        for _ in range(5):  # 32 processes, where nothing bounds them
            libc.fork()
        time.sleep(60)
    """
    assert "ran for more than 2" in run(program, SandboxLimits(cpu_seconds=1, wall_seconds=2, processes=8)).reason
    deadline = time.monotonic() + 120
    while running(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(marker)


def running(name):
    """Processes of this name, except zombies."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it ended meanwhile
            text = status.read_text()
            if f"Name:\t{name}\n" in text and "State:\tZ" not in text:
                found.append(status)
    return found


def test_files_are_not_written(tmp_path):
    tmp_path.chmod(0o777)  # so that not the owner's rights but the sandbox prevents it
    victim = tmp_path / "victim"
    victim.write_text("unharmed")
    victim.chmod(0o666)
    for program in (
        f"open({str(victim)!r}, 'w').write('x')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"open({str(tmp_path / 'new')!r}, 'w').write('x' * 100)",
        f"import os\nos.remove({str(victim)!r})",
        f"import pathlib\npathlib.Path({str(victim)!r}).unlink()",
        "open('here', 'w').write('x' * 100)",
        f"import ctypes\nassert ctypes.CDLL(None).unlink({str(victim).encode()!r}) == 0",
        f"import ctypes\nassert ctypes.CDLL(None).truncate({str(victim).encode()!r}, 0) == 0",
    ):
        if "ctypes" in program and not landlock():
            continue
        assert not run_program(program, PATIENT).passed, program
        assert [p.name for p in tmp_path.iterdir() if p.stat().st_size] == ["victim"]
        if landlock():
            assert victim.read_text() == "unharmed"
            assert [p.name for p in tmp_path.iterdir()] == ["victim"]


def landlock():
    ask = "import ctypes, sys; sys.exit(ctypes.CDLL(None).syscall(444, None, 0, 1) < 3)"
    return sys.platform == "linux" and subprocess.run([sys.executable, "-c", ask], check=False).returncode == 0


def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        subprocess.run([sys.executable, "-c", connect], check=True)  # without the sandbox it goes through
        if not landlock():
            pytest.skip("this system does not let a process give up its network")
        assert not run_program(connect, PATIENT).passed


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    assert run("import os\nassert 'SECRET_OF_THE_USER' not in os.environ\nassert os.listdir() == []").passed
    assert run("import os, sys\nassert len(os.environ) <= 2, os.environ\nassert len(sys.argv) == 1").passed


def works_for_nobody(python):
    try:
        return subprocess.run([python, "-c", "import json"], check=False, user="nobody").returncode == 0
    except OSError:
        return False


def test_root_is_left(monkeypatch):
    pythons = [
        python for python in (sys.executable, "/usr/bin/python3") if os.geteuid() == 0 and works_for_nobody(python)
    ]
    if not pythons:
        pytest.skip("not started by root, or no Python that others can read")
    monkeypatch.setattr(sys, "executable", pythons[0])
    assert "PermissionError" in run("open('/etc/shadow').read()").reason
    assert run("import os\nassert os.getuid() == os.geteuid() != 0").passed
    bomb = "import ctypes\nassert all(ctypes.CDLL(None).fork() >= 0 for _ in range(6))"
    assert not run(bomb, SandboxLimits(processes=4, wall_seconds=120)).passed
