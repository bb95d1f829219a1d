"""All workers of a cluster: which pair of a prefill and a decode worker takes a request, and what joins and leaves."""

import asyncio
import contextlib
import logging
from collections.abc import Collection, Iterator

from qsun.serve.cluster.modules import ServedNames
from qsun.serve.cluster.schema import Cluster
from qsun.serve.router.workers.policies import Demand, Policy, make_policy, partition
from qsun.serve.router.workers.worker import Breaker, Role, Worker

logger = logging.getLogger(__name__)


class Fleet:
    """Workers by pool, and the pairs whose first handshake is behind them.

    Attributes:
        prefill: workers of each model. decode: workers of all.
        warm: pairs (prefill URL, decode URL) that have answered together; only these are used.
    """

    def __init__(self) -> None:
        self.prefill: dict[str, list[Worker]] = {}
        self.decode: list[Worker] = []
        self.leaving: list[Worker] = []
        self.warm: set[tuple[str, str]] = set()
        self._policies: dict[str | None, Policy] = {}
        self._policy_name = ""
        self._changed = asyncio.Event()

    def __iter__(self) -> Iterator[Worker]:
        """Every worker of the file."""
        for workers in self.prefill.values():
            yield from workers
        yield from self.decode

    def update(self, cluster: Cluster, names: ServedNames) -> list[Worker]:
        """Take on a file. Workers that stay keep their state, others leave once they are idle. Returns the new ones."""
        known = {_identity(worker): worker for worker in self}
        wanted = {_identity(worker): worker for worker in _workers(cluster, names)}
        placed = {identity: known.get(identity, worker) for identity, worker in wanted.items()}
        joined = [worker for identity, worker in placed.items() if identity not in known]
        for identity, worker in known.items():
            if identity not in wanted:
                self._dismiss(worker)
        self.prefill = {model: [w for w in placed.values() if w.model == model] for model in cluster.models}
        self.decode = [worker for worker in placed.values() if worker.role == "decode"]
        for worker in self:
            worker.breaker.limit = cluster.health.failures
            worker.breaker.cool_down_seconds = cluster.health.cool_down_seconds
        if cluster.policy != self._policy_name:
            self._policies, self._policy_name = {}, cluster.policy
        self.changed()
        return joined

    def _dismiss(self, worker: Worker) -> None:
        worker.leaving = True
        self.cool(worker)
        self.leaving = [other for other in [*self.leaving, worker] if other.in_flight]
        logger.info("%s worker %s leaves; %d requests in flight finish", worker.role, worker.url, worker.in_flight)

    def choose_prefill(self, demand: Demand, tried: Collection[Worker]) -> Worker | None:
        """A prefill worker of the model that has a warm decode worker; one that was not tried where there is one."""
        pool = self.prefill.get(demand.model, ())  # none where a reload has removed the model
        usable = [worker for worker in pool if worker.usable and self._mates(worker, demand)]
        fresh = [w for w in usable if w not in tried and any(mate not in tried for mate in self._mates(w, demand))]
        return self._policy(demand.model).choose(fresh or usable, demand)

    def choose_decode(self, prefill: Worker, demand: Demand, tried: Collection[Worker]) -> Worker | None:
        """A decode worker that is warm with this prefill worker."""
        usable = self._mates(prefill, demand)
        return self._policy(None).choose([worker for worker in usable if worker not in tried] or usable, demand)

    def _mates(self, prefill: Worker, demand: Demand) -> list[Worker]:
        return [
            worker
            for worker in self.decode
            if worker.usable
            and (prefill.url, worker.url) in self.warm
            and (worker.models is None or demand.model in worker.models)
        ]

    def _policy(self, pool: str | None) -> Policy:
        return self._policies.setdefault(pool, make_policy(self._policy_name))

    def partners(self, worker: Worker) -> list[Worker]:
        """Workers of the other role that it may be paired with."""
        if worker.role == "prefill":
            return [d for d in self.decode if d.models is None or worker.model in d.models]
        models = self.prefill if worker.models is None else worker.models
        return [prefill for model in models for prefill in self.prefill.get(model, [])]

    def cool(self, worker: Worker) -> None:
        """Its process may be another one from now on: every pair with it has to shake hands again."""
        worker.epoch += 1
        self.warm = {pair for pair in self.warm if worker.url not in pair}

    def without_a_pair(self) -> list[str]:
        """Models that no pair of workers can answer now."""
        return [model for model in self.prefill if self.choose_first(model) is None]

    def choose_first(self, model: str) -> Worker | None:
        """Any usable prefill worker of a model, without a turn of the policy."""
        demand = Demand(model, 0)
        return next((w for w in self.prefill[model] if w.usable and self._mates(w, demand)), None)

    def changed(self) -> None:
        """Wake those who wait for a worker."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, seconds: float) -> None:
        """Return when a worker's state or a pair has changed, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._changed.wait()


def _workers(cluster: Cluster, names: ServedNames) -> Iterator[Worker]:
    def breaker() -> Breaker:
        return Breaker(cluster.health.failures, cluster.health.cool_down_seconds)

    for model, pool in cluster.models.items():
        for url in pool.urls:
            yield Worker(url, "prefill", names.prefill[model], breaker(), model=model)
    own = _partition(cluster)
    for url in cluster.decode.urls:
        yield Worker(url, "decode", names.decode, breaker(), models=own.get(url))


def _partition(cluster: Cluster) -> dict[str, frozenset[str]]:
    workers = cluster.decode.workers
    if cluster.policy != "partitioned" or isinstance(workers, int):
        return {}
    if workers[0].models is None:
        return partition(cluster.decode.urls, list(cluster.models))
    return {worker.url: frozenset(worker.models or ()) for worker in workers}


def _identity(worker: Worker) -> tuple[str, Role, str, str | None, frozenset[str] | None]:
    return worker.url, worker.role, worker.served_name, worker.model, worker.models
