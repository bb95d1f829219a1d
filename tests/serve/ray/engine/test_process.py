"""A replica's server, with real processes in place of vLLM: started, awaited, watched, and none left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsun.errors import QsunError
from qsun.serve.ray.engine import process
from qsun.serve.ray.engine.command import EngineCommand, free_ports
from qsun.serve.ray.engine.process import EngineProcess, last_lines

FAKE = Path(__file__).with_name("fake_server.py")
NAME = "decode-0123abcd"
DEADLINE_SECONDS = 60
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def command(mode="serve", served="qsun-d", asked="qsun-d", python=sys.executable):
    port = free_ports(1)[0]
    argv = (python, str(FAKE), mode, "--port", str(port), "--served-model-name", served)
    return EngineCommand(NAME, argv, {"QSUN_TEST": "set"}, f"http://127.0.0.1:{port}", asked)


@contextmanager
def engine(tmp_path, mode="serve", deaths=None):
    """A ready server; gives it, and the pids that its log names."""
    running = EngineProcess(
        command(mode), str(tmp_path), DEADLINE_SECONDS, (deaths if deaths is not None else []).append
    )
    try:
        yield running, pids(tmp_path)
    finally:
        running.stop()


def pids(tmp_path):
    lines = (tmp_path / f"{NAME}.log").read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith(("server", "child"))]


def alive(pid):
    """Whether a process runs; a dead one that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_and_its_children_are_ended(tmp_path):
    with engine(tmp_path, "parent") as (running, processes):
        assert len(processes) == 2
        assert all(map(alive, processes))
        assert os.getpgid(processes[0]) == running.pid != os.getpgid(0)
    assert not any(map(alive, [*processes, running.pid]))
    assert (tmp_path / f"{NAME}.log").read_text().splitlines()[0].endswith("set")


def test_it_does_not_get_the_token_of_ray(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secret")
    monkeypatch.setenv("TEST_OTHER", "passed on")
    with engine(tmp_path) as (_, (server,)):
        environment = Path(f"/proc/{server}/environ").read_text()
    assert "TEST_OTHER=passed on" in environment
    assert "RAY_AUTH_TOKEN" not in environment


def test_a_server_that_dies_while_another_one_answers_at_its_port(tmp_path, monkeypatch):
    watchdogs = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            watchdogs.append(self.pid)

    def answers(*_):
        wait_for(lambda: not alive(watchdogs[0]))
        return True

    monkeypatch.setattr(process.subprocess, "Popen", Popen)
    monkeypatch.setattr(process, "_serves", answers)
    with pytest.raises(QsunError, match="ended with code 1"):
        EngineProcess(command("die"), str(tmp_path), DEADLINE_SECONDS, print)


def test_its_signals_are_not_ignored(tmp_path):
    """vLLM drains upon SIGTERM, so it must not inherit what its watchdog does with signals."""
    with engine(tmp_path) as (_, (server,)):
        ignored = next(line for line in Path(f"/proc/{server}/status").read_text().splitlines() if "SigIgn" in line)
    assert not int(ignored.split()[1], 16) & (1 << (signal.SIGTERM - 1) | 1 << (signal.SIGHUP - 1))


def test_a_server_that_dies_while_waited_for(tmp_path):
    message = rf"^{NAME} \(process group \d+\) ended with code 1; log: .*{NAME}.log\n(.*\n)?no such kernel$"
    with pytest.raises(QsunError, match=message):
        EngineProcess(command("die"), str(tmp_path), DEADLINE_SECONDS, print)
    assert not any(map(alive, pids(tmp_path)))


def test_a_server_that_never_answers(tmp_path):
    with pytest.raises(QsunError, match=rf"^{NAME} is not ready after 9 s; read .*, or raise launch.start_seconds\n"):
        EngineProcess(command("deaf"), str(tmp_path), 9.0, print)
    assert not any(map(alive, pids(tmp_path)))


def test_a_server_of_another_name_is_not_ready(tmp_path):
    with pytest.raises(QsunError, match="is not ready"):
        EngineProcess(command(asked="another"), str(tmp_path), 2.0, print)


def test_a_command_that_cannot_be_run(tmp_path):
    with pytest.raises(QsunError, match=r"code 127(.|\n)*/nowhere/python cannot be run: No such file.*launch.python$"):
        EngineProcess(command(python="/nowhere/python"), str(tmp_path), DEADLINE_SECONDS, print)


def test_a_server_that_dies_later_is_reported_once_and_leaves_no_child(tmp_path):
    deaths = []
    with engine(tmp_path, "parent", deaths) as (_, processes):
        os.kill(processes[0], signal.SIGKILL)
        wait_for(lambda: deaths)
        assert "was killed by signal 9; log: " in deaths[0]
        wait_for(lambda: not any(map(alive, processes)))
    assert len(deaths) == 1


def test_a_watchdog_that_is_killed_takes_the_server_along(tmp_path):
    deaths = []
    with engine(tmp_path, "stubborn", deaths) as (running, processes):
        os.kill(running.pid, signal.SIGKILL)
        wait_for(lambda: deaths)
        wait_for(lambda: not any(map(alive, processes)))


REPLICA = """
import sys
from tests.serve.ray.engine.test_process import *
running = EngineProcess(command("stubborn"), sys.argv[1], 60, print)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("children_first", [False, True])
def test_servers_end_when_the_replica_is_killed(tmp_path, children_first):
    """The replica cannot handle SIGKILL; the watchdog ends server and child, though both ignore SIGTERM.

    Where a node dies, Ray first kills the children of the replica.
    """
    run = [sys.executable, "-c", REPLICA, str(tmp_path)]
    replica = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with replica:
        assert replica.stdout.readline() == "ready\n"
        processes = pids(tmp_path)
        assert all(map(alive, processes))
        if children_first:
            replica.send_signal(signal.SIGSTOP)
            for child in Path(f"/proc/{replica.pid}/task/{replica.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        replica.send_signal(signal.SIGKILL)
        wait_for(lambda: not any(map(alive, processes)))


def test_the_last_lines_of_a_long_log(tmp_path):
    (tmp_path / "log").write_text("".join(f"{number}\n" for number in range(100_000)))
    assert last_lines(tmp_path / "log") == [str(number) for number in range(99_988, 100_000)]
