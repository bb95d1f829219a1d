"""Worker processes, with real processes in place of vLLM: started, awaited, watched, and none left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qsun.errors import QsunError
from qsun.serve.launch import signals as launch_signals
from qsun.serve.launch.plan import WorkerCommand, free_ports
from qsun.serve.launch.processes import WorkerDied, WorkerProcesses, last_lines
from qsun.serve.launch.watchdog import watched_groups

FAKE = Path(__file__).with_name("fake_worker.py")
DEADLINE_SECONDS = 60


def command(name, mode="serve"):
    port = free_ports(1)[0]
    argv = (sys.executable, str(FAKE), mode, "--port", str(port), "--served-model-name", name)
    return WorkerCommand(name, None, argv, {"QSUN_TEST": f"set for {name}"}, f"http://127.0.0.1:{port}", name)


def workers(tmp_path, *commands):
    return WorkerProcesses(commands, tmp_path / "logs", os.environ)


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


def test_ready_workers_are_ended_on_exit(tmp_path):
    with workers(tmp_path, command("one"), command("two")) as started:
        started.wait_until_ready(DEADLINE_SECONDS, lambda _: None)
        pids = [worker.process.pid for worker in started.workers]
        assert all(map(alive, pids))
        assert started.newly_dead() == []
    assert not any(map(alive, pids))
    assert (tmp_path / "logs" / "two.log").read_text() == "worker serve set for two\n"


def test_a_worker_that_dies_while_waited_for(tmp_path):
    one_line = r"^worker bad \(pid \d+\) ended with code 1; log: .*bad.log$"
    both = workers(tmp_path, command("good"), command("bad", "die"))
    with pytest.raises(WorkerDied, match=one_line) as died, both as started:
        started.wait_until_ready(DEADLINE_SECONDS, lambda _: None)
    assert last_lines(died.value.worker.log)[-1] == "no such kernel"
    assert not any(alive(worker.process.pid) for worker in started.workers)


def test_a_worker_that_never_answers(tmp_path):
    lines = []
    one_line = r"^slow not ready after 6 s; read the logs in .*logs, or raise launch.start_seconds$"
    with pytest.raises(QsunError, match=one_line), workers(tmp_path, command("slow", "deaf")) as started:
        started.wait_until_ready(6, lines.append)
    assert lines == ["5 s: waiting for slow"]


def test_a_worker_that_serves_another_name_is_not_ready(tmp_path):
    wrong = command("served")
    wrong = WorkerCommand(wrong.name, None, wrong.argv, wrong.environment, wrong.url, "another")
    with pytest.raises(QsunError, match="served not ready"), workers(tmp_path, wrong) as started:
        started.wait_until_ready(2, lambda _: None)


def test_a_worker_that_dies_later_is_reported_once(tmp_path):
    with workers(tmp_path, command("one"), command("two")) as started:
        started.wait_until_ready(DEADLINE_SECONDS, lambda _: None)
        victim = started.workers[0]
        victim.process.kill()
        wait_for(lambda: victim.process.poll() is not None)
        assert started.newly_dead() == [victim]
        assert started.newly_dead() == []
        assert "was killed by signal 9" in victim.death()


def test_a_command_that_cannot_be_run(tmp_path):
    missing = WorkerCommand("gone", None, ("/nowhere/python",), {}, "http://127.0.0.1:1", "gone")
    one_line = r"^/nowhere/python cannot be run: No such file.*; check launch.python$"
    with pytest.raises(QsunError, match=one_line), workers(tmp_path, missing):
        pytest.fail("nothing is to be entered")


def test_a_worker_is_ended_even_if_the_watchdog_was_killed_before_it_knew(tmp_path):
    class Unguarded(WorkerProcesses):
        def _start(self, command):
            self._watchdog.kill()
            self._watchdog.wait()
            super()._start(command)

    unguarded = Unguarded([command("one")], tmp_path / "logs", os.environ)
    with pytest.raises(QsunError, match="the watchdog process of the workers was killed; start again"), unguarded:
        pytest.fail("nothing is to be entered")
    (worker,) = unguarded.workers
    assert not alive(worker.process.pid)


def test_an_interrupt_in_the_midst_of_a_start_leaves_no_worker(tmp_path, monkeypatch):
    pids, start = [], subprocess.Popen

    def interrupted(argv, **more):
        process = start(argv, **more)
        if str(FAKE) in argv:
            pids.append(process.pid)
            signal.raise_signal(signal.SIGINT)  # before the caller has the process
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt), launch_signals.restored():
        launch_signals.interrupt_start()
        with workers(tmp_path, command("one"), command("two")):
            pytest.fail("nothing is to be entered")
    assert len(pids) == 1
    assert not alive(pids[0])


def test_signals_are_as_they_were_after_a_stop(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with workers(tmp_path, command("one")):
        pass
    assert [signal.getsignal(number) for number in numbers] == before


LAUNCHER = """
import os, sys
from pathlib import Path
from tests.serve.launch.test_processes import command
from qsun.serve.launch.processes import WorkerProcesses
with WorkerProcesses([command("one", "stubborn")], Path(sys.argv[1]), os.environ) as started:
    started.wait_until_ready(60, print)
    print(started.workers[0].process.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_workers_end_when_the_launcher_is_killed(tmp_path):
    """The launcher cannot handle SIGKILL; the watchdog ends worker and grandchild, though both ignore SIGTERM."""
    run = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    launcher = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with launcher:
        worker = int(launcher.stdout.readline())
        child = int((tmp_path / "one.log").read_text().split()[-1])
        assert alive(worker)
        assert alive(child)
        launcher.send_signal(signal.SIGKILL)
        wait_for(lambda: not alive(worker) and not alive(child))


def test_the_watchdog_forgets_groups_that_were_ended():
    assert watched_groups(["+3\n", "+4\n", "-3\n"]) == {4}
