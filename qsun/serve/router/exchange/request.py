"""A client's request, read and checked before a worker sees it.

Transfer parameters name raw KV blocks on other machines, for one prompt and one answer. A client must not send any, and
a request that needs more than that is refused with a reason: several answers, or prompt tokens that the decode worker
would compute with its own weights (vLLM does so for prompt logprobs). Unknown fields pass through.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qsun.serve.cluster.schema import RequestLimits
from qsun.serve.http.errors import HttpError
from qsun.serve.http.json_body import parse_json
from qsun.serve.router.exchange.answer_fields import check_answer_fields

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CHARACTERS_PER_TOKEN = 4
_BEGINNING = 512  # tokens or characters
_DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's API and vLLM
# never accepted from a client: they name blocks, share caches, or name other requests
_DROPPED = frozenset({"cache_salt", "request_id", "session_id", "vllm_xargs", "data_parallel_rank", "priority"})
_DROPPED_SUFFIX = "transfer_params"
_ONE = ("n", "best_of")
_REFUSED = {
    "echo": "the decode worker does not compute the prompt's tokens",
    "prompt_logprobs": "the decode worker would compute the prompt with its own weights",
    "use_beam_search": "the prompt's KV cache is transferred for one sequence",
    "prompt_embeds": "send text or token ids",
    "suffix": "the modules are not trained to insert text",
}
# values with which these fields ask for nothing; `prompt_logprobs: false` is not among them, as vLLM reads it as 0
_NEUTRAL = {"echo": False, "use_beam_search": False, "suffix": ""}


@dataclass(frozen=True)
class RoutedRequest:
    """What the router needs to know of a request.

    Attributes:
        path: COMPLETIONS or CHAT. model: as the client names it.
        body: the client's, without nulls and fields that are never passed on.
        include_usage: the client wants the usage at the end of a stream; continuous_usage: in every event.
        max_tokens: to generate; None if a chat leaves it open.
        prompt_tokens: an estimate for text.
    """

    path: str
    model: str
    body: Mapping[str, Any]
    stream: bool
    include_usage: bool
    max_tokens: int | None
    prompt_tokens: int
    continuous_usage: bool = False

    @property
    def beginning(self) -> str:
        """How the prompt begins, for prefix affinity: its first tokens or characters, or the first message."""
        prompt = self.body["messages"][0].get("content") if self.path == CHAT else self.body["prompt"]
        return str(prompt[:_BEGINNING] if isinstance(prompt, (str, list)) else prompt)


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
    body = _without_nulls(body)
    body = {key: v for key, v in body.items() if key not in _DROPPED and not key.endswith(_DROPPED_SUFFIX)}
    _refuse_wrong_prompts(body)
    tokens = prompt_tokens(path, body)
    if tokens > limits.prompt_tokens:
        param, limit = "messages" if path == CHAT else "prompt", limits.prompt_tokens
        raise HttpError(400, f"{param}: about {tokens} tokens; the limit is {limit}, send less", param=param)
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise HttpError(400, f"stream {stream!r:.30} is invalid; use true or false", param="stream")
    options = _stream_options(body, stream)
    include_usage, continuous = bool(options.get("include_usage")), bool(options.get("continuous_usage_stats"))
    max_tokens = _max_tokens(path, body, limits)
    check_answer_fields(body, is_chat=path == CHAT)
    return RoutedRequest(path, model, body, stream, include_usage, max_tokens, tokens, include_usage and continuous)


def prompt_tokens(path: str, body: dict[str, Any]) -> int:
    """Count the tokens of a request's prompt, for text by its length. Raises HttpError for one of another shape."""
    return _chat_tokens(body) if path == CHAT else _prompt_tokens(body)


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = parse_json(raw)
    except ValueError as error:
        raise HttpError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise HttpError(400, "the body is not a JSON object; send one with model and prompt or messages")
    return body


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """Drop nulls, which ask for nothing; vLLM refuses some. A message's null content stays, as templates read it."""
    body = {key: value for key, value in body.items() if value is not None}
    if isinstance(body.get("messages"), list):
        body["messages"] = [_without_null_fields(message) for message in body["messages"]]
    if "stream_options" in body:
        body["stream_options"] = _without_null_fields(body["stream_options"])
    return body


def _without_null_fields(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: field for key, field in value.items() if field is not None or key == "content"}


def _refuse_wrong_prompts(body: dict[str, Any]) -> None:
    """Refuse what cannot be answered right; drop these fields in every other form, so that no worker sees them."""
    for name in _ONE:
        if name in body and (body[name] != 1 or isinstance(body[name], bool)):
            message = f"{name} {body[name]!r:.20} is not supported: one answer per request; send it {name} times"
            raise HttpError(400, message, param=name)
    for name, reason in _REFUSED.items():
        value, neutral = body.pop(name, None), _NEUTRAL.get(name)
        if value is not None and not (type(value) is type(neutral) and value == neutral):
            raise HttpError(400, f"{name} is not supported: {reason}; leave it out", param=name)
    cut = body.get("truncate_prompt_tokens")
    if isinstance(cut, (int, float)) and cut < 0:  # vLLM cuts to what max_tokens leaves, which differs for the workers
        message = f"truncate_prompt_tokens {cut} is not supported; send a number of tokens"
        raise HttpError(400, message, param="truncate_prompt_tokens")


def _max_tokens(path: str, body: Mapping[str, Any], limits: RequestLimits) -> int | None:
    name = "max_completion_tokens" if path == CHAT and "max_completion_tokens" in body else "max_tokens"
    value = body.get(name)
    if value is None:
        return None if path == CHAT else min(_DEFAULT_MAX_TOKENS, limits.max_tokens)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limits.max_tokens:
        message = f"{name} {value!r:.30} is invalid; use a whole number from 1 to {limits.max_tokens}"
        raise HttpError(400, message, param=name)
    return value


def _stream_options(body: dict[str, Any], stream: bool) -> dict[str, Any]:
    """Return the stream options. Without a stream, empty ones or those that are all false ask for nothing."""
    options = body.get("stream_options", {})
    if isinstance(options, dict) and (stream or not any(options.values())):
        if not stream:
            body.pop("stream_options", None)
        return options
    raise HttpError(400, "stream_options is an object that needs stream: true; leave it out", param="stream_options")


def _prompt_tokens(body: dict[str, Any]) -> int:
    """Count the prompt of /v1/completions. A list with one prompt in it becomes that prompt."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = body["prompt"] = prompt[0]
    if isinstance(prompt, str):
        return -(-len(prompt) // CHARACTERS_PER_TOKEN)
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return len(prompt)
    if isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], (str, list)):
        message = f"{len(prompt)} prompts in one request are not supported; send each by itself"
        raise HttpError(400, message, param="prompt")
    raise HttpError(400, "prompt must be text or a list of token ids", param="prompt")


def _chat_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the tokens of messages and tools from their length: the template writes both into the prompt."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise HttpError(400, "messages must be a list of messages, [{role, content}, ...]", param="messages")
    characters = sum(len(str(message.get("content") or "")) + CHARACTERS_PER_TOKEN for message in messages)
    characters += len(str(body["tools"])) if body.get("tools") else 0
    return -(-characters // CHARACTERS_PER_TOKEN)
