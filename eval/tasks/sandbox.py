"""Run a program that a language model wrote with little risk, and find out whether it reached its end.

The program runs in its own Python process (sandbox_child.py), isolated from the environment and site settings, in an
empty directory, with an empty stdin. Its bounds:

* everywhere: CPU seconds, wall seconds, memory, processes, output; not a byte may be written to a file; Python's
  functions that start processes, send signals or change files are removed; the process group is killed at the end;
* Linux 5.13 and later, by Landlock: no file can be written, created, renamed, removed or executed; from 6.7 no TCP;
  from 6.12 no signals to other processes;
* Linux that allows user namespaces: no network at all;
* started by root: it becomes `nobody` if that user can read Python's library. Otherwise it stays root, to whom the
  limit on processes does not apply.

Reading files is not prevented. This stops accidents and careless programs; for hostile programs, run the whole
evaluation in a virtual machine.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use. processes includes threads, and everything else that the same user runs."""

    cpu_seconds: int = 5
    wall_seconds: float = 15.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    output_bytes: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end; if not, the limit that it hit or the last line that it wrote."""

    passed: bool
    reason: str = ""


def run_program(program: str, limits: SandboxLimits | None = None) -> Outcome:
    """Run Python source. A program that exits early has not passed, whatever its exit status.

    The child writes a random token after the last statement; only that counts. A program that searches its own process
    for the token could forge it: this protects against mistakes, not against attacks.
    """
    limits = limits or SandboxLimits()
    token = secrets.token_hex(16)
    command = [sys.executable, "-I", str(_CHILD), json.dumps(asdict(limits))]
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as source:
        Path(empty).chmod(0o755)  # for `nobody`
        source.write(f"{token}\n".encode() + program.encode("utf-8", "replace"))
        source.seek(0)
        child = subprocess.Popen(  # noqa: S603
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=empty,
            env={"LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            written, reason = _read(child, token.encode(), limits)
        finally:
            with suppress(ProcessLookupError):  # before wait: afterwards the number may be reused
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    if reason:
        return Outcome(False, reason)
    if token.encode() in written:
        return Outcome(True)
    lines = written.decode("utf-8", "replace").split("\n")
    return Outcome(False, next((line[:200] for line in reversed(lines) if line.strip()), "left before its end"))


def _read(child: "subprocess.Popen[bytes]", token: bytes, limits: SandboxLimits) -> tuple[bytes, str]:
    """Return what the child wrote until its token, its end or a limit, and the limit's name."""
    assert child.stdout is not None
    deadline, written = time.monotonic() + limits.wall_seconds, b""
    while token not in written:
        left = max(deadline - time.monotonic(), 0)
        if not select.select([child.stdout], [], [], left)[0]:
            return written, f"ran for more than {limits.wall_seconds:g} seconds"
        piece = os.read(child.stdout.fileno(), 1 << 14)
        if not piece:
            break
        written += piece
        if len(written) > limits.output_bytes:
            return written, f"wrote more than {limits.output_bytes} bytes"
    return written, ""
