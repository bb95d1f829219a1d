"""Constraints: whatever a model prefers, its answer satisfies the schema and then ends."""

import json
import sys

import pytest
import torch

from qsun.errors import QsunError
from qsun.serve.api.structured import Grammars, call_schema

EOS = 2
SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {"name": {"enum": ["apple", "plum"]}, "pieces": {"type": "integer", "minimum": 1, "maximum": 20}},
        "required": ["name", "pieces"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "a call": call_schema(
        [
            {"name": "now", "parameters": {"type": "object", "additionalProperties": False}},
            {"name": "add", "parameters": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"],
                                           "additionalProperties": False}},
        ]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def grammars(demo_tokenizer):
    return Grammars(demo_tokenizer, len(demo_tokenizer) + 5, {EOS})  # a padded head has more logits than tokens


def written(constraint, tokenizer, seed):
    """What a model with random preferences writes."""
    random, tokens = torch.Generator().manual_seed(seed), []
    while len(tokens) < 200:
        logits = torch.randn(len(tokenizer) + 5, generator=random)
        constraint.mask(logits)
        token = int(logits.argmax())
        assert logits[token] > float("-inf")
        if token == EOS:
            return tokenizer.decode(tokens)
        constraint.advance(token)
        tokens.append(token)
    raise AssertionError(tokenizer.decode(tokens))


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_model_satisfies_the_schema(grammars, demo_tokenizer, name):
    found = set()
    for seed in range(8):
        value = json.loads(written(grammars.json(SCHEMAS[name]), demo_tokenizer, seed))
        found.add(json.dumps(value))
        if name == "object":
            assert value["name"] in ("apple", "plum")
            assert 1 <= value["pieces"] <= 20
        elif name == "array":
            assert len(value) in (2, 3)
        else:
            assert (value["name"], value["arguments"]) in [("now", {}), ("add", {"a": 1})]
    assert len(found) > 1  # the model still chooses


@pytest.mark.parametrize(
    "schema", [{"type": "objekt"}, {"$ref": "http://127.0.0.1:9/x"}, {"type": "string", "pattern": "(?=a)"}]
)
def test_a_schema_that_cannot_be_enforced_is_refused(grammars, schema):
    with pytest.raises(QsunError, match="JSON schema cannot be enforced"):
        grammars.json(schema)


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def holding(key, part, **more):
    return {"type": "object", "properties": {key: part}, "required": [key], "additionalProperties": False} | more


# a function's parameters, arguments that they allow, and arguments that they do not
REFERRING = {
    "a definition": (holding("at", {"$ref": "#/$defs/P"}, **{"$defs": {"P": POINT}}), {"at": {"x": 1}}, {"at": {}}),
    "a list of definitions in definitions": (
        holding(
            "lines",
            {"type": "array", "items": {"$ref": "#/definitions/Line"}},
            definitions={"Line": holding("ends", {"type": "array", "items": {"$ref": "#/definitions/P"}}), "P": POINT},
        ),
        {"lines": [{"ends": [{"x": 1}, {"x": 2}]}]},
        {"lines": [{"ends": [{"x": "1"}]}]},
    ),
    "itself": (
        holding("n", {"type": "integer"}, properties={"n": {"type": "integer"}, "next": {"$ref": "#"}}),
        {"n": 1, "next": {"n": 2, "next": {"n": 3}}},
        {"n": 1, "next": {"name": "f", "arguments": {"n": 2}}},
    ),
    "a tree through a definition": (
        holding(
            "tree",
            {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            **{"$defs": {"Node": holding("sons", {"type": "array", "items": {"$ref": "#/$defs/Node"}})}},
        ),
        {"tree": {"sons": [{"sons": []}, {"sons": [{"sons": []}]}]}},
        {"tree": {"sons": [{"sons": [1]}]}},
    ),
    "a property": (
        {**holding("a", POINT), "properties": {"a": POINT, "b": {"$ref": "#/properties/a"}}},
        {"a": {"x": 1}, "b": {"x": 2}},
        {"a": {"x": 1}, "b": 2},
    ),
    "what has an id": (
        holding("at", {"$ref": "#/$defs/P"}, **{"$id": "https://example.org/line", "$defs": {"P": POINT}}),
        {"at": {"x": 1}},
        {"at": {}},
    ),
    "a definition from a property with a keyword's name": (
        holding("default", {"$ref": "#/$defs/P"}, **{"$defs": {"P": POINT}}),
        {"default": {"x": 1}},
        {"default": 1},
    ),
    "nothing: a property of that name": (holding("$ref", {"const": "#/x"}), {"$ref": "#/x"}, {"$ref": "#/y"}),
    "nothing: data": (holding("at", {"enum": [{"$ref": "#"}]}), {"at": {"$ref": "#"}}, {"at": {"$ref": "#/x"}}),
}


def accepts(constraint, tokenizer, value):
    tokens = [*tokenizer.encode(json.dumps(value), add_special_tokens=False), EOS]
    return constraint._matcher.validate_tokens(tokens) == len(tokens)


@pytest.mark.parametrize("others", [0, 2], ids=["alone", "among others"])
@pytest.mark.parametrize("name", REFERRING)
def test_a_forced_call_keeps_to_parameters_that_refer_to_their_own_parts(grammars, demo_tokenizer, name, others):
    parameters, right, wrong = REFERRING[name]
    other = holding("at", {"$ref": "#/$defs/P"}, **{"$defs": {"P": {}}})
    functions = [{"name": f"g{number}", "parameters": other} for number in range(others)]
    kept = json.dumps(parameters)
    schema = call_schema([*functions, {"name": "f", "parameters": parameters}])
    for arguments in (right, wrong):
        found = accepts(grammars.json(schema), demo_tokenizer, {"name": "f", "arguments": arguments})
        assert found == accepts(grammars.json(parameters), demo_tokenizer, arguments) == (arguments is right)
    assert json.dumps(parameters) == kept


def test_parameters_that_are_nested_too_deeply_are_refused():
    schema = {}
    for _ in range(5000):
        schema = {"not": schema}
    with pytest.raises(QsunError, match="the JSON schema of f is nested too deeply"):
        call_schema([{"name": "f", "parameters": schema}])


def test_what_is_missing_is_named(demo_tokenizer, monkeypatch):
    with pytest.raises(QsunError, match="no tokenizer or no end token"):
        Grammars(None, 10, {1}).json({})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(QsunError, match=r"pip install 'qsun\[structured\]'"):
        Grammars(demo_tokenizer, 128, {EOS}).json({})
