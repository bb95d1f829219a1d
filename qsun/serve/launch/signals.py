"""Signal handlers of `qsun up` before and after the router serves, which has its own.

A signal that ended the launcher then would leave its workers running until the watchdog ends them. Python sets handlers
in the main thread only; in other threads these functions do nothing.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def restored() -> Iterator[None]:
    """Restore the handlers at the end of the block."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and _may_set():
                signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the end of a short block."""
    held: list[int] = []
    with restored():
        for number in (signal.SIGINT, signal.SIGTERM) if _may_set() else ():
            signal.signal(number, lambda received, _: held.append(received))
        yield
    if held:
        signal.raise_signal(held[0])


def ignore() -> None:
    """Ignore these signals from now on."""
    for number in _SIGNALS if _may_set() else ():
        signal.signal(number, signal.SIG_IGN)


def interrupt_start() -> None:
    """Have the first SIGINT or SIGTERM raise KeyboardInterrupt. SIGHUP does nothing: there is nothing to reload yet.

    SIGHUP gets a handler because started workers would inherit that it is ignored.
    """
    if _may_set():
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, lambda *_: None)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    ignore()  # a second signal would raise while the workers are being ended
    raise KeyboardInterrupt


def _may_set() -> bool:
    return threading.current_thread() is threading.main_thread()
