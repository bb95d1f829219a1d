"""Signals of `qsun up` while the router has no handlers of its own: before it serves, and after it.

A signal that ends the launcher there would leave its workers running, if only until the warden has ended them. Handlers
can be set in the main thread alone; in others nothing here does anything.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def restored() -> Iterator[None]:
    """Whatever is set inside, afterwards all is as it was."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and _may_set():
                signal.signal(number, handler)


@contextmanager
def ignored() -> Iterator[None]:
    """Nothing disturbs what is inside."""
    with restored():
        ignore()
        yield


def ignore() -> None:
    """From now on none of them does anything."""
    for number in _SIGNALS if _may_set() else ():
        signal.signal(number, signal.SIG_IGN)


def until_the_router_serves() -> None:
    """The first SIGINT or SIGTERM raises KeyboardInterrupt; SIGHUP does nothing, as there is nothing to reload yet.

    SIGHUP is not ignored but handled: started workers would inherit the former.
    """
    if _may_set():
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, lambda *_: None)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    ignore()  # a second one would raise in the midst of ending the workers
    raise KeyboardInterrupt


def _may_set() -> bool:
    return threading.current_thread() is threading.main_thread()
