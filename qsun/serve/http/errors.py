"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping
from typing import Any

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    502: "upstream_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class HttpError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status. message: one line that names the value, the limit and the fix.
        param: the field of the body that is wrong. headers: more response headers.
        code: what programs look for, such as context_length_exceeded; None: the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.headers, self.code = dict(headers or {}), code

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        code = self.code or self.status
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}

    def encoded(self) -> bytes:
        return json.dumps(self.body()).encode()


def busy(message: str, retry_after_seconds: float) -> HttpError:
    """Return a 429 with the time after which another try may succeed."""
    return HttpError(429, message, headers={"Retry-After": str(max(1, round(retry_after_seconds)))})
