"""The checks before every HTTP handler: API keys, bounded bodies, a request id, and a limit on concurrent requests.

Without keys, a loopback address alone does not keep web pages out: a browser on this machine sends them anywhere. So a
body must say that it is JSON, which a page of another site may not send unasked, and `Host` must be no public name, as
it is for a page whose own name resolves to the loopback address (DNS rebinding).

It is plain ASGI middleware, so streams pass through it untouched and unbuffered.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import uuid
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qsun.config import Settings
from qsun.errors import QsunError
from qsun.serve.http.errors import HttpError, busy
from qsun.serve.http.keys import is_loopback

_OPEN = ("/health", "/ready", "/ready/any", "/metrics", "/version", "/openapi.json")  # for probes: without a key
_SOUND_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FEWEST_KEY_CHARACTERS = 8
_OPEN_BODY_BYTES = 1 << 12  # requests to open paths need no body


def _checked_key(key: str) -> str:
    if len(key) < _FEWEST_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise QsunError(  # in these words alone: the key itself must not be in an error
            f"an API key of {len(key)} characters is invalid; use {_FEWEST_KEY_CHARACTERS} or more printable ASCII "
            "characters without spaces"
        )
    return key


class GuardConfig(Settings):
    """Limits of the HTTP side.

    Attributes:
        api_keys: any of them gives access; empty: no key is needed. Health and metrics never need one.
        max_body_bytes: of a request.
        body_seconds: within which a request's body must arrive.
        max_requests: answered at a time; more get 429. Health and metrics do not count.
        host: the address that the server listens on. If it is a loopback address and there are no keys, requests must
            name this machine as their `Host`.
    """

    api_keys: tuple[Annotated[str, AfterValidator(_checked_key)], ...] = Field(default=(), repr=False)
    max_body_bytes: Annotated[int, Field(gt=0)] = 1 << 20
    body_seconds: Annotated[float, Field(gt=0)] = 30.0
    max_requests: Annotated[int, Field(gt=0)] = 1024
    host: str = ""


class Guard:
    """ASGI middleware. The request's id is in scope["state"]["request_id"] and in the answer's X-Request-Id.

    Attributes:
        running: requests being answered, except for health and metrics.
    """

    def __init__(self, app: ASGIApp, config: GuardConfig):
        self.app, self.config = app, config
        self.running = 0
        self._keys = [_digest(key) for key in config.api_keys]
        self._local = not self._keys and is_loopback(config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        answer = _AnswerSender(send, _request_id(headers))
        scope.setdefault("state", {})["request_id"] = answer.request_id
        try:
            await self._pass_on(scope, headers, receive, answer)
        except HttpError as error:
            await answer.error(error)
        except ClientGone:
            return

    async def _pass_on(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, answer: "_AnswerSender"
    ) -> None:
        guarded = scope["path"] not in _OPEN
        if guarded:
            self._check(headers)
        self.running += guarded  # from here on, as bodies take their time
        try:
            limit = self.config.max_body_bytes if guarded else min(_OPEN_BODY_BYTES, self.config.max_body_bytes)
            body = await self._body(headers, receive, limit)
            if body and guarded and self._local:
                _check_media_type(headers)
            await self.app(scope, _replayed(body, receive), answer.send)
        finally:
            self.running -= guarded

    def _check(self, headers: dict[bytes, bytes]) -> None:
        if self._keys:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = hashlib.sha256(key.strip()).digest()
            # every key is compared, so that the time does not depend on which of them is close
            known = [hmac.compare_digest(given, wanted) for wanted in self._keys]
            if kind.lower() != b"bearer" or not any(known):
                raise HttpError(
                    401, "no valid API key; send Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"}
                )
        if self._local:
            _check_host(headers.get(b"host"))
        if self.running >= self.config.max_requests:
            raise busy(f"{self.running} requests are running, which is the limit; try again later", 1)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
        if b"content-length" in headers and b"transfer-encoding" in headers:  # request smuggling: RFC 9112, 6.1
            raise HttpError(400, "Content-Length and Transfer-Encoding cannot be combined; send one", headers=_CLOSE)
        too_long = HttpError(413, f"the body is longer than {limit} bytes, which is the limit", headers=_CLOSE)
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            raise too_long
        try:
            async with asyncio.timeout(self.config.body_seconds):
                return await _read(receive, limit, too_long)
        except TimeoutError:
            seconds = self.config.body_seconds
            raise HttpError(408, f"the body did not arrive within {seconds:g} seconds", headers=_CLOSE) from None


def _check_media_type(headers: dict[bytes, bytes]) -> None:
    given = headers.get(b"content-type", b"").decode("latin-1")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        said = f"Content-Type {given!r:.60} is not supported" if given else "the body has no Content-Type"
        raise HttpError(415, f"{said}; send application/json")


def _check_host(given: bytes | None) -> None:
    """Raise HttpError if `Host` is a public domain name, which the owner of a web page could point at this machine."""
    if given is None:  # not from a browser
        return
    shown = given.decode("latin-1")
    try:
        name = (urlsplit(f"//{shown}").hostname or "").rstrip(".")
    except ValueError:
        name = "."
    if "." in name and not _is_address(name) and not name.endswith((".localhost", ".internal")):
        raise HttpError(
            403, f"Host {shown!r:.60} is not this machine's; use localhost, also in a proxy, or start with API keys"
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


class ClientStalled(Exception):
    """The client does not read its answer; the connection is dropped."""


async def disconnected(receive: Receive) -> None:
    """Return once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


_CLOSE = {"Connection": "close"}  # the unread rest of a body must not be read as another request


async def _read(receive: Receive, limit: int, too_long: HttpError) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_long
        if not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body that was read, and then what follows: a disconnect."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return pending.pop() if pending else await receive()

    return next_message


class _AnswerSender:
    """Sends an answer with the request's id."""

    def __init__(self, send: Send, request_id: str):
        self._send, self.request_id = send, request_id
        self._started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def error(self, error: HttpError) -> None:
        if self._started:  # the status has been sent; a stream reports its errors itself
            return
        headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        headers += [(b"content-type", b"application/json")]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": error.encoded()})


def _request_id(headers: dict[bytes, bytes]) -> str:
    """Return the client's own id where it is valid (it goes into logs and headers), or a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _SOUND_ID.fullmatch(given) else uuid.uuid4().hex


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
