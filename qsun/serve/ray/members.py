"""Keeps an ingress's fleet in step with the replicas that Serve has."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve

from qsun.serve.cluster.schema import Cluster
from qsun.serve.ray import presence
from qsun.serve.ray.calls import CALL_FAILURES, call, outcome
from qsun.serve.ray.plan import ENGINE
from qsun.serve.ray.transport import ReplicaTransport
from qsun.serve.router.exchange.state import RouterState
from qsun.serve.router.workers.policies import partition
from qsun.serve.router.workers.worker import Breaker, Role, Worker

logger = logging.getLogger(__name__)

_ASK_SECONDS = 10.0
_AGAIN_SECONDS = 0.5


@dataclass(frozen=True)
class Member:
    """A replica.

    Attributes:
        app: its application.
        role, model, served_name, adapters: as it describes itself (see router/workers/worker.py).
    """

    id: str
    app: str
    role: Role
    model: str | None
    served_name: str
    adapters: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"http://{self.id}"


class Members:
    """The replicas of every pool, as workers of a fleet.

    Args:
        pools: the application of each.
    Attributes:
        failed: it follows no more.
    """

    def __init__(self, state: RouterState, transport: ReplicaTransport, pools: Sequence[str]):
        self._state, self._transport, self._pools = state, transport, pools
        self._known: dict[str, Member] = {}
        self.failed = False

    async def follow(self) -> None:
        """Follow every application until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for app in self._pools:
                    group.create_task(self._follow(app))
        except Exception:
            self.failed = True
            logger.exception("the replicas are not followed any more; Serve is to replace this ingress")

    async def _follow(self, app: str) -> None:
        handle = await _handle(app)
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[frozenset[str]] = asyncio.Queue()

        def announced(ids: frozenset[str]) -> None:
            loop.call_soon_threadsafe(news.put_nowait, ids)

        presence.watch(app, announced)
        first = asyncio.ensure_future(_described(handle, None))  # a handle learns of replicas once it is used
        try:
            present = await news.get()
            while True:
                while not news.empty():
                    present = news.get_nowait()
                complete = await self._apply(app, handle, present)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if complete else _AGAIN_SECONDS):
                        present = await news.get()
        finally:
            first.cancel()

    async def _apply(self, app: str, handle: Any, present: frozenset[str]) -> bool:
        """Take replicas in and out. Return whether every new one has said what it serves."""
        for replica in [m.id for m in self._known.values() if m.app == app and m.id not in present]:
            del self._known[replica]
            del self._transport.handles[replica]
        joined = sorted(present - set(self._known))
        found = await asyncio.gather(*(_described(handle, replica) for replica in joined))
        for replica, described in zip(joined, found, strict=True):
            if described is not None:  # else it has left already, which the next news say, or is slow to answer
                self._known[replica] = Member(replica, app, **described)
                self._transport.handles[replica] = handle
        self._state.fleet.place(list(self._workers(self._state.cluster)), self._state.cluster)
        self._state.health.watch()
        logger.info("%s has %d replicas", app, sum(m.app == app for m in self._known.values()))
        return None not in found

    def _workers(self, cluster: Cluster) -> Iterator[Worker]:
        health = cluster.health
        decode = sorted(member.url for member in self._known.values() if member.role == "decode")
        own = partition(decode, list(cluster.models)) if cluster.policy == "partitioned" else {}
        for member in self._known.values():
            breaker = Breaker(health.failures, health.cool_down_seconds)
            models = own.get(member.url)
            yield Worker(member.url, member.role, member.served_name, breaker, member.model, models, member.adapters)


async def _handle(app: str) -> Any:
    """Return the handle of an application, once there is one."""
    while True:
        with contextlib.suppress(*CALL_FAILURES):
            return serve.get_deployment_handle(ENGINE, app_name=app)
        await asyncio.sleep(_AGAIN_SECONDS)


async def _described(handle: Any, replica: str | None) -> dict[str, Any] | None:
    """Ask a replica, or whichever there is, what it serves. None if it is gone or does not answer."""
    try:
        async with asyncio.timeout(None if replica is None else _ASK_SECONDS):
            return await outcome(call(handle.describe, replica=replica), replica)
    except (TimeoutError, *CALL_FAILURES) as error:
        logger.warning("replica %s does not say what it serves: %s", replica, type(error).__name__)
        return None
