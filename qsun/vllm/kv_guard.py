"""A decode worker that refuses requests without KV cache: `--middleware qsun.vllm.kv_guard.RequireKvCache`.

vLLM answers such a request with status 200 and text of the decode module alone, where a prefill module was asked for.
This is ASGI middleware of vLLM's HTTP server. Its server does not start without the plugin's other guard, which works
in the scheduler (preemption.py).
"""

import json
from typing import Any

from qsun.vllm import preemption
from qsun.vllm.startup import refuse_to_start

_GENERATES = ("/v1/completions", "/v1/chat/completions")
_COMPUTES_NOTHING = ("/tokenize", "/detokenize")  # and needs no KV cache
# without one of these NixlConnector loads nothing (nixl/pull_scheduler.py)
_NAMED = ("remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port")


class RequireKvCache:
    """Lets a POST pass if it names the KV cache of its prompt, or its prompt is one token, which needs none.

    Raises:
        QsunError: vLLM would compute the prompt of a preempted request again. The server ends.
    """

    def __init__(self, app: Any):
        if fault := preemption.fault():
            refuse_to_start(
                f"vLLM would compute a preempted request's prompt with the decode module's weights: {fault}"
            )
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        if not path or scope["method"] != "POST" or path.endswith(_COMPUTES_NOTHING):
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if not path.endswith(_GENERATES) or not _brings_kv_cache(body):
            await _refuse(send)
            return

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)


def _brings_kv_cache(raw: bytes) -> bool:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    if not isinstance(body, dict):
        return False
    params, prompt = body.get("kv_transfer_params"), body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], int):
        return True
    if not isinstance(params, dict) or params.get("do_remote_prefill") is not True:
        return False
    return bool(params.get("remote_block_ids")) and all(params.get(name) is not None for name in _NAMED)


async def _refuse(send: Any) -> None:
    message = "this decode worker answers only with the KV cache of a prefill worker; ask the router, not the worker"
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": 400}})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
