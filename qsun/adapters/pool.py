"""Which adapters are in memory: loaded when a request needs them, at most so many, the least recently used goes first.

An adapter is needed while prompts of its model are read, and no longer: decode steps do not use it.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Literal

from qsun.adapters.adapter_weights import AdapterWeights
from qsun.errors import QsunError

log = logging.getLogger(__name__)
NOT_LOADED = "the model's adapter could not be loaded; the server's log says why"


class AdapterPool:
    """Adapters by the number of their load. Loading takes place in a thread, so that decode steps go on.

    Args:
        most: adapters in memory, those that are being loaded among them.

    Attributes:
        loads, evictions: how many so far.
        unused: loaded for a request that has not taken them yet.
    """

    def __init__(self, most: int):
        self.most = most
        self.loads = self.evictions = 0
        self.unused: set[int] = set()
        self._here: OrderedDict[int, AdapterWeights] = OrderedDict()
        self._loading: dict[int, Future[AdapterWeights]] = {}
        self._loader = ThreadPoolExecutor(1, "qsun-adapters")

    def __len__(self) -> int:
        return len(self._here)

    @property
    def size_bytes(self) -> int:
        """Bytes of the adapters in memory."""
        return sum(adapter.size_bytes for adapter in list(self._here.values()))

    def want(
        self, number: int, load: Callable[[], AdapterWeights], pinned: Set[int]
    ) -> AdapterWeights | Literal["loading", "no_room"]:
        """Return an adapter, or why it is not here: it is being loaded, or all that are here are pinned."""
        adapter = self._here.get(number)
        if adapter is not None:
            self._here.move_to_end(number)
            self.unused.discard(number)
            return adapter
        if number not in self._loading:
            if not self._make_room(pinned):
                return "no_room"
            self._loading[number] = self._loader.submit(load)
        return "loading"

    def _make_room(self, pinned: Set[int]) -> bool:
        while len(self._here) + len(self._loading) >= self.most:
            oldest = next((number for number in self._here if number not in pinned), None)
            if oldest is None:
                return False
            self.drop(oldest)
            self.evictions += 1
        return True

    def collect(self) -> set[int]:
        """Take in what has been loaded. Returns those that could not be; the log says why."""
        failed = set()
        for number, future in list(self._loading.items()):
            if not future.done():
                continue
            del self._loading[number]
            error = future.exception()
            if error is None:
                self._here[number] = future.result()
                self.unused.add(number)
                self.loads += 1
            elif isinstance(error, (QsunError, OSError, RuntimeError)):  # torch's lack of memory is the last
                failed.add(number)
                log.error("%s", " ".join(str(error).split()))
            else:
                raise error
        return failed

    def wait(self, seconds: float) -> None:
        """Return once an adapter has been loaded, or after this time; at once if none is being loaded."""
        wait(list(self._loading.values()), seconds, FIRST_COMPLETED)

    def close(self) -> None:
        """Load no more, for good: Python would finish the loads that are queued before the process can exit."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    def drop(self, number: int) -> None:
        """Let go of an adapter, wherever it is."""
        self._here.pop(number, None)
        loading = self._loading.pop(number, None)
        if loading is not None:
            loading.cancel()
        self.unused.discard(number)
