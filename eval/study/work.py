"""Pieces of work, stage by stage, in a few processes that never outlive the one that started them."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

from qsun.errors import QsunError
from qsun.progress import Progress


@dataclass(frozen=True)
class Work:
    """A piece of work: `function(*arguments)` makes `result`, and may need what earlier stages made.

    `steps` are those of tuning; 0: it tunes nothing.
    """

    label: str
    result: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    steps: int = 0

    def described(self) -> dict[str, Any]:
        return {"label": self.label, "result": str(self.result), "steps": self.steps}


def run_stages(stages: Sequence[Sequence[Work]], processes: int, progress: Progress = lambda *_: None) -> None:
    """Do all pieces of each stage, then those of the next.

    An error of a piece and Ctrl-C end the other processes at once; where this process is killed, they end themselves.

    Raises:
        QsunError: of a piece, or a process was killed, as when memory runs out.
    """
    total, done = sum(map(len, stages)), 0
    progress("", 0, total)
    threads = max(1, (os.cpu_count() or 1) // processes)
    with _pool(processes) as pool:
        for stage in stages:  # each needs the results of the one before
            jobs = {pool.submit(_run, work, threads): work for work in stage}
            for job in as_completed(jobs):
                job.result()
                done += 1
                progress(jobs[job].label, done, total)


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _end_with_parent)
    try:
        yield pool
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise QsunError(
                f"one of {processes} processes was killed before its work was done, as when memory runs out; free "
                "some, and run the command again"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the parent, and end as soon as that has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as an exception it would be the result of one piece
    Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(work: Work, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    work.result.parent.mkdir(parents=True, exist_ok=True)
    work.function(*work.arguments)
