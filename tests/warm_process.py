"""Processes forked from one that has imported torch, transformers and qsun, which takes 5 seconds of a processor.

What depends on a start of its own, such as warnings, imports and memory, starts Python instead.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver, get_context
from pathlib import Path
from threading import Thread

from tests.places import ROOT

_DEADLINE_SECONDS = 600  # of two processes, of which one may wait for the other for ever


@cache
def warm_context():
    """The multiprocessing context whose processes are forked from the server of this process."""
    context, before = get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload(["tests.warm_imports"])
    os.environ["PYTHONPATH"] = str(ROOT)
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


class WarmProcess:
    """A function in a process, with what tests use of subprocess.Popen; stdout and stderr are pipes of text."""

    def __init__(self, function, *arguments):
        context = warm_context()
        ends = [context.Pipe(duplex=False) for _ in range(2)]
        here = (Path.cwd(), dict(os.environ), [writer for _, writer in ends])
        self._process = context.Process(target=_run, args=(*here, function, arguments))
        self._process.start()
        self.stdout, self.stderr = (os.fdopen(os.dup(reader.fileno())) for reader, _ in ends)
        for end in (end for pair in ends for end in pair):
            end.close()
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.wait()
        self.stdout.close()
        self.stderr.close()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a warm process", timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self._process.kill()


def as_two_ranks(function, *arguments):
    """Run a function in two processes that find what torchrun tells its own. Returns (both succeeded, stderr)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first, second = (WarmProcess(_rank, rank, port, function, arguments) for rank in range(2))
    with first, second:
        said, both = [], (first, second)
        readers = [Thread(target=lambda process=process: said.append(process.stderr.read())) for process in both]
        for reader in readers:
            reader.start()
        end = time.monotonic() + _DEADLINE_SECONDS
        while None in (ended := [process.poll() for process in both]) and not any(ended) and time.monotonic() < end:
            time.sleep(0.05)
        for process in both if any(ended) or None in ended else ():  # one failed, and the other may wait for it
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
        ended = [process.wait() for process in both]
        for reader in readers:
            reader.join()
    return ended == [0, 0], "\n".join(said)


def _rank(rank, port, function, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    function(*arguments)


def qsun_process(*arguments):
    """Start `qsun ...`."""
    return WarmProcess(_qsun, ["qsun", *map(str, arguments)])


def _qsun(line):
    from qsun.cli.main import main

    sys.argv = line
    main()


def _run(directory, environment, writers, function, arguments):
    for number, writer in enumerate(writers, 1):
        os.dup2(writer.fileno(), number)
        writer.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)
