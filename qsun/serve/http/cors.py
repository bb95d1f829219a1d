"""Browser pages of other origins that may call the API. None may by default: any page can reach a loopback address."""

from collections.abc import Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware


def with_cors(app: Any, origins: Sequence[str]) -> Any:
    """Answer preflight requests of these origins ("*": all) before the guard, as browsers send no key with them."""
    if not origins:
        return app
    exposed = ["X-Request-Id", "Retry-After"]
    return CORSMiddleware(
        app, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
    )
