"""The engine in a thread of its own, and requests to it from coroutines."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from qsun.engine.engine import Engine
from qsun.engine.requests import Refused, Request, Update
from qsun.engine.state import EngineState

log = logging.getLogger(__name__)
SHUTTING_DOWN = "the server is shutting down"
_WAKE_SECONDS = 0.5  # how often an idle engine looks around


class EngineThread:
    """Runs an engine's steps. Methods may be called from any thread, `submit` and `call` from coroutines.

    Attributes:
        failure: what ended the engine, "" while it is well.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self.failure = ""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Update]]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qsun-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread, if it runs; requests that are not done get an error."""
        self._stopping.set()
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def state(self) -> EngineState:
        return self._engine.state

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the engine's thread, between two steps. Raises what it raises."""
        if self.failure:
            raise Refused(self.failure)
        outcome: Future[Any] = Future()

        def run() -> None:
            if not outcome.set_running_or_notify_cancel():
                return
            try:
                outcome.set_result(function(*arguments))
            except BaseException as error:  # whatever it is belongs to the caller
                outcome.set_exception(error)

        self._inbox.put(run)
        if self.failure and outcome.cancel():  # it ended meanwhile, and nobody will take this in
            raise Refused(self.failure)
        return await asyncio.wrap_future(outcome)

    async def submit(self, requests: Sequence[Request]) -> "Updates":
        """Queue requests, all or none. Returns their updates as they come; closing them early cancels what still runs.

        Raises:
            Refused, Full, QsunError: as Engine.submit.
        """
        updates: asyncio.Queue[Update] = asyncio.Queue()  # bounded by max_new_tokens
        stream = (asyncio.get_running_loop(), updates)

        def start() -> None:
            self._engine.submit(*requests)
            self._streams.update((request.id, stream) for request in requests)

        try:
            await self.call(start)
        except asyncio.CancelledError:
            self.cancel(requests)
            raise
        return Updates(self, requests, updates)

    def cancel(self, requests: Sequence[Request]) -> None:
        """Cancel requests; those that are done are ignored."""
        for request in requests:
            self._inbox.put(partial(self._drop, request.id))

    def _drop(self, request: str) -> None:
        self._streams.pop(request, None)
        if not self.failure:  # an engine that failed may fail at this as well, and those who wait must still be told
            self._engine.cancel(request)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._take_in()
                if not self._engine.idle:
                    self._send(self._engine.step())
        except Exception as error:  # the edge of the thread: whoever waits must hear of it
            log.exception("the engine failed")
            self.failure = f"the engine failed: {type(error).__name__}: {error}"
        self._engine.adapters.close()
        self.failure = self.failure or SHUTTING_DOWN
        while not self._inbox.empty():
            self._inbox.get()()
        given_up = list(self._streams)
        self._send([Update(request, finish="error", error=self.failure) for request in given_up])
        for request in given_up:  # counted once they are told: an engine that failed may fail at this as well
            self._engine.fail(request)

    def _take_in(self) -> None:
        """Return what came in; wait for it if there is nothing to do."""
        try:
            if self._engine.idle:
                self._inbox.get(timeout=_WAKE_SECONDS)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _send(self, updates: list[Update]) -> None:
        """Deliver to waiting coroutines, a call for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Update], Update]]] = {}
        for update in updates:
            stream = self._streams.get(update.request)
            if stream is None:
                continue
            by_loop.setdefault(stream[0], []).append((stream[1], update))
            if update.finish:
                del self._streams[update.request]
        for loop, batch in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, batch)


class Updates(AsyncIterator[Update]):
    """Updates of requests until all have ended. Not a generator: one that nobody has begun to read closes silently."""

    def __init__(self, thread: EngineThread, requests: Sequence[Request], updates: "asyncio.Queue[Update]"):
        self._thread, self._updates = thread, updates
        self._running = {request.id: request for request in requests}

    async def __anext__(self) -> Update:
        if not self._running:
            raise StopAsyncIteration
        update = await self._updates.get()
        if update.finish:
            self._running.pop(update.request, None)
        return update

    def close(self) -> None:
        """Cancel what still runs; no more updates come."""
        self._thread.cancel(list(self._running.values()))
        self._running.clear()


def _put_all(batch: "list[tuple[asyncio.Queue[Update], Update]]") -> None:
    for updates, update in batch:
        updates.put_nowait(update)
