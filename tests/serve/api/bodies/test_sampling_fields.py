"""Fields that change which tokens are chosen, and log-probabilities of prompts, through the HTTP API."""

import json
import math

import pytest
import torch

from qsun.serve.api.metrics import Metrics
from tests.serve.api.test_api import PROMPT, ask, error_of, events, served

FRUIT = {
    "type": "object",
    "properties": {"name": {"enum": ["apple", "plum"]}, "pieces": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["name", "pieces"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "buy", "parameters": FRUIT}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.fixture(scope="module")
def client(request):
    """One server for the file, with a chat template that shows tools."""
    make_engine = request.getfixturevalue("make_engine_once")
    metrics = Metrics()
    with served(make_engine(metrics), metrics) as found:
        tokenizer = found.serving.engine.tokenizer
        kept = tokenizer.chat_template  # loaded once for all tests
        tokenizer.chat_template = "{{ tools | tojson }}<tool_call>{{ messages[-1].content }}"
        yield found
        tokenizer.chat_template = kept


@pytest.fixture(scope="module")
def make_engine_once(decode, prefills):
    from qsun.engine.config import EngineConfig
    from qsun.engine.engine import Engine
    from tests.engine_rig import KV_BYTES_PER_TOKEN

    def make(watch):
        engine = Engine(decode, EngineConfig(kv_bytes=50_000 * KV_BYTES_PER_TOKEN), watch)
        for name, module in prefills.items():
            engine.add_module(name, module)
        return engine

    return make


def tokens(client, **more):
    body = {"max_tokens": 24, "ignore_eos": True, "return_token_ids": True, **more}
    answer = ask(client, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def chat(client, **more):
    body = {"model": "math", "messages": [{"role": "user", "content": "eggs"}], "max_tokens": 100, **more}
    return client.post("/v1/chat/completions", json=body)


def test_penalties_and_biases_change_greedy_answers(client):
    plain = tokens(client)
    for field, value in (("frequency_penalty", 2), ("presence_penalty", 2.0), ("repetition_penalty", 5.0)):
        assert tokens(client, **{field: value}) != plain, field
    assert tokens(client, logit_bias={str(plain[0]): -100})[0] != plain[0]
    assert set(tokens(client, logit_bias={"70": 100})) == {70}
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1, "min_p": 0, "logit_bias": {}}
    assert tokens(client, **neutral) == plain


def test_min_p_of_one_is_greedy(client):
    assert tokens(client, temperature=5.0, min_p=1.0) == tokens(client)


def test_tokens_that_end_an_answer_and_those_that_must_come_first(client):
    plain = tokens(client)
    stop = plain[8]
    first = plain.index(stop)
    body = {"max_tokens": 24, "ignore_eos": True, "return_token_ids": True, "stop_token_ids": [stop]}
    choice = ask(client, **body).json()["choices"][0]
    assert (choice["finish_reason"], choice["token_ids"]) == ("stop", plain[: first + 1])
    longer = ask(client, **body, min_tokens=first + 4).json()["choices"][0]["token_ids"]
    assert len(longer) >= first + 4


def test_an_answer_satisfies_its_schema(client):
    for kind in ({"type": "json_schema", "json_schema": {"schema": FRUIT}}, {"type": "json_object"}):
        choice = chat(client, response_format=kind, seed=3, max_tokens=300).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            json.loads(choice["message"]["content"])
        assert choice["message"]["content"].startswith("{")
        assert kind["type"] == "json_object" or choice["finish_reason"] == "stop"
    both = chat(client, response_format={"type": "json_schema", "json_schema": {"schema": FRUIT}}, n=4, seed=5).json()
    answers = [json.loads(choice["message"]["content"]) for choice in both["choices"]]
    assert all(answer["name"] in ("apple", "plum") for answer in answers)
    broken = chat(client, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}})
    assert "cannot be enforced" in error_of(broken, 400)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "buy"}}])
def test_a_call_that_is_required_is_made_whole_and_in_a_stream(client, choice):
    body = {"tools": TOOLS, "tool_choice": choice, "seed": 4}
    whole = chat(client, **body).json()["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", None)
    if choice != "required":
        assert call["function"]["name"] == "buy"
    assert call["function"]["name"] in ("buy", "now")
    arguments = json.loads(call["function"]["arguments"])
    assert arguments == {} if call["function"]["name"] == "now" else arguments["name"] in ("apple", "plum")
    *chunks, done = events(chat(client, **body, stream=True))
    assert done == "[DONE]"
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [delta["function"] for delta in deltas] == [call["function"]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_log_probabilities_of_an_echo_are_those_of_the_seam(client, decode, prefills):
    """Position i is scored by the decode module, behind the KV that the prefill module wrote before it."""
    body = {"max_tokens": 1, "echo": True, "logprobs": 1}
    choice = ask(client, **body).json()["choices"][0]
    found = choice["logprobs"]
    ids = client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert len(found["tokens"]) == len(ids) + 1
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    with torch.no_grad():
        for place in (2, 7, len(ids) - 1):
            cache = prefills["math"].model(torch.tensor([ids[: place - 1]]), use_cache=True).past_key_values
            logits = decode.model(torch.tensor([[ids[place - 1]]]), past_key_values=cache).logits[0, -1]
            expected = logits.float().log_softmax(-1)
            assert found["token_logprobs"][place] == pytest.approx(float(expected[ids[place]]), abs=1e-4)
            assert max(found["top_logprobs"][place].values()) == pytest.approx(float(expected.max()), abs=1e-4)
    assert math.isfinite(found["token_logprobs"][-1])
    alone = ask(client, max_tokens=0, echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    assert alone["token_logprobs"] == pytest.approx(found["token_logprobs"][:-1], nan_ok=True)
