"""Bodies of requests: what is ignored, what is refused by name, and what is only logged."""

import logging

import pytest
from pydantic import ValidationError

from qsun.serve.api.bodies import fields
from qsun.serve.api.bodies.chat import ChatBody
from qsun.serve.api.bodies.completion import CompletionBody
from qsun.serve.api.bodies.responses import ResponsesBody
from qsun.serve.api.bodies.sampling import SamplingBody
from qsun.serve.api.bodies.tokens import TokenizeBody
from qsun.serve.api.errors import _first

ASK = {"role": "user", "content": "1+1"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(**more):
    return ChatBody.model_validate({"model": "m", "messages": [ASK], **more})


def told(body_type, **values):
    """The message and the field of the error that a client sees."""
    with pytest.raises(ValidationError) as caught:
        body_type.model_validate({"model": "m", **values})
    error = _first([one | {"loc": ("body", *one["loc"])} for one in caught.value.errors()])
    return error.message, error.param


@pytest.mark.parametrize("field", [*ChatBody.model_fields, *ChatBody.unsupported, "store", "metadata", "prediction"])
def test_null_asks_for_nothing(field):
    if field not in ("model", "messages"):
        assert chat(**{field: None}) == chat()


@pytest.mark.parametrize("field", ["refusal", "audio", "tool_calls", "annotations", "tool_call_id", "name"])
def test_null_in_a_message_asks_for_nothing(field):
    messages = [ASK, {"role": "assistant", "content": "2", field: None}, ASK]
    assert chat(messages=messages).messages[1].plain() == {"role": "assistant", "content": "2"}


def test_unknown_fields_are_ignored_and_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(fields, "_noted", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert chat(features={"a": 1}, session_id="x", messages=[ASK | {"mood": "good"}]) == chat()
    assert [record.getMessage() for record in caplog.records] == [
        "unknown fields of requests are ignored: 'features', 'session_id'",
        "unknown fields of requests are ignored: 'mood'",
    ]


@pytest.mark.parametrize(("name", "neutral"), [(n, v[0]) for n, v in ChatBody.unsupported.items() if v])
def test_what_changes_nothing_is_accepted_and_what_cannot_be_done_is_refused(name, neutral):
    assert chat(**{name: neutral}) == chat()
    message, param = told(ChatBody, messages=[ASK], **{name: {"other": 1}})
    assert (message, param) == (f"{name} is not supported; leave it out", name)


def test_load_generators_bodies():
    """The defaults of `vllm bench serve` and guidellm 0.8.1, captured."""
    streams = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    CompletionBody.model_validate(
        {"model": "m", "prompt": "a", "repetition_penalty": 1.0, "max_tokens": 4, "logprobs": None, **streams}
    )
    assert chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}], **streams).stream


NESTED = [
    ({"messages": [ASK, {"role": "tool", "content": "3", "tool_call_id": "1"}]}, "messages.1.tool_call_id"),
    ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.1.tool_calls.0.function"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"messages": [ASK], "tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"messages": [ASK], "response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": [ASK], "stop": ["a", ""]}, "stop.1"),
    ({"messages": [ASK], "tool_choice": "required"}, "tool_choice"),
    ({"messages": [ASK], "tools": [TOOL], "tool_choice": {"function": {"name": "sub"}}}, "tool_choice"),
    ({"messages": [ASK], "stream_options": {"include_usage": True}}, "stream_options"),
]


@pytest.mark.parametrize(("values", "field"), NESTED, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_name_nested_fields(values, field):
    message, param = told(ChatBody, **values)
    assert param == field
    assert field in message


def test_what_was_given_is_in_the_error_of_a_choice():
    message, _ = told(ChatBody, messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    assert "image_url" in message


@pytest.mark.parametrize("field", [n for n, f in SamplingBody.model_fields.items() if "int" in str(f.annotation)])
def test_booleans_and_texts_are_not_numbers(field):
    for value in (True, "1"):
        assert told(CompletionBody, prompt="x", **{field: value})[1].split(".")[0] == field


def test_messages_become_what_templates_expect():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    system, assistant, tool = (message.plain() for message in chat(messages=messages).messages)
    assert system == {"role": "system", "content": "ab"}
    assert assistant == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "c1"}


def test_tools_that_may_not_be_called_are_not_shown_to_the_model():
    assert chat(tools=[TOOL]).template_arguments()["tools"] == [TOOL]
    hidden = chat(tools=[TOOL], tool_choice="none")
    assert hidden.template_arguments()["tools"] is None
    assert (hidden.usable_tools, hidden.forced_tools) == ([], [])


def test_a_final_message_is_continued():
    arguments = chat(continue_final_message=True, add_generation_prompt=False).template_arguments()
    assert (arguments["continue_final_message"], arguments["add_generation_prompt"]) == (True, False)
    message, _ = told(ChatBody, messages=[ASK], continue_final_message=True, add_generation_prompt=True)
    assert "cannot be combined" in message


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_dict", "padding", "tokenizer_kwargs", "tools"])
@pytest.mark.parametrize("body_type", [ChatBody, TokenizeBody])
def test_clients_set_variables_of_the_template_and_not_how_it_is_rendered(body_type, name):
    variables = {"enable_thinking": False}
    body = body_type.model_validate({"model": "m", "messages": [ASK], "chat_template_kwargs": variables})
    assert body.template_arguments()["template_args"] == variables
    message, param = told(body_type, messages=[ASK], chat_template_kwargs=variables | {name: "{{ 1 }}"})
    assert param == "chat_template_kwargs"
    assert message.startswith(f"chat_template_kwargs.{name} is not a variable of the template"), message


def test_a_response_is_a_chat():
    body = ResponsesBody.model_validate({
        "model": "m",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "2"},
        ],
        "tools": [{"type": "function", "name": "add", "parameters": {"type": "object"}}],
        "tool_choice": {"type": "function", "name": "add"},
        "max_output_tokens": 5,
    }).as_chat()  # fmt: skip
    assert [message.role for message in body.messages] == ["system", "user", "assistant", "tool"]
    assert (body.max_tokens, body.forced_tools[0].function.name) == (5, "add")
    plain = ResponsesBody.model_validate({"model": "m", "input": "hi", "text": {"format": {"type": "json_object"}}})
    assert plain.as_chat().messages[0].plain() == {"role": "user", "content": "hi"}
    assert plain.as_chat().schema_of_answer == {"type": "object"}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "temperature": "hot"}, "temperature"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
    ],
)
def test_errors_of_a_response_are_in_its_own_words(values, field):
    message, param = told(ResponsesBody, **values)
    assert param == field
    assert field in message
