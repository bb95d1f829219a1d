"""A decode worker answers no request that brings no KV cache."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from qsun.vllm import preemption
from qsun.vllm.kv_guard import RequireKvCache

PARAMS = {
    "do_remote_prefill": True,
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_block_ids": [[1]],
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
}


async def echoed(request: Request):
    return JSONResponse(await request.json() if request.method == "POST" else {})


@pytest.fixture(autouse=True)
def with_the_plugin(monkeypatch):
    monkeypatch.setattr(preemption, "fault", str)


def ask(path, body=None):
    async def scenario():
        app = Starlette(routes=[Route("/{path:path}", echoed, methods=["GET", "POST"])])
        transport = httpx.ASGITransport(RequireKvCache(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
            return await (client.get(path) if body is None else client.post(path, json=body))

    return asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_with_kv_cache_passes_with_its_body(path):
    body = {"prompt": "a b", "kv_transfer_params": PARAMS}
    assert ask(path, body).json() == body


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        [],
        PARAMS | {"do_remote_prefill": False},
        PARAMS | {"remote_block_ids": []},
        PARAMS | {"remote_port": None},
    ]
    + [{key: value for key, value in PARAMS.items() if key != missing} for missing in PARAMS],
)
def test_a_request_without_it_is_refused(params):
    for path in ("/v1/completions", "/v1/chat/completions/"):
        answer = ask(path, {"prompt": "a b", "kv_transfer_params": params})
        assert answer.status_code == 400
        assert "only with the KV cache of a prefill worker" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/messages", "/inference/v1/generate", "/invocations", "/pooling"]
)
def test_other_ways_to_compute_a_prompt_are_closed(path):
    assert ask(path, {"prompt": "a b", "kv_transfer_params": PARAMS}).status_code == 400


def test_what_needs_no_kv_cache_passes():
    assert ask("/v1/completions", {"prompt": [5]}).status_code == 200
    assert ask("/tokenize", {"prompt": "a b"}).status_code == 200
    assert ask("/v1/models").status_code == 200
    assert ask("/v1/completions", "not an object").status_code == 400
