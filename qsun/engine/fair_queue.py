"""Waiting requests, a queue for each model, served so that no model's burst starves another.

Virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588): the model that has
been served the fewest tokens is next. One that was idle starts level with the least served of the busy ones, or where
nobody is busy with the most served, so that idle time earns no credit and nobody has to make up for the past.
"""

from collections import deque
from collections.abc import Iterator, Set

from qsun.engine.requests import Request


class FairQueue:
    """First come, first served within a model; the least served model first."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Request]] = {}
        self._served: dict[str, float] = {}
        self._most = 0.0  # that any model was ever served

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue

    def waiting(self, model: str) -> int:
        return len(self._queues.get(model, ()))

    def add(self, request: Request, busy: set[str]) -> None:
        """busy: models that have requests running."""
        model = request.model
        if model not in busy and not self.waiting(model):
            others = [self._served[m] for m in self._served if m != model and (m in busy or self.waiting(m))]
            self._served[model] = max(self._served.get(model, 0.0), min(others, default=self._most))
        self._queues.setdefault(model, deque()).append(request)

    def next(self, without: Set[str] = frozenset()) -> Request | None:
        """Return the next request of all models but some; it stays until `take`."""
        models = [model for model, queue in self._queues.items() if queue and model not in without]
        return self._queues[min(models, key=lambda model: self._served[model])][0] if models else None

    def take(self, request: Request) -> None:
        """Remove a request, wherever it stands."""
        queue = self._queues[request.model]
        queue.remove(request)
        if not queue:
            del self._queues[request.model]

    def charge(self, model: str, tokens: float) -> None:
        """Count tokens that a model was served."""
        self._served[model] = self._served.get(model, 0.0) + tokens
        self._most = max(self._most, self._served[model])

    def forget(self, model: str) -> None:
        """Forget a model, whose queue is empty."""
        self._served.pop(model, None)
