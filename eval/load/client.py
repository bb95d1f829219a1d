"""One streaming request to an OpenAI-compatible server, and when its tokens came."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from qsun.errors import QsunError

ENDPOINTS = ("completions", "chat")
NOT_SENT = "not sent"
_LONGEST_LINE = 4 << 20  # bytes of one event; a server that sends more without a line end is broken
_MOST_TOKENS = 1 << 40  # of an answer; more is no count
_BEYOND_DEADLINE_S = 5.0  # httpx's own timeouts, in case of a wait that the deadline does not see


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        url: such as http://127.0.0.1:8000, with or without /v1. endpoint: "completions" or "chat".
        api_key: sent as a bearer token. extra: fields of every body, such as {"ignore_eos": true} for vLLM and qsun.
        deadline_s: after which a request is given up, counted from its send.
    """

    url: str
    endpoint: str = ENDPOINTS[0]
    api_key: str = field(default="", repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    deadline_s: float = 120.0

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise QsunError(f"endpoint {self.endpoint!r} is not known; use {' or '.join(ENDPOINTS)}")
        if not self.url.startswith(("http://", "https://")):
            raise QsunError(f"url {self.url!r} is no http address; use one such as http://127.0.0.1:8000")
        try:
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise QsunError(
                f"url {self.url!r} is no http address ({error}); use one such as http://127.0.0.1:8000"
            ) from None
        if not self.deadline_s > 0:
            raise QsunError(f"deadline {self.deadline_s:g} is out of range; use more than 0 seconds")

    def address(self, path: str) -> str:
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"

    def client(self) -> httpx.AsyncClient:
        """Connections without a limit: a pool that is full would make arrivals wait for answers."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        timeout = httpx.Timeout(self.deadline_s + _BEYOND_DEADLINE_S)
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False)


@dataclass(frozen=True)
class Planned:
    """A request to be sent. arrival: seconds from the start; what: {"prompt": ...} or {"messages": ...}."""

    arrival: float
    model: str
    what: Mapping[str, Any]
    max_tokens: int
    warm_up: bool = False


@dataclass
class Record:
    """What became of a request; times in seconds from the start of the run.

    Attributes:
        arrival: when it was due. sent: None where it was not. first, last: its first and last token, None without any.
        prompt_tokens, output_tokens: as the server counts them in `usage`; without it, output tokens are token_ids or
            else chunks that came, and prompt tokens are unknown.
        error: its kind, "" where the answer is complete.
    """

    arrival: float
    model: str
    warm_up: bool
    sent: float | None = None
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    status: int | None = None
    error: str = ""

    @property
    def ttft_ms(self) -> float | None:
        """From the moment it was due: waiting in the load generator counts too."""
        return None if self.first is None else 1000 * (self.first - self.arrival)

    @property
    def ttft_from_send_ms(self) -> float | None:
        return None if self.first is None or self.sent is None else 1000 * (self.first - self.sent)

    @property
    def tpot_ms(self) -> float | None:
        """(last - first) / (n - 1); None of a single token."""
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return 1000 * (self.last - self.first) / (self.output_tokens - 1)

    @property
    def e2e_ms(self) -> float | None:
        return None if self.last is None else 1000 * (self.last - self.arrival)

    @property
    def lag_ms(self) -> float | None:
        """How late it was sent."""
        return None if self.sent is None else 1000 * (self.sent - self.arrival)


class _Failure(Exception):
    """An answer that is not one; the message is its kind."""


async def send(client: httpx.AsyncClient, target: Target, planned: Planned, started: float) -> Record:
    """Send one request and read its stream. What goes wrong is in the record; nothing is raised.

    Args:
        started: time.perf_counter() at the start of the run.
    """
    record = Record(planned.arrival, planned.model, planned.warm_up, time.perf_counter() - started)
    try:
        async with asyncio.timeout(target.deadline_s):
            await _stream(client, target, planned, record, started)
    except (TimeoutError, httpx.TimeoutException):
        record.error = "deadline"
    except httpx.ConnectError:
        record.error = "no connection"
    except httpx.InvalidURL:
        record.error = "no address"
    except (httpx.HTTPError, httpx.StreamError):
        record.error = "connection broken"
    except _Failure as failure:
        record.error = str(failure)
    record.ended = time.perf_counter() - started
    return record


async def _stream(client: httpx.AsyncClient, target: Target, planned: Planned, record: Record, started: float) -> None:
    path = "chat/completions" if target.endpoint == "chat" else "completions"
    body = {
        "model": planned.model,
        **planned.what,
        "max_tokens": planned.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    async with client.stream("POST", target.address(path), json=body) as response:
        record.status = response.status_code
        if response.status_code != 200:
            raise _Failure(f"http {response.status_code}")
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise _Failure("not a stream")
        complete = False
        async for data in _events(response):
            if data == "[DONE]":
                complete = True
                break
            complete |= _take(data, record, time.perf_counter() - started)
    if not complete:
        raise _Failure("cut short")
    if record.first is None:
        raise _Failure("no tokens")


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """Data of server-sent events, one line each as all OpenAI-compatible servers send them."""
    buffer = b""
    async for chunk in response.aiter_bytes():
        *lines, buffer = (buffer + chunk).split(b"\n")
        if len(buffer) > _LONGEST_LINE:
            raise _Failure("endless line")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", "replace")


def _take(data: str, record: Record, now: float) -> bool:
    """Note what an event brings. Returns whether it ends the answer."""
    try:
        event = json.loads(data)
    except (json.JSONDecodeError, RecursionError):
        raise _Failure("not JSON") from None
    except ValueError:  # a number of more digits than Python reads
        raise _Failure("not understood") from None
    if not isinstance(event, dict) or event.get("error"):
        raise _Failure("error in the stream")
    try:
        return _noted(event, record, now)
    except (AttributeError, TypeError, ValueError, KeyError):  # JSON of another shape than OpenAI's
        raise _Failure("not understood") from None


def _noted(event: Mapping[str, Any], record: Record, now: float) -> bool:
    usage = event.get("usage")
    finished = False
    for choice in event.get("choices") or []:
        text = choice.get("text") or (choice.get("delta") or {}).get("content")
        tokens = len(choice.get("token_ids") or ()) or bool(text)
        finished |= choice.get("finish_reason") is not None
        if tokens or (finished and record.first is None):
            record.first = now if record.first is None else record.first
            record.last = now
        record.output_tokens += tokens
    if usage:
        record.prompt_tokens = _count(usage.get("prompt_tokens"))
        record.output_tokens = _count(usage.get("completion_tokens")) or record.output_tokens
    return finished


def _count(value: object) -> int | None:
    """A number of tokens. Raises ValueError for anything else: a report is added up from these."""
    if value is not None and not (type(value) is int and 0 <= value <= _MOST_TOKENS):
        raise ValueError(value)
    return value
