"""Browsers: which pages may call the API, with and without API keys."""

import httpx
import pytest

from qsun.serve.http.cors import with_cors
from qsun.serve.http.guard import Guard, GuardConfig
from tests.serve.http.test_guard import echo

PREFLIGHT = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
PREFLIGHT |= {"Access-Control-Request-Headers": "authorization,content-type"}


def ask(origins, method, headers):
    import asyncio

    async def scenario():
        app = with_cors(Guard(echo, GuardConfig(api_keys=("a-key-of-some-length",))), origins)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.request(method, "/v1/x", headers=headers)

    return asyncio.run(scenario())


@pytest.mark.parametrize("origins", [["https://chat.example"], ["*"]])
def test_a_page_of_an_allowed_origin_may_ask(origins):
    answer = ask(origins, "OPTIONS", PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] in ("*", "https://chat.example")
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    refused = ask(origins, "POST", {"Origin": "https://chat.example"})
    assert refused.status_code == 401  # the page can read why
    assert refused.headers["access-control-allow-origin"] in ("*", "https://chat.example")


def test_other_pages_may_not():
    assert ask(["https://chat.example"], "OPTIONS", PREFLIGHT | {"Origin": "https://other.example"}).status_code == 400
    answer = ask([], "OPTIONS", PREFLIGHT)
    assert answer.status_code == 401
    assert "access-control-allow-origin" not in answer.headers
