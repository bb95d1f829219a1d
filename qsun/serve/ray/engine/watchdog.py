"""Runs a vLLM server, and ends it once the replica that started it is gone: python watchdog.py, standard library only.

Its stdin, which only the replica holds open, begins with a line of JSON: the server's argv and environment. At the end
of the input, even after SIGKILL of the replica, the process group, which is this process, the server and its children,
gets SIGTERM, and SIGKILL after the grace period. If the server ends first, this process ends in the same way.

The process that the replica starts only waits for another one, which does all this: where a node dies or an actor is
ended by force, Ray kills an actor's children, but not theirs.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 15.0
_CANNOT_RUN = 127


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not ignored, which the server would inherit
    watchdog = os.fork()
    if watchdog:
        _, status = os.waitpid(watchdog, 0)
        _end_as(os.waitstatus_to_exitcode(status))
    _watch()


def _watch() -> None:
    line = sys.stdin.readline()
    if not line:
        return
    started = json.loads(line)
    try:
        server = subprocess.Popen(started["argv"], env=started["environment"], stdin=subprocess.DEVNULL)  # noqa: S603
    except OSError as error:
        sys.stderr.write(f"{started['argv'][0]} cannot be run: {error.strerror}; check launch.python\n")
        sys.stderr.flush()
        os._exit(_CANNOT_RUN)
    ending = threading.Event()
    threading.Thread(target=_end_at_end_of_input, args=[ending], daemon=True).start()
    code = server.wait()
    if ending.is_set():
        os.killpg(0, signal.SIGKILL)  # what the server has left
    os.killpg(0, signal.SIGTERM)
    _end_as(code)


def _end_as(code: int) -> None:
    """End with this code; below 0, by the signal of this number."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def _end_at_end_of_input(ending: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    ending.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
