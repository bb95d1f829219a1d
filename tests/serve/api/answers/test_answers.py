"""Answers in each format, whole and as streams: log-probabilities, offsets, calls of tools, token counts."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qsun.engine.requests import TokenLogprob, Update
from qsun.runtime.tokens.row_text import RowText
from qsun.serve.api.answers.answer import Style
from qsun.serve.api.answers.chat import ChatAnswer
from qsun.serve.api.answers.completion import CompletionAnswer
from qsun.serve.api.answers.response import ResponseAnswer
from qsun.serve.api.answers.token_text import Spelling
from qsun.serve.api.tools.formats import HERMES
from qsun.serve.api.tools.parser import ToolParser

TEXT = "a€b é!"


@pytest.fixture(scope="module")
def byte_level():
    """A token for each byte, as byte-level BPE begins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def updates_of(tokenizer, tokens):
    row = RowText(tokenizer, ())
    for place, token in enumerate(tokens):
        row.add(token)
        last = place == len(tokens) - 1
        text = row.rest(False) if last else row.fresh()
        yield Update("r", (token,), text, "length" if last else "", "", (TokenLogprob(token, -0.5, ((token, -0.5),)),))


def streamed(answer, update):
    return [json.loads(event.split(b"data: ", 1)[1]) for event in answer.events(answer.choices[0], update)]


def answers(tokenizer, answer_type):
    """The same answer whole, and by its chunks."""
    tokens = tokenizer(TEXT)["input_ids"]
    answer = answer_type("m", [[1, 2, 3]], 1, Style(Spelling(tokenizer)))
    chunks = [event["choices"][0] for update in updates_of(tokenizer, tokens) for event in streamed(answer, update)]
    return answer.whole()["choices"][0], chunks


def test_bytes_of_tokens_join_to_the_text(byte_level):
    whole, chunks = answers(byte_level, ChatAnswer)
    assert whole["message"]["content"] == TEXT
    for entries in (
        whole["logprobs"]["content"],
        [e for c in chunks if c["logprobs"] for e in c["logprobs"]["content"]],
    ):
        assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == TEXT
        assert entries[1]["bytes"] == [0xE2]  # of the euro sign
        assert entries[1]["top_logprobs"][0]["bytes"] == [0xE2]


