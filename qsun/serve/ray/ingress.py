"""The deployment that clients talk to: OpenAI's API and the exchange, which are those of `qsun route`.

Its workers are replicas instead of URLs. Nothing else differs: pairs warm up, circuits open and requests are retried by
the same code (qsun/serve/router).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from qsun.serve.cluster.file import parse_cluster
from qsun.serve.cluster.names import ServedNames
from qsun.serve.http.keys import read_keys
from qsun.serve.ray.engine.logs import log_to_serve
from qsun.serve.ray.members import Members
from qsun.serve.ray.transport import ReplicaTransport
from qsun.serve.router.app import Router


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
        keys = read_keys(self._cluster.listen.api_keys)
        router = Router(self._cluster, ServedNames("", {}), keys, transport, self._follow)
        self._members = Members(router.state, transport, self._pools)
        return WithoutRequestId(router)

    async def _follow(self) -> None:
        await self._members.follow()

    async def check_health(self) -> None:
        """Raise if this process no longer hears of replicas."""
        if self._members.failed:
            raise RuntimeError("the ingress no longer follows the replicas")


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
