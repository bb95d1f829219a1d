"""Ends the workers of a launcher that died, even by SIGKILL: python -m qsun.serve.launch.watchdog.

It reads lines from its stdin, which only the launcher holds open: "+PID" adds a process group to watch, "-PID" removes
one that the launcher has ended itself. At the end of its input it ends the remaining groups and exits.
"""

import os
import signal
import sys
import time
from collections.abc import Collection, Iterable

GRACE_SECONDS = 15.0
_POLL_SECONDS = 0.05


def watched_groups(lines: Iterable[str]) -> set[int]:
    """Return the process groups that remain to be ended after these lines."""
    groups: set[int] = set()
    for line in lines:
        sign, pid = line[:1], int(line[1:])
        (groups.add if sign == "+" else groups.discard)(pid)
    return groups


def end_groups(groups: Collection[int], grace_seconds: float = GRACE_SECONDS) -> None:
    """Send SIGTERM to process groups, and SIGKILL to those that remain after the grace period."""
    left = {group for group in groups if signal_group(group, signal.SIGTERM)}
    deadline = time.monotonic() + grace_seconds
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left = {group for group in left if signal_group(group, 0)}
    for group in left:
        signal_group(group, signal.SIGKILL)


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group. Return False if it has no process any more."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it must outlive the launcher
    end_groups(watched_groups(sys.stdin))


if __name__ == "__main__":
    main()
