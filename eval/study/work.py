"""Pieces of work, each once what it needs is there, in a few processes that never outlive the one that started them."""

import gc
import logging
import multiprocessing
import os
import signal
import traceback
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
from qsun.memory import clear_out_of_memory, release_freed
from qsun.progress import Progress

log = logging.getLogger(__name__)


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
    A piece that finds too little memory beside others is done again, and fewer are done at a time from then on.

    Raises:
        QsunError: of a piece, or a process was killed, as when memory runs out.
        RuntimeError: any other error of a piece, with its traceback.
    """
    waiting, missing, running = list(pieces), {work.result for work in pieces}, dict[Future[None], Work]()
    beside: dict[Future[None], int] = {}  # the most pieces that were under way with each, itself included
    progress("", 0, len(pieces))
    with _pool(processes) as pool:
        while waiting or running:
            ready = [work for work in waiting if missing.isdisjoint(work.needs)]
            for work in ready[: max(0, processes - len(running))]:
                waiting.remove(work)
                running[pool.submit(_run, work, max(1, (os.cpu_count() or 1) // processes))] = work
            beside |= {job: max(beside.get(job, 1), len(running)) for job in running}
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                work = running.pop(job)
                try:
                    job.result()
                except OutOfMemory as error:
                    if beside[job] == 1:
                        raise
                    processes = max(1, min(processes, beside[job]) - 1)
                    log.warning("%s: %s; from now on %d at a time", work.label, error, processes)
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
    """Do a piece, and leave none of its memory to this process, whose next piece may need less.

    Its errors come as ones that another process can read, and hold nothing of what it had allocated.
    """
    import torch

    torch.set_num_threads(threads)
    work.result.parent.mkdir(parents=True, exist_ok=True)
    fault: Exception | None = None
    try:
        with clear_out_of_memory(instead="fewer --processes"):
            work.function(*work.arguments)
    except (QsunError, OSError) as error:
        fault = error.with_traceback(None)
        fault.__context__ = None
    except (Exception, SystemExit):
        fault = RuntimeError(f"{work.label}:\n{traceback.format_exc()}")
    gc.collect()
    release_freed()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if fault is not None:
        raise fault
