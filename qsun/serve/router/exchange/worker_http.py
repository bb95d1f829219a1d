"""HTTP requests to workers: prefill a prompt, open an answer, and classify each failure."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from qsun.serve.http.wire import BrokenStream, usage_count
from qsun.serve.router.exchange.request import RoutedRequest
from qsun.serve.router.exchange.tracing import with_trace
from qsun.serve.router.exchange.transfer import NoTransfer, prefill_body, transfer_of
from qsun.serve.router.workers.worker import Worker

# not the user's mistake: the worker serves other weights or needs a key, or it is only full or slow
_WRONG_WORKER = (401, 403, 404)
_TRY_ANOTHER = (408, 409, 425, 429, 503)
_LARGEST_ANSWER_BYTES = 1 << 26
_CONNECT_SECONDS = 10.0


class WorkerFailed(Exception):
    """An attempt failed before the client got a byte; another attempt may succeed.

    Args:
        cause: one word for metrics. detail: for the log.
    Attributes:
        source: the prefill worker whose KV cache a decode worker was to read.
    """

    def __init__(self, worker: Worker, cause: str, detail: str):
        super().__init__(f"{worker.role} worker {worker.url}: {detail}")
        self.worker, self.cause = worker, cause
        self.source: Worker | None = None


class RequestRefused(Exception):
    """A worker refused the request as wrong: the client gets its status and reason, and no other worker is tried."""

    def __init__(self, status: int, body: bytes):
        super().__init__(f"status {status}")
        self.status, self.body = status, body


@dataclass(frozen=True)
class Prefilled:
    """A prompt's KV cache at a prefill worker.

    Attributes:
        params: name its blocks, for one use; None for a prompt of one token without any.
        prompt_tokens: the worker's count.
        engine_id: of the worker's process.
    """

    params: dict[str, Any] | None
    prompt_tokens: int | None
    engine_id: str | None


def time_to_answer(seconds: float) -> httpx.Timeout:
    """Return the limits of a request that a worker may compute for so long; to connect takes less."""
    return httpx.Timeout(seconds, connect=min(_CONNECT_SECONDS, seconds))


async def prefill(
    client: httpx.AsyncClient, worker: Worker, request: RoutedRequest, served_name: str, request_id: str, seconds: float
) -> Prefilled:
    """Have a prefill worker compute a prompt within a time, under this name of a model.

    Raises:
        WorkerFailed, RequestRefused
    """
    body = prefill_body(request, served_name)
    async with opened(client, worker, request.path, body, request_id, time_to_answer(seconds)) as response:
        answer = await read_json(worker, response)
    try:
        params, prompt_tokens = transfer_of(answer), usage_count(answer, "prompt_tokens")
    except NoTransfer as missing:
        raise WorkerFailed(worker, "no_transfer", str(missing)) from None
    except BrokenStream as broken:
        raise WorkerFailed(worker, "broken", str(broken)) from None
    return Prefilled(params, prompt_tokens, None if params is None else str(params["remote_engine_id"]))


@asynccontextmanager
async def opened(
    client: httpx.AsyncClient,
    worker: Worker,
    path: str,
    body: Mapping[str, Any],
    request_id: str,
    timeout: httpx.Timeout,
) -> AsyncIterator[httpx.Response]:
    """POST to a worker; the block gets a response of status 200 whose body has not been read.

    Leaving the block closes the connection of an unfinished answer, which makes vLLM end the request.
    """
    headers = with_trace({"X-Request-Id": request_id, "Accept-Encoding": "identity"})
    try:
        async with client.stream("POST", worker.url + path, json=body, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                await _refuse(worker, response)
            yield response
    except httpx.HTTPError as error:
        raise WorkerFailed(worker, cause_of(error), type(error).__name__) from error


async def _refuse(worker: Worker, response: httpx.Response) -> None:
    status, text = response.status_code, await _read(worker, response)
    shown = " ".join(text[:200].decode("utf-8", "replace").split())
    if status in _WRONG_WORKER:
        raise WorkerFailed(worker, "wrong_worker", f"status {status} for {worker.served_name}: {shown}")
    if 400 <= status < 500 and status not in _TRY_ANOTHER:
        raise RequestRefused(status, text)
    raise WorkerFailed(worker, "busy" if status in _TRY_ANOTHER else "status_5xx", f"status {status}: {shown}")


async def read_json(worker: Worker, response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of a whole answer. Raises WorkerFailed for anything else."""
    try:
        answer = json.loads(await _read(worker, response))
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise WorkerFailed(worker, "broken", "its answer is not a JSON object")
    return answer


async def _read(worker: Worker, response: httpx.Response) -> bytes:
    body = bytearray()
    try:
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > _LARGEST_ANSWER_BYTES:
                raise WorkerFailed(worker, "broken", f"its answer is longer than {_LARGEST_ANSWER_BYTES} bytes")
    except httpx.HTTPError as error:
        raise WorkerFailed(worker, cause_of(error), type(error).__name__) from error
    return bytes(body)


def cause_of(error: httpx.HTTPError) -> str:
    """Return the kind of a failure, one word for metrics."""
    if isinstance(error, httpx.PoolTimeout):
        return "busy"  # all of our own connections are in use, which is not the worker's fault
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return "connect"
    return "timeout" if isinstance(error, httpx.TimeoutException) else "broken"
