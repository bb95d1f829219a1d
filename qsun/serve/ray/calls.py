"""Calls of replicas through Serve's handles, each with an identity of its own."""

import asyncio
import contextvars
from collections.abc import Awaitable
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

T = TypeVar("T")


class ReplicaGone(Exception):
    """A call names a replica that is not, or no longer, there."""


CALL_FAILURES = (RayError, RayServeException, ReplicaGone)


def call(method: Any, *arguments: Any, **named: Any) -> Any:
    """Return `method.remote(...)`, made outside the client's request.

    Serve keys the calls that wait for a replica by the request that they are made in. A request that calls again, as a
    retry does, may find its first call still there, and Serve would then look for a replica without end.
    """
    return contextvars.Context().run(method.remote, *arguments, **named)


async def outcome(awaited: Awaitable[T], replica: str | None) -> T:
    """Await a call.

    Raises:
        ReplicaGone: its request router found no such replica (NamedReplica), and cancelled the call.
    """
    try:
        return await awaited
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # it is the caller who was cancelled
        raise ReplicaGone(f"replica {replica} is gone") from None
