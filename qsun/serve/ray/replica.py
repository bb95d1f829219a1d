"""A replica of a pool: one vLLM server on a loopback port of its node, and the only way to it.

The server is a process of its own and not an AsyncLLM in the actor: its command line is vLLM's documented interface and
the one that tests use, it may live in an environment of its own (`launch.python`), and when its engine
dies the actor sees the process end and leaves, so Serve starts another one at once.
"""

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import httpx
import ray
from ray import serve

from qsun.serve.cluster.schema import LaunchSettings
from qsun.serve.http.gathering import gathered
from qsun.serve.ray.engine.logs import log_to_serve
from qsun.serve.ray.engine.node import command_on_node
from qsun.serve.ray.engine.process import EngineProcess
from qsun.serve.ray.scaling import METRIC, OutstandingTokens

logger = logging.getLogger(__name__)

_SERVED = ("/health", "/v1/models", "/v1/completions", "/v1/chat/completions")
_KEPT = ("content-type",)
_KNOWN_ATTEMPTS = 10_000
_DIED = 1


class EngineReplica:
    """A Serve deployment. engine: JSON values, as `plan_apps` makes them."""

    def __init__(self, engine: Mapping[str, Any]):
        log_to_serve()
        self._engine = engine
        self._id = serve.get_replica_context().replica_id.unique_id
        command = command_on_node(engine, self._id, ray.util.get_node_ip_address())
        launch = LaunchSettings(**engine["launch"])
        self._process = EngineProcess(command, engine["logs"], launch.start_seconds, _leave)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        self._client = httpx.AsyncClient(
            base_url=command.url, trust_env=False, timeout=httpx.Timeout(None), limits=limits
        )
        longest = min(filter(None, (engine["max_tokens"], launch.max_model_len)), default=0)
        self._load = OutstandingTokens(prompts_only=engine["role"] == "prefill", longest=longest)
        self._attempts: OrderedDict[str, None] = OrderedDict()
        self._last_prefill = 0.0

    async def describe(self, replica: str | None = None) -> dict[str, Any]:
        """Return what this replica serves."""
        adapters = {model: adapter["served_name"] for model, adapter in self._engine["adapters"].items()}
        return {key: self._engine[key] for key in ("role", "model", "served_name")} | {"adapters": adapters}

    async def answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, replica: str | None = None
    ) -> AsyncGenerator[Any, None]:
        """Pass a request to vLLM. Yield (status, headers), then pieces of the body as they come.

        Args:
            replica: for the request router.
        """
        refusal = self._refusal(path, headers)
        if refusal is not None:
            yield refusal, {}
            return
        with self._load.counted(path, body) as load:
            async with self._client.stream(method, path, content=body, headers=headers) as response:
                yield response.status_code, {name: response.headers[name] for name in _KEPT if name in response.headers}
                async with aclosing(gathered(response.aiter_raw(), self._engine["gather_seconds"])) as parts:
                    async for part in parts:
                        piece = b"".join(part)
                        load.arrived(piece)
                        yield piece
        if body and self._engine["role"] == "prefill":
            self._last_prefill = time.monotonic()

    def _refusal(self, path: str, headers: Mapping[str, str]) -> int | None:
        """Return a status for a path that is not served, or for an attempt that came before.

        Ray sends a request again if the connection to an actor breaks for a moment. The first one may have used its
        transfer parameters by then, and the blocks that they name may be another request's.
        """
        if path not in _SERVED:
            return 404
        attempt = headers.get("x-request-id")
        if attempt is None:
            return None
        if attempt in self._attempts:
            logger.warning("duplicate request %s is refused", attempt)
            return 409
        self._attempts[attempt] = None
        if len(self._attempts) > _KNOWN_ATTEMPTS:
            self._attempts.popitem(last=False)
        return None

    async def check_health(self) -> None:
        """Raise if vLLM does not answer. Serve replaces the replica after a few of these."""
        response = await self._client.get("/health", timeout=self._engine["health_seconds"])
        response.raise_for_status()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {METRIC: float(self._load.tokens)}

    async def __del__(self) -> None:
        """End vLLM once running requests are over, which Serve waits for, and KV cache that it holds was fetched."""
        held = self._last_prefill + self._engine["linger_seconds"] - time.monotonic()
        if self._last_prefill and held > 0:
            await asyncio.sleep(held)
        await self._client.aclose()
        await asyncio.to_thread(self._process.stop)


def _leave(how: str) -> None:
    """End this process: without its vLLM it can do nothing, and Serve replaces a dead actor at once."""
    logger.error("%s; the replica ends, and Serve starts another", how)
    os._exit(_DIED)
