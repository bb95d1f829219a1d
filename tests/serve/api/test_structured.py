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


def test_what_is_missing_is_named(demo_tokenizer, monkeypatch):
    with pytest.raises(QsunError, match="no tokenizer or no end token"):
        Grammars(None, 10, {1}).json({})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(QsunError, match=r"pip install 'qsun\[structured\]'"):
        Grammars(demo_tokenizer, 128, {EOS}).json({})
