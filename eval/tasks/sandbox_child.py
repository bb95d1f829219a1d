"""The child of sandbox.py: give up all privileges, then run the program from stdin. Standard library only.

sandbox_child.py LIMITS < token line and program; LIMITS is SandboxLimits as JSON.
"""

import ctypes
import json
import os
import pwd
import resource
import struct
import sys
import types
from contextlib import suppress
from typing import Any

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # of unshare(2)
_NO_NEW_PRIVILEGES = 38  # of prctl(2)
_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # Landlock's system calls, the same on all of Python's platforms
_EXECUTE, _WRITE_FILE, _REMOVE_AND_MAKE, _TRUNCATE = 1 << 0, 1 << 1, 0b1111_1111_1 << 4, 1 << 14
_BOTH = 0b11  # of TCP: bind and connect; of scopes: abstract sockets and signals

_REMOVED = {
    "os": """abort chmod chown execv execve fchmod fchown fork forkpty kill killpg lchown link mkdir mkfifo mknod popen
        posix_spawn posix_spawnp remove rename replace rmdir setpgid setsid symlink system truncate unlink""",
    "_posixsubprocess": "fork_exec",
    "shutil": "rmtree move chown",
}


def limit_resources(limits: dict[str, Any]) -> None:
    """Set hard limits, which the program cannot raise."""
    cpu = int(limits["cpu_seconds"])
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, int(limits["processes"])),
        (resource.RLIMIT_AS, int(limits["memory_bytes"])),
    ):
        if sys.platform == "linux" or kind not in (resource.RLIMIT_AS, resource.RLIMIT_NPROC):
            resource.setrlimit(kind, (value, value))


def leave_root() -> None:
    """Become `nobody` if that user can read Python's library; otherwise a program could not import anything."""
    if os.geteuid() != 0:
        return
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return
    with suppress(OSError):  # a container may not allow it
        os.setgroups([])
        os.setegid(nobody.pw_gid)
        os.seteuid(nobody.pw_uid)
        readable = all(os.access(path, os.R_OK, effective_ids=True) for path in (os.__file__, struct.__file__))
        os.seteuid(0)
        os.setegid(0)
        if readable:
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)


def leave_network_and_files() -> None:
    """Give up what Linux lets a process give up without root; a kernel without support leaves the other bounds."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(_NEW_USER | _NEW_NET)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    files = _EXECUTE | _WRITE_FILE | _REMOVE_AND_MAKE | (_TRUNCATE if version >= 3 else 0)
    rules = struct.pack("QQQ", files, _BOTH if version >= 4 else 0, _BOTH if version >= 6 else 0)
    rules = rules[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(_CREATE_RULESET, rules, len(rules), 0)
    if ruleset >= 0:
        libc.syscall(_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)


def remove_functions() -> None:
    """Remove functions that no solution needs; the kernel's limits hold for programs that get around this."""

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("not allowed here")

    for module, names in _REMOVED.items():
        loaded = __import__(module)
        for name in names.split():
            if hasattr(loaded, name):
                setattr(loaded, name, refused)


def main() -> None:
    limits = json.loads(sys.argv[1])
    sys.argv[1:] = []
    token = sys.stdin.buffer.readline().strip().decode()  # an argument would be visible to the program
    source = sys.stdin.buffer.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    write, leave = os.write, os._exit
    leave_root()
    leave_network_and_files()
    limit_resources(limits)
    remove_functions()
    module = types.ModuleType("program")
    sys.modules["program"] = module
    exec(compile(source, "<program>", "exec"), module.__dict__)  # noqa: S102  the purpose of this file
    sys.stdout.flush()
    write(1, token.encode())
    leave(0)


if __name__ == "__main__":
    main()