def test_offsets_lie_in_the_text_and_a_stream_gives_the_same(byte_level):
    whole, chunks = answers(byte_level, CompletionAnswer)
    offsets = whole["logprobs"]["text_offset"]
    assert offsets == [0, 1, 1, 1, 2, 3, 4, 4, 5]
    assert offsets == [place for chunk in chunks for place in chunk["logprobs"]["text_offset"]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"] == TEXT


def test_cached_tokens_add_up_over_prompts_and_not_over_choices():
    answer = CompletionAnswer("m", [[1] * 70, [1] * 80], 2, Style(Spelling(None)))
    for choice, cached in zip(answer.choices, (64, 64, 0, 32), strict=True):
        choice.take(Update("r", (1,), "", "length", "", (), cached))
    assert answer.usage()["prompt_tokens_details"] == {"cached_tokens": 96}
    assert answer.usage()["prompt_tokens"] == 150


class Pieces:
    """What SentencePiece calls its pieces."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def convert_ids_to_tokens(self, token):
        return self.pieces[token]

    def decode(self, tokens):
        return "".join(self.pieces[token] for token in tokens).strip()


def test_pieces_and_bytes_of_sentencepiece():
    spelling = Spelling(Pieces("\N{LOWER ONE EIGHTH BLOCK}the", "<0xE2>", "end"))
    assert [spelling.bytes(token) for token in range(3)] == [b" the", b"\xe2", b"end"]
    assert Spelling(None).bytes(0) == b""


CALLING = ["Sure", "\n<tool", '_call>{"name": "add", "argu', 'ments": {"a": 1}}</tool_call>', "\n"]


def calling(answer_type, n=1, **more):
    """An answer that calls a tool, and all events of its stream."""
    parsers = [ToolParser(HERMES) for _ in range(n)]
    answer = answer_type("m", [[1, 2, 3]], n, Style(Spelling(None)), parsers, **more)
    events = [json.loads(event.split(b"data: ", 1)[1]) for event in answer.opening()]
    for number, text in enumerate(CALLING):
        events += streamed(answer, Update("r", (5,), text, "eos" if number == len(CALLING) - 1 else ""))
    return answer, events


def test_a_chat_calls_tools_whole_and_in_a_stream():
    answer, events = calling(ChatAnswer)
    (choice,) = answer.whole()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Sure", "tool_calls")
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Sure"
    assert [c for delta in deltas for c in delta.get("tool_calls", [])] == [{"index": 0} | call]
    assert [event["choices"][0]["finish_reason"] for event in events][-2:] == [None, "tool_calls"]


def test_an_answer_that_was_cut_off_says_so_although_it_calls():
    answer = ChatAnswer("m", [[1]], 1, Style(Spelling(None)), [ToolParser(HERMES)])
    answer.choices[0].take(Update("r", (5,), '<tool_call>{"name": "add"}</tool_call>', "length"))
    assert answer.whole()["choices"][0]["finish_reason"] == "length"


def test_a_response_calls_tools_whole_and_in_a_stream():
    answer, events = calling(ResponseAnswer, settings={"instructions": None})
    body = answer.whole()
    message, call = body["output"]
    assert (body["status"], message["content"][0]["text"]) == ("completed", "Sure")
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "add", '{"a": 1}')
    assert body["usage"] == {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 5,
                             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 8}  # fmt: skip
    events += [json.loads(event.split(b"data: ", 1)[1]) for event in answer.closing()]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert events[-1]["response"]["output"] == body["output"]
    done = {event["output_index"]: event["item"] for event in events if event["type"].endswith("output_item.done")}
    assert [done[0], done[1]] == body["output"]


ADD, NOW = '<tool_call>{"name": "add"}</tool_call>', '<tool_call>{"name": "now"}</tool_call>'
ORDERS = [
    (f"Sure.{ADD}", ["Sure.", "add"]),
    (f"{ADD}\nI have called it.", ["add", "I have called it."]),
    (f"{ADD}{NOW} both", ["add", "now", "both"]),
    (f"{ADD} (and) {NOW} (so)", ["add", "(and)(so)", "now"]),
    (f"(So) {ADD} (and) {NOW}", ["(So)(and)", "add", "now"]),
    (f"{ADD}<tool_call>no</tool_call>{NOW}", ["add", "<tool_call>no</tool_call>", "now"]),
    (f"{ADD}{NOW}", ["add", "now"]),
    ("Hello", ["Hello"]),
    ("", [""]),
]


@pytest.mark.parametrize(("text", "order"), ORDERS, ids=lambda v: str(v)[:20])
def test_items_of_a_response_are_in_the_order_of_the_answer(text, order):
    for cut in range(len(text) + 1):
        answer = ResponseAnswer("m", [[1]], 1, Style(Spelling(None)), [ToolParser(HERMES)], settings={})
        events = [event for piece, finish in ((text[:cut], ""), (text[cut:], "eos"))
                  for event in streamed(answer, Update("r", (5,), piece, finish))]  # fmt: skip
        output = answer.whole()["output"]
        assert [item.get("name") or item["content"][0]["text"] for item in output] == order
        for kind, named in (("added", [item["id"] for item in output]), ("done", output)):
            items = {event["output_index"]: event["item"] for event in events if event["type"].endswith(f"item.{kind}")}
            found = [items[place]["id"] if kind == "added" else items[place] for place in range(len(items))]
            assert found == named
        places = {item["id"]: place for place, item in enumerate(output)}
        assert all(places[event["item_id"]] == event["output_index"] for event in events if "item_id" in event)


def test_a_response_that_says_nothing_has_an_empty_message():
    answer = ResponseAnswer("m", [[1]], 1, Style(Spelling(None)), settings={})
    answer.choices[0].take(Update("r", (5,), "", "length"))
    body = answer.whole()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["content"][0]["text"] == ""


def test_token_counts_in_every_chunk_where_they_are_wanted():
    answer = ChatAnswer("m", [[1, 2]], 1, Style(Spelling(None), include_usage=True, continuous_usage=True))
    events = [event for i in range(3) for event in streamed(answer, Update("r", (5,), "x", "length" if i == 2 else ""))]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


def echoed(prompt, text, logprobs=True, prompt_only=False):
    """The same echo of a prompt of tokens and text, and of "ef", whole and by the chunks of its stream."""
    spelling = Spelling(Pieces(*"?" * 7, "a", "bc", "d", "e", "f"))
    answer = CompletionAnswer("m", [prompt], 1, Style(spelling, True, True, True))
    answer.echo, answer.prompt_logprobs, answer.prompt_texts = True, logprobs, [text]
    answer.choices[0].prompt_only = prompt_only
    scores = tuple(TokenLogprob(token, -1.0, ((9, -0.1),)) for token in prompt[1:])
    events = [json.loads(event[6:]) for event in answer.opening()]
    for token, piece in ((10, "e"),) if prompt_only else ((10, "e"), (11, "f")):
        score = (TokenLogprob(token, -0.5, ((token, -0.5),)),) if logprobs else ()
        finish = "eos" if prompt_only else "length" if token == 11 else ""
        prompt_scores = scores if logprobs and token == 10 else ()
        events += streamed(answer, Update("r", (token,), piece, finish, "", score, 0, prompt_scores))
    events += [json.loads(event[6:]) for event in answer.closing() if b"DONE" not in event]
    return answer.whole(), events


def test_an_echo_puts_the_prompt_before_the_answer():
    whole, _ = echoed([7, 8, 9], "abcd")
    assert whole["choices"][0]["text"] == "abcdef"
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["a", "bc", "d", "e", "f"],
        "token_logprobs": [None, -1.0, -1.0, -0.5, -0.5],
        "top_logprobs": [None, {"d": -0.1}, {"d": -0.1}, {"e": -0.5}, {"f": -0.5}],
        "text_offset": [0, 1, 3, 4, 5],
    }
    one_token, _ = echoed([7], "a")
    assert one_token["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert one_token["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]


def test_an_echo_without_tokens_is_the_prompt_alone():
    whole, _ = echoed([7, 8, 9], "abcd", prompt_only=True)
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("abcd", "length", [])
    assert choice["logprobs"]["tokens"] == ["a", "bc", "d"]
    assert (whole["usage"]["completion_tokens"], whole["usage"]["total_tokens"]) == (0, 3)


@pytest.mark.parametrize("prompt_only", [False, True], ids=["answer", "max_tokens 0"])
@pytest.mark.parametrize("logprobs", [False, True], ids=["text", "logprobs"])
@pytest.mark.parametrize(("prompt", "text"), [([7, 8, 9], "abcd"), ([7], "a")], ids=["prompt", "one token"])
def test_a_stream_of_an_echo_says_what_the_whole_answer_says(prompt, text, logprobs, prompt_only):
    whole, events = echoed(prompt, text, logprobs, prompt_only)
    (choice,) = whole["choices"]
    chunks = [event["choices"][0] for event in events if event["choices"]]
    assert chunks[0]["text"] == text
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert [token for chunk in chunks for token in chunk.get("token_ids", [])] == choice["token_ids"]
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    joined = {key: [value for part in parts for value in part[key]] for key in parts[0]} if parts else None
    assert joined == choice["logprobs"]
    assert (joined is not None) == logprobs
    reasons = [chunk["finish_reason"] for chunk in chunks]
    assert [*reasons[:-1], choice["finish_reason"]] == [None] * (len(reasons) - 1) + ["length"] == reasons
    assert events[0]["usage"]["completion_tokens"] == 0
    assert events[-1]["usage"] == whole["usage"]
