"""What a decode worker's answer says: is it whole, how many tokens, and what of it the client gets to see."""

from collections.abc import Mapping
from typing import Any

from qsun.serve.router.exchange.request import RoutedRequest

# vLLM ends a request with these when its engine stops, or the KV cache did not arrive: the text is cut off
_CUT_OFF = ("abort", "error")


def failure_in(answer: Mapping[str, Any]) -> str | None:
    """Why an answer or an event of a stream is not to be trusted; None for a good one."""
    error = answer.get("error")
    if error is not None:
        message = error.get("message") if isinstance(error, dict) else error
        return f"error {' '.join(str(message).split())[:200]}"
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        return "an answer without choices"
    cut = [choice["finish_reason"] for choice in choices if choice.get("finish_reason") in _CUT_OFF]
    return f"finish_reason {cut[0]}" if cut else None


def tokens_in(event: Mapping[str, Any]) -> int:
    """Tokens of one event: as many as it lists, else one where it has text."""
    count = 0
    for choice in event["choices"]:
        ids = choice.get("token_ids")
        said = choice.get("text") or any((choice.get("delta") or {}).get(key) for key in _SAID)
        count += len(ids) if isinstance(ids, list) else bool(said)
    return count


_SAID = ("content", "reasoning", "reasoning_content", "tool_calls")


def completion_tokens(answer: Mapping[str, Any]) -> int | None:
    """Tokens generated, as the worker counted them."""
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def for_client(answer: dict[str, Any], request: RoutedRequest) -> dict[str, Any] | None:
    """An answer or event under the client's model name and without transfer parameters.

    None for an event with nothing but the usage, which the router asked for and the client did not.
    """
    shown = {key: value for key, value in answer.items() if not key.endswith("transfer_params")}
    if "model" in shown:
        shown["model"] = request.model
    if request.stream and not request.include_usage:
        if not shown.get("choices"):
            return None
        shown.pop("usage", None)
    return shown
