"""Routes whose bodies are JSON that answers can repeat."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from qsun.serve.http.json_body import parse_json


class JsonRoute(APIRoute):
    """A route that refuses a body with NaN, an infinity or half a character, whichever of its fields has it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        try:
            return parse_json(await self.body())
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None  # which the framework expects
