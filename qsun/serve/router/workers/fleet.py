"""All workers of a cluster: which pair of a prefill and a decode worker gets a request, and which join and leave."""

import asyncio
import contextlib
import logging
from collections.abc import Collection, Iterable, Iterator

from qsun.serve.cluster.names import ServedNames
from qsun.serve.cluster.schema import Cluster
from qsun.serve.router.workers.policies import Demand, Policy, make_policy, partition
from qsun.serve.router.workers.worker import Breaker, Role, Worker

logger = logging.getLogger(__name__)


class Fleet:
    """Workers by pool, and the pairs that are warm.

    Attributes:
        prefill: workers that read the prompts of each model. decode: workers of all models.
        warm: pairs (prefill URL, decode URL) that have answered a request together; only these are used. An aggregated
            worker is among `prefill`, and a pair with itself.
    """

    def __init__(self) -> None:
        self.prefill: dict[str, list[Worker]] = {}
        self.decode: list[Worker] = []
        self.leaving: list[Worker] = []
        self.warm: set[tuple[str, str]] = set()
        self._policies: dict[str | None, Policy] = {}
        self._policy_names = ("", "")
        self._changed = asyncio.Event()

    def __iter__(self) -> Iterator[Worker]:
        """Iterate over every worker of the file, once over one that serves many adapters."""
        yield from dict.fromkeys(worker for workers in self.prefill.values() for worker in workers)
        yield from self.decode

    def update(self, cluster: Cluster, names: ServedNames) -> list[Worker]:
        """Apply a file. Workers that stay keep their state, others leave once they are idle. Return the new ones."""
        return self.place(_workers(cluster, names), cluster)

    def place(self, workers: Iterable[Worker], cluster: Cluster) -> list[Worker]:
        """Have these workers instead of the present ones, under the policy and limits of a file; see `update`."""
        known = {_identity(worker): worker for worker in self}
        wanted = {_identity(worker): worker for worker in workers}
        placed = {identity: known.get(identity, worker) for identity, worker in wanted.items()}
        joined = [worker for identity, worker in placed.items() if identity not in known]
        for identity, worker in known.items():
            if identity not in wanted:
                self._remove(worker)
        for identity, worker in placed.items():
            worker.serve_adapters(wanted[identity].adapters)
        self.prefill = {
            model: [w for w in placed.values() if w.role != "decode" and w.prefills(model)] for model in cluster.models
        }
        self.decode = [worker for worker in placed.values() if worker.role == "decode"]
        for worker in self:
            worker.breaker.limit = cluster.health.failures
            worker.breaker.cool_down_seconds = cluster.health.cool_down_seconds
        names = cluster.policy, cluster.prefill_policy or cluster.policy
        if names != self._policy_names:
            self._policies, self._policy_names = {}, names
        self.changed()
        return joined

    def _remove(self, worker: Worker) -> None:
        worker.leaving = True
        self.forget_pairs(worker)
        self.leaving = [other for other in [*self.leaving, worker] if other.in_flight]
        logger.info("%s worker %s leaves; %d requests in flight finish", worker.role, worker.url, worker.in_flight)

    def choose_prefill(self, demand: Demand, tried: Collection[Worker]) -> Worker | None:
        """Return a prefill worker of the model that has a warm decode worker; one not tried before if there is one."""
        usable = self._with_a_pair(demand)
        untried = [w for w in usable if w not in tried and any(d not in tried for d in self._warm_decode(w, demand))]
        return self._policy(demand.model).choose(_unsuspected(untried or usable), demand)

    def choose_decode(self, prefill: Worker, demand: Demand, tried: Collection[Worker]) -> Worker | None:
        """Return a decode worker that is warm with this prefill worker; one not tried before if there is one."""
        usable = self._warm_decode(prefill, demand)
        untried = [worker for worker in usable if worker not in tried]
        return self._policy(None).choose(_unsuspected(untried or usable), demand)

    def _warm_decode(self, prefill: Worker, demand: Demand) -> list[Worker]:
        return [
            worker
            for worker in ([prefill] if prefill.role == "aggregated" else self.decode)
            if worker.usable
            and (prefill.url, worker.url) in self.warm
            and (worker.models is None or demand.model in worker.models)
        ]

    def _policy(self, pool: str | None) -> Policy:
        return self._policies.setdefault(pool, make_policy(self._policy_names[pool is not None]))

    def partners(self, worker: Worker) -> list[Worker]:
        """Return the workers that it may be paired with."""
        if worker.role == "aggregated":
            return [worker]
        if worker.role == "prefill":
            return [d for d in self.decode if d.models is None or any(map(worker.prefills, d.models))]
        models = self.prefill if worker.models is None else worker.models
        return list(dict.fromkeys(prefill for model in models for prefill in self.prefill.get(model, [])))

    def forget_pairs(self, worker: Worker) -> None:
        """Mark all pairs of a worker as cold, because its process may be a new one."""
        worker.epoch += 1
        self.warm = {pair for pair in self.warm if worker.url not in pair}

    def without_a_pair(self) -> list[str]:
        """Return the models that no pair of workers can serve now."""
        return [model for model in self.prefill if not self._with_a_pair(Demand(model, 0))]

    def _with_a_pair(self, demand: Demand) -> list[Worker]:
        """Return the prefill workers of a model that have a warm decode worker; none if a reload has removed it."""
        pool = self.prefill.get(demand.model, ())
        able = [worker for worker in pool if worker.usable and demand.model not in worker.lacking]
        return [worker for worker in able if self._warm_decode(worker, demand)]

    def changed(self) -> None:
        """Wake the requests that wait for a worker."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, seconds: float) -> None:
        """Return when the state of a worker or a pair has changed, or after this time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._changed.wait()


def _unsuspected(workers: list[Worker]) -> list[Worker]:
    """Return the workers that are not suspected of hanging, or all if every one is."""
    return [worker for worker in workers if not worker.suspected] or workers


def _workers(cluster: Cluster, names: ServedNames) -> Iterator[Worker]:
    def breaker() -> Breaker:
        return Breaker(cluster.health.failures, cluster.health.cool_down_seconds)

    for model, pool in cluster.models.items():
        for url in pool.urls:
            yield Worker(url, "prefill", names.prefill[model], breaker(), model=model)
    if cluster.prefill is not None:
        adapters = {model: names.prefill[model] for model in cluster.adapters}
        for url in cluster.prefill.urls:
            yield Worker(url, "prefill", names.shared, breaker(), adapters=adapters)
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
