"""Pieces of work, each once what it needs is there, in a few processes that never outlive the one that started them."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

from qsun.errors import OutOfMemory, QsunError
from qsun.memory import clear_out_of_memory
from qsun.progress import Progress


@dataclass(frozen=True)
class Work:
    """A piece of work: `function(*arguments)` makes `result`.

    `steps` are those of tuning; 0: it tunes nothing. `needs` are what must be there first, results of other pieces or
    anything else.
    """

    label: str
    result: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    steps: int = 0
    needs: tuple[Path, ...] = ()

    def described(self) -> dict[str, Any]:
        return {"label": self.label, "result": str(self.result), "steps": self.steps}


def run_pieces(pieces: Sequence[Work], processes: int, progress: Progress = lambda *_: None) -> None:
    """Do all pieces, of those that can begin the first ones first; none of them needs itself.

    An error of a piece and Ctrl-C end the other processes at once; where this process is killed, they end themselves.
    A piece that finds too little memory beside others is done again, and one process fewer is used from then on.

    Raises:
        QsunError: of a piece, or a process was killed, as when memory runs out.
    """
    waiting, missing, running = list(pieces), {work.result for work in pieces}, dict[Future[None], Work]()
    crowded: set[Future[None]] = set()  # those that had others beside them at any time
    progress("", 0, len(pieces))
    threads = max(1, (os.cpu_count() or 1) // processes)
    with _pool(processes) as pool:
        while waiting or running:
            ready = [work for work in waiting if missing.isdisjoint(work.needs)]
            for work in ready[: processes - len(running)]:
                waiting.remove(work)
                running[pool.submit(_run, work, threads)] = work
            if len(running) > 1:
                crowded |= running.keys()
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                work = running.pop(job)
                try:
                    job.result()
                except OutOfMemory:
                    if job not in crowded:
                        raise
                    processes = max(1, len(running))
                    waiting.insert(0, work)
                    continue
                missing.discard(work.result)
                progress(work.label, len(pieces) - len(waiting) - len(running), len(pieces))


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
    """Do a piece, and leave none of its memory on a GPU to this process, whose next piece may need less."""
    import torch

    torch.set_num_threads(threads)
    work.result.parent.mkdir(parents=True, exist_ok=True)
    shortage = ""
    try:
        with clear_out_of_memory(instead="fewer --processes"):
            work.function(*work.arguments)
    except OutOfMemory as error:
        shortage = str(error)  # raised below, where the error no longer holds what the piece had allocated
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if shortage:
        raise OutOfMemory(shortage)
