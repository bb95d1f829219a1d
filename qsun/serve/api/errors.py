"""Errors in OpenAI's form, also those that the framework finds."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from qsun.serve.http.errors import HttpError

DESCRIBED: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in (
        (400, "The body asks for something that cannot be done; the message says what."),
        (401, "No valid API key."),
        (403, "The server has no API keys, and the request's Host is not this machine."),
        (404, "No such model."),
        (408, "The body did not arrive in time."),
        (413, "The body is too long."),
        (415, "The body's Content-Type is not application/json."),
        (429, "The server is full; Retry-After says when to try again."),
        (500, "The model failed."),
        (503, "The server is shutting down."),
        (504, "The answer was not ready in time."),
    )
}
_LONGEST_MESSAGE = 500


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HttpError)
    async def known(_: Request, error: HttpError) -> Response:
        return Response(error.encoded(), error.status, error.headers, "application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return await known(_, _first(error.errors()))

    @app.exception_handler(HTTPException)
    async def routing(_: Request, error: HTTPException) -> Response:
        return await known(_, HttpError(error.status_code, str(error.detail), headers=error.headers))


def _first(found: Sequence[dict[str, Any]]) -> HttpError:
    """Return the most telling error of a validation."""
    if found[0]["type"] == "json_invalid":
        return HttpError(400, f"the body is not JSON: {found[0]['ctx']['error']}")
    # of a field that may be of several types, what is wrong with the type that was given
    told = next((one for one in found if not one["type"].endswith(("_type", "_parsing"))), found[0])
    if told["type"] == "wrong_field":
        return HttpError(400, told["msg"], told["ctx"]["field"])
    field = ".".join(str(part) for part in told["loc"][1:] if not _is_branch(part)) or None
    message = f"{field or 'the body'}: {told['msg'].removeprefix('Value error, ')}"
    if told["type"] == "literal_error":
        message += f", not {told['input']!r:.80}"
    return HttpError(400, message[:_LONGEST_MESSAGE], field)


def _is_branch(part: object) -> bool:
    """Return whether it is pydantic's name of a branch of a union, or of a check, and not a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "literal", "NamedChoice", "list"))
