"""Signals of `qsun up` while a Ray of this machine runs: they must not end it before its replicas."""

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class UpSignals:
    """A context manager. In its block the first SIGINT or SIGTERM raises KeyboardInterrupt; later ones do nothing.

    Attributes:
        hangup: set by SIGHUP.
    """

    def __init__(self) -> None:
        self.hangup = threading.Event()

    def __enter__(self) -> "UpSignals":
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> None:
        """Set the handlers, also after something else has set its own."""
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._interrupt)
        signal.signal(signal.SIGHUP, lambda *_: self.hangup.set())

    def disregard(self) -> None:
        """Have all of them do nothing."""
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # not ignored, which processes of Ray would inherit

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.disregard()
        raise KeyboardInterrupt
