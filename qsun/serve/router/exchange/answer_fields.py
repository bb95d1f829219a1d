"""Fields that shape the answer only, checked before the prompt is computed.

The prefill worker never sees them (see transfer.py), so the decode worker would be the first to refuse them. vLLM then
releases the prompt's KV cache, but not for a body that it cannot even parse: those blocks stay at the prefill worker
until their lease ends. So the checks are those of its request classes (entrypoints/openai/*/protocol.py), all but that
of what is inside a structural tag.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from qsun.serve.http.errors import HttpError

_LONGEST_MESSAGE = 300
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")  # of structured_outputs
_MOST_LIKELY = Annotated[int, Field(ge=-1)]  # of logprobs; -1: of the whole vocabulary


class _Schema(BaseModel):
    name: str
    description: str | None = None
    definition: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class _ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: _Schema | None = None


class _StructuredOutputs(BaseModel):
    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


class _StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _AnswerFields(BaseModel):
    stream_options: _StreamOptions | None = None
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    min_tokens: int = 0
    logprob_token_ids: list[int] | None = None
    return_token_ids: bool | None = None
    thinking_token_budget: Annotated[int, Field(strict=True, ge=-1)] | None = None
    response_format: _ResponseFormat | None = None
    structured_outputs: _StructuredOutputs | None = None


class _CompletionFields(_AnswerFields):
    logprobs: _MOST_LIKELY | None = None


class _ChatFields(_AnswerFields):
    logprobs: bool = False
    top_logprobs: _MOST_LIKELY = 0
    parallel_tool_calls: bool | None = None


def check_answer_fields(body: Mapping[str, Any], is_chat: bool) -> None:
    """Check the fields of a body without nulls that only the decode worker gets.

    Raises:
        HttpError: 400, naming the field.
    """
    try:
        fields = (_ChatFields if is_chat else _CompletionFields).model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in found["loc"])
        raise _wrong(str(found["loc"][0]), f"{place}: {found['msg']}") from None
    count = "top_logprobs" if is_chat else "logprobs"
    if isinstance(body.get(count), str):
        raise _wrong(count, f"{count} {body[count]!r:.60} is not a number")
    if isinstance(fields, _ChatFields):
        if fields.top_logprobs and not fields.logprobs:
            raise _wrong("top_logprobs", "top_logprobs needs logprobs: true")
        _check_tool_choice(body)
    if fields.logprob_token_ids and (fields.logprobs is None or fields.logprobs is False):
        raise _wrong("logprob_token_ids", "logprob_token_ids needs logprobs")
    wanted = fields.response_format
    if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is None:
        raise _wrong("response_format", "response_format json_schema needs the field json_schema")
    if fields.structured_outputs is not None:
        _check_constraint(body["structured_outputs"], is_chat and isinstance(body.get("tool_choice"), dict))


def _check_constraint(wanted: Mapping[str, Any], names_a_tool: bool) -> None:
    given = [name for name in _CONSTRAINTS if wanted.get(name) is not None]
    if len(given) != 1:
        allowed = ", ".join(_CONSTRAINTS)
        raise _wrong("structured_outputs", f"structured_outputs has {len(given)} constraints; give one of {allowed}")
    if names_a_tool and given[0] in ("json", "regex", "choice"):
        raise _wrong("structured_outputs", f"structured_outputs {given[0]} and a named tool_choice cannot be combined")


def _check_tool_choice(body: Mapping[str, Any]) -> None:
    choice, tools = body.get("tool_choice", "none"), body.get("tools")
    if choice == "none":
        return
    if not tools:
        raise _wrong("tool_choice", f"tool_choice {choice!r:.60} needs tools; send some, or leave it out")
    if choice in ("auto", "required"):
        return
    name = _function_name(choice)
    names = [_function_name(tool) for tool in tools] if isinstance(tools, list) else []
    if name is None or choice.get("type", "function") != "function":
        message = f"tool_choice {choice!r:.60} is invalid; use none, auto, required, or a function with its name"
        raise _wrong("tool_choice", message)
    if name not in names:
        raise _wrong("tool_choice", f"tool_choice {name!r:.60} is not among tools")


def _function_name(value: Any) -> str | None:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def _wrong(field: str, message: str) -> HttpError:
    return HttpError(400, message[:_LONGEST_MESSAGE], param=field)
