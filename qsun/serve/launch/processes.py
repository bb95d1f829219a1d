"""Worker processes of `qsun up`: start them with a log each, wait for them, watch them, and end them all."""

import contextlib
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
from qsun.serve.launch.watchdog import GRACE_SECONDS, end_groups

LAST_LINES = 12
_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 2.0
_REPORT_SECONDS = 5.0
_READ_BYTES = 1 << 16


@dataclass
class WorkerProcess:
    """A started worker. dead: it ended by itself, and was reported."""

    command: WorkerCommand
    process: subprocess.Popen[bytes]
    log: Path
    ready: bool = False
    dead: bool = False

    def death(self) -> str:
        """Return one line that says how it ended and where its log is."""
        return (
            f"worker {self.command.name} (pid {self.process.pid}) {_ending(self.process.returncode)}; log: {self.log}"
        )


class WorkerProcesses:
    """A context manager that starts workers on entry and ends all of them on exit.

    Each worker leads a process group, so that Ctrl-C in a terminal reaches the launcher only and a worker's own
    children end with it. A watchdog process ends them all if this process is killed.

    Args:
        commands: one for each worker.
        logs: directory of the logs, NAME.log each; created if missing.
        environment: of every worker; the variables of its command take precedence.
    """

    def __init__(self, commands: Sequence[WorkerCommand], logs: Path, environment: Mapping[str, str]):
        self._commands, self._logs, self._environment = commands, logs, dict(environment)
        self.workers: list[WorkerProcess] = []
        self._watchdog: subprocess.Popen[str] | None = None

    def __enter__(self) -> "WorkerProcesses":
        self._logs.mkdir(parents=True, exist_ok=True)
        watchdog = [sys.executable, "-m", "qsun.serve.launch.watchdog"]
        self._watchdog = subprocess.Popen(watchdog, stdin=subprocess.PIPE, text=True, start_new_session=True)  # noqa: S603
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
        # a signal between the start of a process and its record here would leave the process behind
        with open(log, "wb") as out, launch_signals.deferred():
            try:
                process = subprocess.Popen(  # noqa: S603 - an argument list made by plan_workers, no shell
                    command.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise QsunError(f"{command.argv[0]} cannot be run: {error.strerror}; check launch.python") from None
            self.workers.append(WorkerProcess(command, process, log))  # first: `stop` must know it in any case
            self._tell_watchdog("+", process.pid)

    def _tell_watchdog(self, sign: str, pid: int) -> None:
        assert self._watchdog is not None and self._watchdog.stdin is not None
        try:
            self._watchdog.stdin.write(f"{sign}{pid}\n")
            self._watchdog.stdin.flush()
        except BrokenPipeError:
            raise QsunError("the watchdog process of the workers was killed; start again") from None

    def wait_until_ready(self, seconds: float, report: Callable[[str], None]) -> None:
        """Return once every worker answers /health and serves its name.

        Args:
            report: called every few seconds with a line of progress.
        Raises:
            QsunError: a worker ended, or the time is up.
        """
        started = reported = time.monotonic()
        with httpx.Client(timeout=_ANSWER_SECONDS, trust_env=False) as client:
            while True:
                for worker in self.workers:
                    worker.ready = worker.ready or _serves(client, worker.command)
                for worker in self.newly_dead():
                    raise WorkerDied(worker)
                waiting = [worker.command.name for worker in self.workers if not worker.ready]
                now = time.monotonic()
                if not waiting:
                    return
                if now - started > seconds:
                    raise QsunError(
                        f"{', '.join(waiting)} not ready after {seconds:g} s; read the logs in {self._logs}, or raise "
                        "launch.start_seconds"
                    )
                if now - reported >= _REPORT_SECONDS:
                    reported = now
                    report(f"{now - started:.0f} s: waiting for {', '.join(waiting)}")
                time.sleep(_POLL_SECONDS)

    def newly_dead(self) -> list[WorkerProcess]:
        """Return the workers that ended by themselves since the last call."""
        found = [worker for worker in self.workers if not worker.dead and worker.process.poll() is not None]
        for worker in found:
            worker.dead = True
        return found

    def stop(self) -> None:
        """End all workers: SIGTERM, and SIGKILL after the grace period. Return when none is left.

        Signals are ignored meanwhile: a second Ctrl-C would end the launcher before its workers.
        """
        with launch_signals.restored():
            launch_signals.ignore()
            end_groups_of([worker.process for worker in self.workers])
            if self._watchdog is None or self._watchdog.stdin is None:
                return
            with contextlib.suppress(BrokenPipeError):  # it was killed, and has nothing left to end
                self._watchdog.stdin.writelines(f"-{worker.process.pid}\n" for worker in self.workers)
                self._watchdog.stdin.close()
            self._watchdog.wait(timeout=2 * GRACE_SECONDS)
            self._watchdog = None


class WorkerDied(QsunError):
    """A worker ended by itself."""

    def __init__(self, worker: WorkerProcess):
        super().__init__(worker.death())
        self.worker = worker


def end_groups_of(processes: Sequence[subprocess.Popen[bytes]], grace_seconds: float = GRACE_SECONDS) -> None:
    """End the process groups that these processes lead. The leaders are reaped, or their groups would seem to exist."""
    reapers = [threading.Thread(target=process.wait, daemon=True) for process in processes]
    for reaper in reapers:
        reaper.start()
    end_groups([process.pid for process in processes], grace_seconds)
    for reaper in reapers:
        reaper.join(grace_seconds)


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """Return the end of a log."""
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
    return {command.served_name, *command.adapters} <= {model.get("id") for model in models}


def _ending(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
