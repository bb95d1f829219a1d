"""Where logs go: what our modules log, to Serve's own; what vLLM writes, to a file of each replica."""

import contextlib
import fcntl
import logging
import os
import re
import stat
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from qsun.errors import QsunError

KEPT = 10
_POLL_SECONDS = 0.1
_SERVES = "ray.serve"
_REPLICA = "[a-z0-9]{8}"  # an id of Serve


def log_to_serve() -> None:
    """Send our messages to the log of this replica, with the id of the request that they are about.

    A replica sets up handlers for Serve's logger only.
    """
    own, serves = logging.getLogger("qsun"), logging.getLogger(_SERVES)
    own.handlers = list(serves.handlers)
    own.setLevel(serves.level)
    own.propagate = False


def log_directory(chosen: str | None) -> Path:
    """Return the directory for vLLM's logs on this node, made if it is missing.

    vLLM may log prompts. None: a directory of this user alone, as other users also write where temporary files are.

    Raises:
        QsunError: it cannot be made, or the default one is there and others can read it or own it.
    """
    directory = Path(chosen or Path(tempfile.gettempdir()) / f"qsun-logs-{os.getuid()}")
    try:
        directory.mkdir(mode=0o777 if chosen else 0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise _unusable(directory, error) from None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    if not chosen and not private:
        raise QsunError(f"{directory}, for logs, is open to other users; remove it, or set ray.logs to another one")
    return directory


def hold_log(log: Path) -> BinaryIO:
    """Create a log. As long as what is returned is open, it counts as in use.

    Raises:
        QsunError: it cannot be written.
    """
    try:
        file = log.open("ab")
    except OSError as error:
        raise _unusable(log, error) from None
    with contextlib.suppress(OSError):  # some network file systems have no locks
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def logs_in_use(directory: Path) -> frozenset[Path]:
    """Return the logs of this directory that servers write to."""
    return frozenset(filter(_in_use, directory.glob("*.log")))


def wait_until_unused(directory: Path, seconds: float, others: frozenset[Path] = frozenset()) -> None:
    """Return once no server writes to a log of this directory any more, or after this time. others: not to wait for."""
    deadline = time.monotonic() + seconds
    while logs_in_use(directory) - others and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _in_use(log: Path) -> bool:
    try:
        with log.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it is gone, or has no locks
        return False
    return False


def drop_old_logs(directory: Path, pool: str) -> None:
    """Remove the logs of a pool's replicas, POOL-ID.log, except for the newest KEPT and those in use."""
    name = re.compile(rf"{re.escape(pool)}-{_REPLICA}\.log")
    logs = sorted((log for log in directory.iterdir() if name.fullmatch(log.name)), key=_written, reverse=True)
    for log in logs[KEPT:]:
        with contextlib.suppress(OSError), log.open("ab") as file:  # in use, or another replica has removed it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.unlink()


def _written(log: Path) -> float:
    try:
        return log.stat().st_mtime
    except OSError:
        return 0.0


def _unusable(path: Path, error: OSError) -> QsunError:
    return QsunError(f"logs cannot be written to {path}: {error.strerror}; set ray.logs to a directory that can")
