"""One streaming request to an OpenAI-compatible server, and when its tokens arrived."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from qsun.data.jsonl import check_text
from qsun.errors import QsunError
from qsun.serve.http.wire import DONE, BrokenStream, data_events, error_message, parse_event, tokens_in, usage_count

ENDPOINTS = ("completions", "chat")
NOT_SENT = "not sent"
_BEYOND_DEADLINE_S = 5.0  # httpx's own timeouts, in case of a wait that the deadline does not cover


def check_sendable(value: Any, where: str) -> None:
    """Raise QsunError for what Python reads from JSON and no request can carry: NaN, half a surrogate pair."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise QsunError(f"{where}: NaN and Infinity are not JSON; use a finite number or null") from None
    check_text(text, where)


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        url: such as http://127.0.0.1:8000, with or without /v1. endpoint: "completions" or "chat".
        api_key: sent as a bearer token. extra: fields of every body, such as {"ignore_eos": true} for vLLM and qsun.
        deadline_s: seconds from its send after which a request is given up.
    """

    url: str
    endpoint: str = ENDPOINTS[0]
    api_key: str = field(default="", repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    deadline_s: float = 120.0

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise QsunError(f"endpoint {self.endpoint!r} is not known; use {' or '.join(ENDPOINTS)}")
        try:
            valid = httpx.URL(self.url).scheme in ("http", "https")
        except (httpx.InvalidURL, UnicodeEncodeError):
            valid = False
        if not valid:
            raise QsunError(f"url {self.url!r} is not an http address; use one such as http://127.0.0.1:8000")
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise QsunError("the API key cannot be sent in an HTTP header; use printable ASCII characters")
        if not self.deadline_s > 0:
            raise QsunError(f"deadline {self.deadline_s:g} is out of range; use more than 0 seconds")
        check_sendable(self.extra, "extra-body")

    @property
    def path(self) -> str:
        return "chat/completions" if self.endpoint == "chat" else "completions"

    def address(self, path: str) -> str:
        return f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"

    def client(self) -> httpx.AsyncClient:
        """Return a client without a limit on connections: with a full pool, arrivals would wait for answers."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        timeout = httpx.Timeout(self.deadline_s + _BEYOND_DEADLINE_S)
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False)


@dataclass(frozen=True)
class PlannedRequest:
    """A request to send. arrival: seconds from the start; fields: {"prompt": ...} or {"messages": ...}."""

    arrival: float
    model: str
    fields: Mapping[str, Any]
    max_tokens: int
    warm_up: bool = False


@dataclass
class Record:
    """What became of a request; times in seconds from the start of the run.

    Attributes:
        arrival: when it was due. sent: None if it was not. first, last: its first and last token; None if none came.
        prompt_tokens, output_tokens: the server's `usage`. Without it, output tokens are counted from token_ids or
            chunks, and prompt tokens are unknown.
        error: its kind, "" if the answer is complete.
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
        """Time to first token from when the request was due: waiting in the load generator counts too."""
        return None if self.first is None else 1000 * (self.first - self.arrival)

    @property
    def ttft_from_send_ms(self) -> float | None:
        return None if self.first is None or self.sent is None else 1000 * (self.first - self.sent)

    @property
    def tpot_ms(self) -> float | None:
        """(last - first) / (n - 1); None for a single token."""
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


async def send(client: httpx.AsyncClient, target: Target, planned: PlannedRequest, started: float) -> Record:
    """Send one request and read its stream. Failures are in the record; nothing is raised.

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
        record.error = "invalid address"
    except (httpx.HTTPError, httpx.StreamError):
        record.error = "connection broken"
    except BrokenStream as broken:
        record.error = str(broken)
    record.ended = time.perf_counter() - started
    return record


async def _stream(
    client: httpx.AsyncClient, target: Target, planned: PlannedRequest, record: Record, started: float
) -> None:
    body = {
        "model": planned.model,
        **planned.fields,
        "max_tokens": planned.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    async with client.stream("POST", target.address(target.path), json=body) as response:
        record.status = response.status_code
        if response.status_code != 200:
            raise BrokenStream(f"http {response.status_code}")
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise BrokenStream("not a stream")
        complete = False
        async for data in data_events(response.aiter_bytes()):
            if data == DONE:
                complete = True
                break
            complete |= _take(parse_event(data), record, time.perf_counter() - started)
    if not complete:
        raise BrokenStream("cut short")
    if record.first is None:
        raise BrokenStream("no tokens")


def _take(event: Mapping[str, Any], record: Record, now: float) -> bool:
    """Note what an event brings. Returns whether it ends the answer."""
    if error_message(event) is not None:
        raise BrokenStream("error in the stream")
    tokens = tokens_in(event)
    finished = any(choice.get("finish_reason") is not None for choice in event.get("choices") or ())
    if tokens or (finished and record.first is None):
        record.first = now if record.first is None else record.first
        record.last = now
    record.output_tokens += tokens
    if event.get("usage") is not None:
        record.prompt_tokens = usage_count(event, "prompt_tokens")
        record.output_tokens = usage_count(event, "completion_tokens") or record.output_tokens
    return finished
