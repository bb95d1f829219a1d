"""The two bodies of one KV transfer: to the prefill worker, and with what it answers to the decode worker.

A prefill worker computes the prompt's KV cache and answers with transfer parameters that name its blocks. A decode
worker reads those blocks, computes the last prompt token itself and generates. vLLM checks none of this:

* without parameters a decode worker computes the prompt with its own weights and answers 200. The router never sends
  such a request (`transfer_of` raises), except for a prompt of one token: the decode worker computes the last prompt
  token in any case, so the answer is the same;
* parameters that name no blocks stop its engine on an assertion: they count as missing;
* parameters that were used before or invented read another request's KV blocks: they exist only between the two
  requests of one attempt.

Both workers must render the same prompt, so `tools` goes to both. Tool choice, response format and other constraints
are for the answer only: the prefill worker's single token is thrown away, and needs no grammar and no tool parser.

Facts: vLLM's NixlConnector (nixl/pull_scheduler.py), and a real vLLM (tests/vllm).
"""

from collections.abc import Mapping
from typing import Any

from qsun.serve.http.wire import usage_count
from qsun.serve.router.exchange.request import CHAT, RoutedRequest

# these only shape the answer, and the prefill worker's is thrown away
_ANSWER_ONLY = frozenset(
    {
        "stream_options",
        "stream_interval",
        "min_tokens",
        "logprobs",
        "top_logprobs",
        "logprob_token_ids",
        "return_token_ids",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "guided_decoding_backend",
        "thinking_token_budget",
        "tool_choice",
        "parallel_tool_calls",
    }
)
# refused when a request is read, and never sent: with it vLLM silently drops the transferred KV cache
_NEVER = "prompt_logprobs"
_WANTED: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_NAMED = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")  # a decode worker hangs without one
_SALT_CHARACTERS = 128


class NoTransfer(Exception):
    """A prefill worker answered without usable transfer parameters."""


def prefill_body(request: RoutedRequest, served_name: str) -> dict[str, Any]:
    """Return the body for the prefill worker: the whole prompt, one token, and a request for transfer parameters."""
    body = {key: value for key, value in request.body.items() if key not in _ANSWER_ONLY and key != _NEVER}
    body |= {"model": served_name, "stream": False, "max_tokens": 1, "kv_transfer_params": dict(_WANTED)}
    if request.path == CHAT:
        body["max_completion_tokens"] = 1
        if "tools" in body:
            body["tool_choice"] = "none"  # vLLM still writes the tools into the prompt, and parses no calls
    return body


def transfer_of(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the transfer parameters of a prefill worker's answer; None for a prompt of one token without any.

    Raises:
        NoTransfer: they are missing, or name no blocks.
        BrokenStream: the answer's token count is invalid.
    """
    params = answer.get("kv_transfer_params")
    if params is None and usage_count(answer, "prompt_tokens") == 1:
        return None
    if not isinstance(params, dict):
        raise NoTransfer("it answered without kv_transfer_params; is it a kv_producer?")
    if params.get("do_remote_prefill") is not True or any(params.get(name) is None for name in _NAMED):
        raise NoTransfer("its kv_transfer_params do not say where the blocks are")
    if not _has_blocks(params.get("remote_block_ids")):
        raise NoTransfer("its kv_transfer_params name no blocks")
    return params


def _has_blocks(ids: object) -> bool:
    """Block ids are a list, or one list for each group of layers."""
    return isinstance(ids, list) and any(group if isinstance(group, list) else True for group in ids)


def decode_body(
    request: RoutedRequest, served_name: str, prefill_name: str, params: dict[str, Any] | None, max_tokens: int | None
) -> dict[str, Any]:
    """Return the body for the decode worker: the client's request and the prompt's KV cache.

    Args:
        max_tokens: None leaves the length to the worker.

    The cache salt separates the modules in a prefix cache: the same prompt has another KV cache in each of them.
    """
    body = dict(request.body) | {"model": served_name, "cache_salt": prefill_name[:_SALT_CHARACTERS]}
    body.pop(_NEVER, None)
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if request.path == CHAT and "max_completion_tokens" in body:
        body["max_completion_tokens"] = max_tokens
    if params is not None:
        body["kv_transfer_params"] = params
    if request.stream:
        # with tools the two workers get different bodies, so the first event must show that the prompt is the same
        usage = {"include_usage": True} | ({"continuous_usage_stats": True} if "tools" in body else {})
        body["stream_options"] = {**body.get("stream_options", {}), **usage}
    return body
