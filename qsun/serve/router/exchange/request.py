"""A client's request, read and checked before a worker sees it.

Transfer parameters name raw blocks of KV cache on other machines. A client must not send any, and they are for one
prompt and one answer; so whatever would need more than that, or prompt tokens that the decode worker would compute with
its own weights (prompt logprobs make vLLM do that), is refused with a reason.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qsun.serve.cluster.schema import RequestLimits
from qsun.serve.http.errors import HttpError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CHARACTERS_PER_TOKEN = 4
_DEFAULT_MAX_TOKENS = 16  # of /v1/completions, OpenAI's and vLLM's
# never from a client: they name blocks, share caches, or name requests of others
_DROPPED = frozenset({"cache_salt", "request_id", "session_id", "vllm_xargs", "data_parallel_rank", "priority"})
_DROPPED_SUFFIX = "transfer_params"
_ONE = ("n", "best_of")
_REFUSED = {
    "echo": "the decode worker does not compute the prompt's tokens",
    "prompt_logprobs": "the decode worker would compute the prompt with its own weights",
    "use_beam_search": "the prompt's KV cache is transferred for one sequence",
    "prompt_embeds": "only text and token ids are taken",
    "suffix": "the modules do not insert",
}
_SWITCHES = ("echo", "use_beam_search")  # only these are off where they are false: vLLM reads a false number as 0


@dataclass(frozen=True)
class RoutedRequest:
    """What the router needs to know of a request.

    Attributes:
        path: COMPLETIONS or CHAT. model: the client's name of it.
        body: the client's, without what is never passed on.
        max_tokens: to generate; None where a chat leaves it open.
        prompt_tokens: estimated for text.
    """

    path: str
    model: str
    body: Mapping[str, Any]
    stream: bool
    include_usage: bool
    max_tokens: int | None
    prompt_tokens: int


def read_request(path: str, raw: bytes, models: Collection[str], limits: RequestLimits) -> RoutedRequest:
    """Parse and check a body.

    Raises:
        HttpError: 400 or 404, naming the field.
    """
    body = _json_object(raw)
    model = body.get("model")
    if not isinstance(model, str) or model not in models:
        known = ", ".join(models)
        raise HttpError(404, f"model {str(model)[:100]!r} is not served; use one of {known}", param="model")
    body = {key: v for key, v in body.items() if key not in _DROPPED and not key.endswith(_DROPPED_SUFFIX)}
    _refuse_what_cannot_be_right(body)
    prompt_tokens = _chat_tokens(body) if path == CHAT else _prompt_tokens(body)
    if prompt_tokens > limits.prompt_tokens:
        param, limit = "messages" if path == CHAT else "prompt", limits.prompt_tokens
        raise HttpError(400, f"{param}: about {prompt_tokens} tokens; the limit is {limit}, send less", param=param)
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise HttpError(400, f"stream {stream!r} is not taken; use true or false", param="stream")
    return RoutedRequest(
        path,
        model,
        body,
        stream,
        _include_usage(body, stream),
        _max_tokens(path, body, limits),
        prompt_tokens,
    )


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw, parse_constant=_no_constant)
        # as a worker will be sent it: 1e999 parses to an infinity, "\ud800" to half of a character, and neither can be
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(body, dict):
        raise HttpError(400, "the body is no JSON object; send one with model and prompt or messages")
    return body


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _refuse_what_cannot_be_right(body: dict[str, Any]) -> None:
    """What is refused in one form is dropped in every other: no worker sees the field."""
    for name in _ONE:
        if body.get(name) not in (None, 1) or isinstance(body.get(name), bool):
            shown = str(body[name])[:20]
            raise HttpError(400, f"{name} {shown} is not taken: one answer a request; send it {name} times", param=name)
    for name, reason in _REFUSED.items():
        value = body.pop(name, None)
        if value is not None and not (value is False and name in _SWITCHES):
            raise HttpError(400, f"{name} is not taken: {reason}; leave it out", param=name)


def _max_tokens(path: str, body: Mapping[str, Any], limits: RequestLimits) -> int | None:
    name = "max_completion_tokens" if path == CHAT and body.get("max_completion_tokens") is not None else "max_tokens"
    value = body.get(name)
    if value is None:
        return None if path == CHAT else min(_DEFAULT_MAX_TOKENS, limits.max_tokens)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limits.max_tokens:
        message = f"{name} {str(value)[:30]} is not taken; use a whole number from 1 to {limits.max_tokens}"
        raise HttpError(400, message, param=name)
    return value


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream or not isinstance(options, dict):
        raise HttpError(400, "stream_options is for stream: true, and an object; leave it out", param="stream_options")
    return bool(options.get("include_usage"))


def _prompt_tokens(body: dict[str, Any]) -> int:
    """Of /v1/completions. A list with one prompt in it becomes that prompt."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = body["prompt"] = prompt[0]
    if isinstance(prompt, str):
        return -(-len(prompt) // CHARACTERS_PER_TOKEN)
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return len(prompt)
    if isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], (str, list)):
        raise HttpError(400, f"{len(prompt)} prompts in one request are not taken; send each by itself", param="prompt")
    raise HttpError(400, "prompt is no text and no list of token ids; send one of them", param="prompt")


def _chat_tokens(body: Mapping[str, Any]) -> int:
    """Of messages and tools, by their length as JSON: the template writes both out."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise HttpError(400, "messages is no list of messages; send [{role, content}, ...]", param="messages")
    characters = sum(len(str(message.get("content") or "")) + CHARACTERS_PER_TOKEN for message in messages)
    characters += len(str(body["tools"])) if body.get("tools") else 0
    return -(-characters // CHARACTERS_PER_TOKEN)
