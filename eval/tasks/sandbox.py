"""Run a program that a language model wrote, where it can do little harm, and learn whether it reached its end.

The program runs in a Python process of its own (sandbox_child.py), isolated from the environment and site settings,
in an empty directory, with nothing to read on stdin. What bounds it:

* everywhere: CPU seconds, wall seconds, memory, processes, output; not one byte into a file; Python's functions that
  start processes, send signals or change files are taken away; the process group is killed at the end;
* Linux 5.13 and later, by Landlock: no file is written, made, renamed, removed or executed, from 6.7 no TCP, from 6.12
  no signal to other processes;
* Linux that allows user namespaces: no network at all;
* started by root: it becomes `nobody`, if that user can read Python's library. Otherwise it stays root, whom the limit
  on processes does not bind.

Reading files is not prevented. This keeps accidents and careless programs from doing damage; for programs that attack,
put the whole evaluation into a virtual machine.
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
    """What a program may use. processes counts threads too, and all that the same user runs."""

    cpu_seconds: int = 5
    wall_seconds: float = 15.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    output_bytes: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and why not: a limit, or the last line it wrote."""

    passed: bool
    reason: str = ""


def run_program(program: str, limits: SandboxLimits | None = None) -> Outcome:
    """Run Python source to its end. A program that leaves early, whatever its exit status, has not passed.

    The child writes a random token once the last statement is done; only that counts. A program that searches its own
    process for the token could forge it: this holds against mistakes, not against attacks.
    """
    limits = limits or SandboxLimits()
    token = secrets.token_hex(16)
    command = [sys.executable, "-I", str(_CHILD), json.dumps(asdict(limits))]
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as source:
        Path(empty).chmod(0o755)  # `nobody` may look into it
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
            with suppress(ProcessLookupError):  # before wait: until then the number belongs to this group
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
    """What the child wrote until its token, its end or a limit, and the limit's name."""
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
