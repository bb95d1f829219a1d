"""What only the decode worker reads is checked before a prompt is computed, as vLLM does when it parses a body."""

import pytest

from qsun.serve.http.errors import HttpError
from qsun.serve.router.exchange.answer_fields import check_answer_fields
from qsun.serve.router.exchange.request import CHAT, COMPLETIONS
from tests.serve.routing import rig, run

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {"name": "a", "schema": {"type": "object"}}
REFUSED_IN_BOTH = [
    ({"response_format": "json_object"}, "response_format: Input should be a valid dictionary"),
    ({"response_format": {"type": "xml"}}, "response_format.type: Input should be 'text', 'json_object'"),
    ({"response_format": {"type": "json_schema"}}, "response_format json_schema needs the field json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name: Field requ"),
    ({"structured_outputs": "yes|no"}, "structured_outputs: Input should be a valid dictionary"),
    ({"structured_outputs": {}}, "structured_outputs has 0 constraints; give one of json, regex, choice, grammar"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs has 2 constraints"),
    ({"structured_outputs": {"choice": "yes"}}, "structured_outputs.choice: Input should be a valid list"),
    ({"min_tokens": "few"}, "min_tokens: Input should be a valid integer"),
    ({"stream_interval": 0}, "stream_interval: Input should be greater than or equal to 1"),
    ({"stream_options": {"include_usage": "x"}, "stream": True}, "stream_options.include_usage: Input should be"),
    ({"logprob_token_ids": [5]}, "logprob_token_ids needs logprobs"),
    ({"thinking_token_budget": -2}, "thinking_token_budget: Input should be greater"),
]
REFUSED_IN_CHATS = [
    ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
    ({"top_logprobs": -2, "logprobs": True}, "top_logprobs: Input should be greater"),
    ({"top_logprobs": "3", "logprobs": True}, "top_logprobs '3' is not a number"),
    ({"logprobs": 5}, "logprobs: Input should be a valid boolean"),
    ({"logprobs": False, "logprob_token_ids": [5]}, "logprob_token_ids needs logprobs"),
    ({"tool_choice": "auto"}, "tool_choice 'auto' needs tools; send some, or leave it out"),
    ({"tool_choice": "required", "tools": []}, "tool_choice 'required' needs tools"),
    ({"tool_choice": "any", "tools": TOOLS}, "tool_choice 'any' is invalid; use none, auto, required"),
    ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice {'type': 'function'} is invalid"),
    ({"tool_choice": {"function": {"name": "news"}}, "tools": TOOLS}, "tool_choice 'news' is not among tools"),
    ({"tool_choice": NAMED, "tools": TOOLS, "structured_outputs": {"regex": "a"}}, "structured_outputs regex and a"),
]
ACCEPTED_IN_BOTH = [
    {},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"strict": True}}},
    {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
    {"structured_outputs": {"choice": ["yes", "no"], "regex": None, "whitespace_pattern": " "}, "x": 1},
    {"stream_options": {"include_usage": True}, "min_tokens": 2, "thinking_token_budget": -1, "guided_json": "x"},
]
ACCEPTED_IN_CHATS = [
    {"logprobs": True, "top_logprobs": 0, "parallel_tool_calls": False},
    {"top_logprobs": 0},
    {"tool_choice": "none"},
    {"tools": TOOLS},
    {"tool_choice": NAMED, "tools": TOOLS, "response_format": {"type": "json_object"}},
    {"tool_choice": "required", "tools": TOOLS, "structured_outputs": {"json": "{}"}},
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_IN_BOTH + REFUSED_IN_CHATS, ids=str)
def test_what_a_decode_worker_would_refuse_leaves_no_kv_cache_behind(fields, message):
    with pytest.raises(HttpError) as refused:
        check_answer_fields(fields, is_chat=True)
    assert message in refused.value.message
    assert refused.value.status == 400
    assert refused.value.param == message.partition(" ")[0].partition(".")[0].rstrip(":")


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("fields", ACCEPTED_IN_BOTH, ids=str)
def test_what_a_decode_worker_accepts_passes(fields, is_chat):
    check_answer_fields(fields, is_chat)


@pytest.mark.parametrize("fields", ACCEPTED_IN_CHATS, ids=str)
def test_what_a_decode_worker_accepts_in_a_chat_passes(fields):
    check_answer_fields(fields, is_chat=True)


def test_completions_have_other_logprobs_and_no_tools():
    check_answer_fields({"logprobs": 3, "logprob_token_ids": [5], "top_logprobs": "x", "tool_choice": "x"}, False)
    check_answer_fields({"structured_outputs": {"regex": "a"}, "tool_choice": NAMED, "tools": TOOLS}, False)
    for fields, message in [*REFUSED_IN_BOTH, ({"logprobs": -2}, "logprobs: Input should be greater")]:
        with pytest.raises(HttpError) as refused:
            check_answer_fields(fields, is_chat=False)
        assert message in refused.value.message


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_router_refuses_them_before_a_worker_computes(path):
    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            prompt = {"prompt": "a b"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a b"}]}
            body = {"model": "math", **prompt, "response_format": {"type": "json_schema"}}
            answer = await r.client.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")
            assert not r.network  # no KV cache that nobody fetches
            assert not any(worker.started for worker in r.workers)

    run(scenario)
