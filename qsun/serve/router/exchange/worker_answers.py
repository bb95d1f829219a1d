"""Whether a decode worker's answer is whole, how many tokens it has, and which part of it the client sees."""

from collections.abc import Mapping
from typing import Any

from qsun.serve.http.wire import BrokenStream, error_message, tokens_in, usage_count
from qsun.serve.router.exchange.request import RoutedRequest

# vLLM ends a request with these if its engine stops or the KV cache did not arrive: the text is cut off
_CUT_OFF = ("abort", "error")


def checked_tokens(answer: Mapping[str, Any], prompt_tokens: int | None = None) -> int:
    """Return the number of tokens in an answer or in an event of a stream.

    Args:
        prompt_tokens: as the prefill worker counted them; the decode worker must have read as many.
    Raises:
        BrokenStream: the answer reports an error, is cut off, or is for another prompt.
    """
    error = error_message(answer)
    if error is not None:
        raise BrokenStream(f"error {error}")
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BrokenStream("an answer without choices")
    for choice in choices:
        if choice.get("finish_reason") in _CUT_OFF:
            raise BrokenStream(f"finish_reason {choice['finish_reason']}")
    read = usage_count(answer, "prompt_tokens")
    if prompt_tokens and read and read != prompt_tokens:
        raise BrokenStream(f"it reads {read} prompt tokens where the prefill worker read {prompt_tokens}")
    return tokens_in(answer)


def for_client(answer: dict[str, Any], request: RoutedRequest) -> dict[str, Any] | None:
    """Return an answer or event with the client's model name and without transfer parameters.

    None for an event with nothing but a usage that the router asked for and the client did not.
    """
    shown = {key: value for key, value in answer.items() if not key.endswith("transfer_params")}
    if "model" in shown:
        shown["model"] = request.model
    if request.stream and not request.continuous_usage:
        if shown.get("choices"):
            shown.pop("usage", None)
        elif not request.include_usage:
            return None
    return shown
