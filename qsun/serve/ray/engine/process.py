"""A replica's vLLM server as a process: started with a log, awaited, watched, and ended with the replica."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from qsun.errors import QsunError
from qsun.serve.ray.engine import watchdog
from qsun.serve.ray.engine.command import EngineCommand
from qsun.serve.ray.engine.logs import drop_old_logs, hold_log, log_directory

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 2.0
_GONE_SECONDS = 2.0  # that processes which were killed may take to be gone
_LAST_LINES = 12
_READ_BYTES = 1 << 16


class EngineProcess:
    """A vLLM server, started and ready. A watchdog process (watchdog.py) ends it if this process is killed.

    Args:
        command: its command. logs: directory for its log; None: the default one. seconds: until it must answer.
        on_death: called, in a thread, with a line that says how it ended if it ends by itself.
    Raises:
        QsunError: its log cannot be written, it ended, with the last lines of its log, or it does not answer in time.
    """

    def __init__(self, command: EngineCommand, logs: str | None, seconds: float, on_death: Callable[[str], None]):
        directory = log_directory(logs)
        self._command, self._on_death = command, on_death
        self._path = directory / f"{command.name}.log"
        self._log = hold_log(self._path)
        drop_old_logs(directory, command.name.rpartition("-")[0])
        self._watchdog = subprocess.Popen(  # noqa: S603 - an argument list, no shell
            [sys.executable, "-I", watchdog.__file__], stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        try:
            self._tell_watchdog()
            self._wait_until_ready(seconds)
        except BaseException as error:
            self._end()
            raise QsunError("\n".join([str(error), *last_lines(self._path)])) from None
        self._ending = threading.Event()
        threading.Thread(target=self._watch, name="watch vLLM", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process group of the server."""
        return self._watchdog.pid

    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL after the grace period. Blocks until it is gone."""
        self._ending.set()
        self._end()

    def _tell_watchdog(self) -> None:
        assert self._watchdog.stdin is not None
        # Ray's token, by which code can be run here, is none of vLLM's business
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_TOKEN")}
        started = {"argv": self._command.argv, "environment": inherited | self._command.environment}
        with contextlib.suppress(BrokenPipeError):  # it was killed, which waiting for the server finds out
            self._watchdog.stdin.write(json.dumps(started).encode() + b"\n")
            self._watchdog.stdin.flush()

    def _wait_until_ready(self, seconds: float) -> None:
        """Return once the server answers /health and lists all of its names."""
        deadline = time.monotonic() + seconds
        with httpx.Client(timeout=_ANSWER_SECONDS, trust_env=False) as client:
            while True:
                answers = _serves(client, self._command)
                if self._watchdog.poll() is not None:  # also if another one has taken the port, and answers there
                    raise QsunError(self._death())
                if answers:
                    return
                if time.monotonic() > deadline:
                    raise QsunError(
                        f"{self._command.name} is not ready after {seconds:g} s; read {self._path}, or raise "
                        "launch.start_seconds"
                    )
                time.sleep(_POLL_SECONDS)

    def _watch(self) -> None:
        while not self._ending.wait(_POLL_SECONDS):
            if self._watchdog.poll() is not None:
                self._kill()
                for line in last_lines(self._path):
                    logger.error("    %s", line)
                self._on_death(self._death())
                return

    def _death(self) -> str:
        code = self._watchdog.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{self._command.name} (process group {self.pid}) {how}; log: {self._path}"

    def _end(self) -> None:
        assert self._watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(2 * watchdog.GRACE_SECONDS)
        self._kill()
        self._watchdog.wait()
        deadline = time.monotonic() + _GONE_SECONDS  # in a container nobody may reap them
        while self._is_left() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self._log.close()

    def _kill(self) -> None:
        """Kill what the watchdog may have left: it could have been killed itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._watchdog.pid, signal.SIGKILL)

    def _is_left(self) -> bool:
        """Return whether any process of the group is there."""
        try:
            os.killpg(self._watchdog.pid, 0)
        except ProcessLookupError:
            return False
        return True


def last_lines(log: Path) -> list[str]:
    """Return the end of a log."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _READ_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()[-_LAST_LINES:]


def _serves(client: httpx.Client, command: EngineCommand) -> bool:
    try:
        if client.get(f"{command.url}/health").status_code != 200:
            return False
        models = client.get(f"{command.url}/v1/models").json()["data"]
        return {command.served_name, *command.adapters} <= {model.get("id") for model in models}
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
        return False
