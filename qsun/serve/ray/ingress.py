"""The deployment that clients talk to: OpenAI's API and the exchange, which are those of `qsun route`.

Its workers are replicas instead of URLs. Nothing else differs: pairs warm up, circuits open and requests are retried by
the same code (qsun/serve/router).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from qsun.errors import QsunError
from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.names import ServedNames
from qsun.serve.http.keys import read_keys
from qsun.serve.ray.engine.logs import log_to_serve
from qsun.serve.ray.members import Members
from qsun.serve.ray.plan import LAST_SECONDS
from qsun.serve.ray.transport import ReplicaTransport
from qsun.serve.router.app import Router

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_KEYS_SECONDS = 1.0
_PASSED_ON_SECONDS = 1.0  # by then Serve's proxies have passed on what the ingress has sent


class Ingress:
    """A Serve deployment.

    Args:
        cluster: the cluster file's values. pools: their applications.
    """

    def __init__(self, cluster: Mapping[str, Any], pools: Sequence[str]):
        log_to_serve()
        self._cluster = parse_cluster(cluster)
        self._pools = pools

    def __serve_build_asgi_app__(self) -> "WithoutRequestId":
        """Return the application, once Serve has made this object."""
        transport = ReplicaTransport()
        self._keys = read_keys(self._cluster.listen.api_keys)
        self._router = router = Router(self._cluster, ServedNames("", {}), self._keys, transport, self._follow)
        self._state = router.state
        self._members = Members(router.state, transport, self._pools)
        return WithoutRequestId(router)

    async def _follow(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._members.follow())
            group.create_task(self._follow_keys())

    async def _follow_keys(self) -> None:
        """Use other API keys soon after their file has changed. A faulty file changes nothing, and is logged once."""
        path, fault = self._cluster.listen.api_keys, ""
        while path is not None:
            await asyncio.sleep(_KEYS_SECONDS)
            try:
                found = await asyncio.to_thread(read_keys, path)
                if found != self._keys:
                    self._router.use_keys(found)
                    self._keys = found
                    logger.info("the API keys of %s are in use", path)
                fault = ""
            except QsunError as error:
                if str(error) != fault:
                    logger.error("%s; the previous API keys stay", error)
                fault = str(error)

    async def drain(self) -> None:
        """Refuse new requests. Return once the others are over: after `limits.drain_seconds` they end with an error."""
        state = self._state
        state.draining = True
        if not await _within(self._cluster.limits.drain_seconds, lambda: not state.busy):
            logger.warning("%d requests are cut off", state.admission.running)
            state.cut_off.set()
            await _within(LAST_SECONDS - _PASSED_ON_SECONDS, lambda: not state.busy)
        await asyncio.sleep(_PASSED_ON_SECONDS)

    async def check_health(self) -> None:
        """Raise if this process no longer hears of replicas."""
        if self._members.failed:
            raise RuntimeError("the ingress no longer follows the replicas")


async def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait until something holds, but no longer than this. Return whether it does."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        await asyncio.sleep(_POLL_SECONDS)
    return condition()


class WithoutRequestId:
    """ASGI middleware that leaves X-Request-Id out of answers: Serve's proxy gave the request its id and sends it."""

    def __init__(self, app: Router):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message["headers"] if header[0] != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_without)
