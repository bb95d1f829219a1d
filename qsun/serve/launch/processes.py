"""Worker processes of a launch: started with a log each, waited for, watched, and ended without leaving any behind."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx

from qsun.errors import QsunError
from qsun.serve.launch import signals as launch_signals
from qsun.serve.launch.plan import WorkerCommand
from qsun.serve.launch.warden import GRACE_SECONDS, end_groups

LAST_LINES = 12
_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 2.0
_TELL_SECONDS = 5.0
_READ_BYTES = 1 << 16


@dataclass
class WorkerProcess:
    """A started worker. dead: it was found to have ended by itself."""

    command: WorkerCommand
    process: subprocess.Popen[bytes]
    log: Path
    ready: bool = False
    dead: bool = False

    def death(self) -> str:
        """One line: how it ended and where to look; the end of its log is in `last_lines`."""
        return (
            f"worker {self.command.name} (pid {self.process.pid}) {_ending(self.process.returncode)}; log: {self.log}"
        )


class WorkerProcesses:
    """A context manager: workers are started on entry and none is left on exit, whatever happens in between.

    Each is a process group of its own, so that Ctrl-C in a terminal reaches the launcher only and a worker's own
    children end with it. A warden ends them all if this process is killed.

    Args:
        commands: what to start.
        logs: directory, made where it is absent; a log is NAME.log and is written anew.
        environment: that every worker gets, under what its command sets.
    """

    def __init__(self, commands: Sequence[WorkerCommand], logs: Path, environment: Mapping[str, str]):
        self._commands, self._logs, self._environment = commands, logs, dict(environment)
        self.workers: list[WorkerProcess] = []
        self._warden: subprocess.Popen[str] | None = None

    def __enter__(self) -> "WorkerProcesses":
        self._logs.mkdir(parents=True, exist_ok=True)
        warden = [sys.executable, "-m", "qsun.serve.launch.warden"]
        self._warden = subprocess.Popen(warden, stdin=subprocess.PIPE, text=True, start_new_session=True)  # noqa: S603
        try:
            for command in self._commands:
                self._start(command)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, command: WorkerCommand) -> None:
        log = self._logs / f"{command.name}.log"
        environment = self._environment | command.environment
        with open(log, "wb") as out:
            try:
                process = subprocess.Popen(  # noqa: S603 - an argument list made by launch_plan, no shell
                    command.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise QsunError(f"{command.argv[0]} cannot be run: {error.strerror}; see launch.python") from None
        self.workers.append(WorkerProcess(command, process, log))  # first: it must be ended, should the warden be gone
        self._tell_warden("+", process.pid)

    def _tell_warden(self, sign: str, pid: int) -> None:
        assert self._warden is not None and self._warden.stdin is not None
        try:
            self._warden.stdin.write(f"{sign}{pid}\n")
            self._warden.stdin.flush()
        except BrokenPipeError:
            raise QsunError("the process that ends workers in an emergency was killed; start again") from None

    def wait_until_ready(self, seconds: float, tell: Callable[[str], None]) -> None:
        """Return once every worker answers /health and serves its name.

        Args:
            tell: called now and then with what is waited for.
        Raises:
            QsunError: a worker ended, or the time is over.
        """
        started = told = time.monotonic()
        with httpx.Client(timeout=_ANSWER_SECONDS, trust_env=False) as client:
            while True:
                for worker in self.workers:
                    worker.ready = worker.ready or _serves(client, worker.command)
                self._raise_for_death()
                waiting = [worker.command.name for worker in self.workers if not worker.ready]
                now = time.monotonic()
                if not waiting:
                    return
                if now - started > seconds:
                    raise QsunError(
                        f"{', '.join(waiting)} not ready after {seconds:g} s; look into {self._logs}, or raise "
                        "launch.start_seconds"
                    )
                if now - told >= _TELL_SECONDS:
                    told = now
                    tell(f"{now - started:.0f} s: waiting for {', '.join(waiting)}")
                time.sleep(_LOOK_SECONDS)

    def _raise_for_death(self) -> None:
        for worker in self.newly_dead():
            raise WorkerDied(worker)

    def newly_dead(self) -> list[WorkerProcess]:
        """Workers that ended by themselves since the last call."""
        found = [worker for worker in self.workers if not worker.dead and worker.process.poll() is not None]
        for worker in found:
            worker.dead = True
        return found

    def stop(self) -> None:
        """End all workers: SIGTERM, and SIGKILL after a while. Returns when none is left.

        Signals are ignored meanwhile: a second Ctrl-C would end the launcher before its workers.
        """
        with launch_signals.ignored():
            self._stop()

    def _stop(self) -> None:
        end_groups_of([worker.process for worker in self.workers])
        if self._warden is None or self._warden.stdin is None:
            return
        try:
            for worker in self.workers:
                self._warden.stdin.write(f"-{worker.process.pid}\n")
            self._warden.stdin.close()
        except BrokenPipeError:  # it was killed; there is nothing left that it could end
            pass
        self._warden.wait(timeout=2 * GRACE_SECONDS)
        self._warden = None


class WorkerDied(QsunError):
    """A worker ended by itself. worker: which."""

    def __init__(self, worker: WorkerProcess):
        super().__init__(worker.death())
        self.worker = worker


def end_groups_of(processes: Sequence[subprocess.Popen[bytes]], grace_seconds: float = GRACE_SECONDS) -> None:
    """End the process groups that these processes lead, reaping the leaders so that a group can be seen to be gone."""
    reapers = [threading.Thread(target=process.wait, daemon=True) for process in processes]
    for reaper in reapers:
        reaper.start()
    end_groups([process.pid for process in processes], grace_seconds)
    for reaper in reapers:
        reaper.join(grace_seconds)


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """The end of a log."""
    with open(log, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _READ_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()[-count:]


def _serves(client: httpx.Client, command: WorkerCommand) -> bool:
    try:
        if client.get(f"{command.url}/health").status_code != 200:
            return False
        models = client.get(f"{command.url}/v1/models").json()["data"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False
    return any(model.get("id") == command.served_name for model in models)


def _ending(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
