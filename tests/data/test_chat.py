"""Chats as tokens: the same for every caller, no special tokens but the template's, and tools in the prompt."""

import copy
import json

import pytest
from tokenizers import processors

from qsun.data.calibration import read_calibration
from qsun.data.chat import chat_text, chat_tokens
from qsun.errors import QsunError
from qsun.tuning.examples import read_examples
from tests.tiny_models import VOCAB, write_jsonl

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
USER = {"role": "user", "content": "weather?"}
CHAT = [USER, {"role": "assistant", "content": "call f"}]


@pytest.fixture
def tokenizer(demo_tokenizer):
    """A tokenizer that adds BOS and EOS to text, with a chat template that writes no BOS."""
    other = copy.deepcopy(demo_tokenizer)
    other.chat_template = TEMPLATE
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A <s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return other


def test_no_special_tokens_but_the_templates_own(tokenizer):
    assert tokenizer("x")["input_ids"][0] == 1 and tokenizer("x")["input_ids"][-1] == 2
    assert tokenizer.decode(chat_tokens(tokenizer, [USER])) == "[user]weather?[assistant]"
    assert chat_tokens(tokenizer, [USER], add_generation_prompt=False) == list(map(ord, "[user]weather?"))
    theirs = tokenizer.apply_chat_template(CHAT, tools=TOOLS, add_generation_prompt=True)["input_ids"]
    assert chat_tokens(tokenizer, CHAT, tools=TOOLS) == theirs


def test_tuning_calibration_and_serving_render_the_same_tokens(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT, "tools": TOOLS}])
    served = chat_tokens(tokenizer, CHAT[:1], tools=TOOLS)
    (example,), _ = read_examples([str(path)], tokenizer, 1000)
    (sample,) = read_calibration([str(path)], tokenizer, VOCAB, 1, 1000, seed=0).samples
    assert tokenizer.decode(served).startswith('TOOLS [{"type": "function"')
    assert list(example.prompt) == served
    assert list(sample.tokens[: sample.prefill_tokens + 1]) == served


def test_tools_may_be_json_text(tokenizer, tmp_path):
    rows = [{"messages": CHAT, "tools": tools} for tools in (TOOLS, json.dumps(TOOLS), "", None, [])]
    examples, _ = read_examples([str(write_jsonl(tmp_path / "chat.jsonl", rows))], tokenizer, 1000)
    assert examples[0] == examples[1] != examples[2] == examples[3] == examples[4]


@pytest.mark.parametrize("tools", ["not json", '"text"', [1], {"name": "f"}])
def test_tools_that_are_not_schemas(tools, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT, "tools": tools}])
    with pytest.raises(QsunError, match=r"chat.jsonl, line 1: 'tools' is .*, not a list of function schemas"):
        read_examples([str(path)], tokenizer, 1000)


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
BY_NAME = TEMPLATE.replace("CALL", "CALL {{ c.function.name }}")


@pytest.mark.parametrize("content", ["", None, "let me see"])
def test_tool_calls_are_an_answer_if_the_template_writes_them(content, tokenizer, tmp_path):
    answer = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [USER, answer], "tools": TOOLS}])
    tokenizer.chat_template = BY_NAME.replace("m['content']", "m['content'] or ''")
    (example,), _ = read_examples([str(path)], tokenizer, 1000)
    assert tokenizer.decode(example.response) == f"{content or ''}CALL get_weather {{}}</s>"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% endfor %}"
    for read in (
        lambda: read_examples([str(path)], tokenizer, 1000),
        lambda: read_calibration([str(path)], tokenizer, VOCAB, 1, 1000, seed=0),
    ):
        with pytest.raises(QsunError, match=r"chat.jsonl, line 1: .*does not write tool calls.*'get_weather'.*give"):
            read()


def test_rows_are_the_same_tokens_on_any_day(tokenizer, tmp_path):
    """Llama 3.2's template writes today's date, which must not change the tokens of a run that is resumed tomorrow."""
    tokenizer.chat_template = "{{ strftime_now('%-d %b %Y') }}" + TEMPLATE
    rewriting = tokenizer.chat_template.replace("[assistant]", "[?]")
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": [USER]}])
    examples, _ = read_examples([str(path)], tokenizer, 1000, needs_response=False)
    sources = [str(write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}]))]
    prompts = [read_calibration(sources, tokenizer, VOCAB, 1, 1000, seed=0).samples[0].tokens]
    tokenizer.chat_template = rewriting
    prompts += [read_calibration(sources, tokenizer, VOCAB, 1, 1000, seed=0).samples[0].tokens]
    prompts += [example.prompt for example in examples]
    assert [tokenizer.decode(prompt)[:11] for prompt in prompts] == ["26 Jul 2024"] * 4
    assert "26 Jul 2024" not in chat_text(tokenizer, CHAT)


def test_text_parts_are_joined(tokenizer):
    parts = [{"type": "text", "text": "weat"}, {"type": "text", "text": "her?"}]
    assert chat_text(tokenizer, [{"role": "user", "content": parts}]) == chat_text(tokenizer, [USER])
    with pytest.raises(QsunError, match="only parts of type text are supported"):
        chat_text(tokenizer, [{"role": "user", "content": [{"type": "image_url"}]}])


def test_arguments_of_a_call_may_be_json_text(tokenizer):
    def rendered(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return chat_text(tokenizer, [USER, {"role": "assistant", "content": "", "tool_calls": [call]}])

    assert 'CALL {"city": "Oslo"}' in rendered('{"city": "Oslo"}')
    assert rendered('{"city": "Oslo"}') == rendered({"city": "Oslo"})
    assert 'CALL "{broken"' in rendered("{broken")


def test_an_open_answer_is_continued(tokenizer):
    assert chat_text(tokenizer, CHAT, continue_final_message=True) == "[user]weather?[assistant]call f"


def test_variables_of_the_template(tokenizer):
    tokenizer.chat_template = "{{ 'thinks' if enable_thinking else 'answers' }}"
    assert chat_text(tokenizer, [USER], template_args={"enable_thinking": True}) == "thinks"
    assert chat_text(tokenizer, [USER]) == "answers"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages.x.y }}", "has no attribute"),
        ("{% for", "end of template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x' % 5 }}", "not all arguments"),
        ("{{ 10.0 ** 999 }}", "out of range"),
    ],
)
def test_a_template_that_fails_is_one_line_whatever_its_error_is(tokenizer, template, reason):
    tokenizer.chat_template = template
    with pytest.raises(QsunError, match=f"template refuses these messages: .*{reason}") as refused:
        chat_text(tokenizer, [USER])
    assert "\n" not in str(refused.value)


def test_no_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(QsunError, match="no chat template; give the prompt as text"):
        chat_text(tokenizer, [USER])
