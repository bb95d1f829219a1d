"""The bodies of one transfer of KV cache: to the prefill worker, and with what it answers to the decode worker.

A prefill worker computes the prompt's KV cache and answers with transfer parameters that name its blocks. A decode
worker that gets them reads those blocks, computes the last prompt token itself and generates. vLLM checks none of it:

* without parameters a decode worker computes the prompt with its own weights and answers 200: such a request is never
  sent (`transfer_of` raises), but for a prompt of one token, of whose KV cache nothing is used: the decode worker
  computes the last prompt token in any case, and the answer is the same with and without them;
* with parameters that name no blocks its engine stops on an assertion: they count as missing;
* parameters that were used before, or were invented, read somebody's blocks: they exist in no other place than between
  the two requests of one attempt.

Facts: vLLM's NixlConnector (nixl/pull_scheduler.py), and a real vLLM (tests/vllm).
"""

from collections.abc import Mapping
from typing import Any

from qsun.serve.router.exchange.request import CHAT, RoutedRequest

# what only shapes the answer; the prefill worker's is thrown away
_ANSWER_ONLY = (
    "stream_options",
    "stream_interval",
    "min_tokens",
    "logprobs",
    "top_logprobs",
    "logprob_token_ids",
    "return_token_ids",
)
# refused where a request is read, and never sent: with it vLLM drops the transferred KV cache without a word
_NEVER = "prompt_logprobs"
_WANTED: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_NAMED = ("remote_engine_id", "remote_host", "remote_port")
_SALT_CHARACTERS = 128


class NoTransfer(Exception):
    """A prefill worker answered without usable transfer parameters."""


def prefill_body(request: RoutedRequest, served_name: str) -> dict[str, Any]:
    """What the prefill worker gets: the whole prompt, one token to generate, and the wish for transfer parameters."""
    body = {key: value for key, value in request.body.items() if key not in _ANSWER_ONLY and key != _NEVER}
    body |= {"model": served_name, "stream": False, "max_tokens": 1, "kv_transfer_params": dict(_WANTED)}
    if request.path == CHAT:
        body["max_completion_tokens"] = 1
    return body


def transfer_of(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Transfer parameters of a prefill worker's answer; None where the prompt is one token and has none.

    Raises:
        NoTransfer: they are missing, or name no blocks.
    """
    params = answer.get("kv_transfer_params")
    if params is None and prompt_tokens_of(answer) == 1:
        return None
    if not isinstance(params, dict):
        raise NoTransfer("it answered without kv_transfer_params; is it a kv_producer?")
    if params.get("do_remote_prefill") is not True or any(params.get(name) is None for name in _NAMED):
        raise NoTransfer("its kv_transfer_params do not say where the blocks are")
    if not _has_blocks(params.get("remote_block_ids")):
        raise NoTransfer("its kv_transfer_params name no blocks")
    return params


def _has_blocks(ids: object) -> bool:
    """Block ids are a list, or one list a group of layers."""
    return isinstance(ids, list) and any(group if isinstance(group, list) else True for group in ids)


def prompt_tokens_of(answer: Mapping[str, Any]) -> int | None:
    """The number of prompt tokens that a worker counted."""
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def decode_body(
    request: RoutedRequest, served_name: str, prefill_name: str, params: dict[str, Any] | None, max_tokens: int
) -> dict[str, Any]:
    """What the decode worker gets: the client's request, and the prompt's KV cache.

    The cache salt keeps the prefix caches of modules apart: the same prompt has another KV cache in each. It is sent
    whether the worker caches or not.
    """
    body = dict(request.body) | {"model": served_name, "cache_salt": prefill_name[:_SALT_CHARACTERS]}
    body.pop(_NEVER, None)
    body["max_tokens"] = max_tokens
    if request.path == CHAT and "max_completion_tokens" in body:
        body["max_completion_tokens"] = max_tokens
    if params is not None:
        body["kv_transfer_params"] = params
    if request.stream:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return body
