"""Answers that satisfy a JSON schema: llguidance says after each token which tokens may follow."""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsun.errors import QsunError
from qsun.serve.api.answers.token_text import Spelling

_LAYOUT = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}  # optional spaces need not end
# of a JSON schema: what maps names to schemas, and what is data; all else is a schema, a list of them, or a plain value
_MAPS = frozenset(("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"))
_DATA = frozenset(("const", "default", "enum", "examples"))


class Grammars:
    """Makes constraints for one tokenizer; they are shared by all models, which have its vocabulary.

    Args:
        tokenizer: of the decode module; None where it has none. vocabulary: number of logits. eos: tokens that end.
    """

    def __init__(self, tokenizer: Any | None, vocabulary: int, eos: Collection[int]):
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, sorted(eos)

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError:
            raise QsunError(
                "response_format and a forced tool_choice need llguidance on the server; pip install 'qsun[structured]'"
            ) from None
        return llguidance

    @cached_property
    def _tokens(self) -> Any:
        if self._tokenizer is None or not self._eos:
            raise QsunError("the model has no tokenizer or no end token; structured answers need both")
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, self._vocabulary, self._eos)
        except ValueError:  # a kind that the library does not know: its tokens one by one
            wrapped = self._library.TokenizerWrapper(_TokenTable(self._tokenizer, self._vocabulary, self._eos))
            return self._library.LLTokenizer(wrapped, self._vocabulary, self._eos)

    def json(self, schema: Mapping[str, Any]) -> "JsonConstraint":
        """Return the constraint of one answer; may take a second. Raises QsunError for a schema it cannot enforce."""
        library = self._library
        matcher_type = library.LLMatcher
        try:
            grammar = matcher_type.grammar_from_json_schema(json.dumps(schema), overrides=_LAYOUT)
        except (ValueError, RecursionError) as error:
            raise QsunError(f"the JSON schema is invalid: {_line(error)}") from None
        matcher = matcher_type(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise QsunError(f"the JSON schema cannot be enforced: {_line(matcher.get_error())}")
        return JsonConstraint(matcher)


class _TokenTable:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Sequence[int]):
        spelling = Spelling(tokenizer)
        self.eos_token_id, self.bos_token_id = eos[0], None
        self.special_token_ids = tokenizer.all_special_ids
        self.tokens = [spelling.bytes(token) for token in range(min(len(tokenizer), vocabulary))]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)


def _line(error: object) -> str:
    return str(error).strip().split("\n")[0][:200]


class JsonConstraint:
    """Follows one answer token by token."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def mask(self, logits: Tensor) -> None:
        """Set the (vocabulary,) logits of tokens that must not follow to -inf."""
        allowed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(allowed, bitorder="little")[: logits.shape[-1]].astype(bool)
        logits[: len(bits)].masked_fill_(torch.from_numpy(~bits).to(logits.device), float("-inf"))
        logits[len(bits) :] = float("-inf")

    def advance(self, token: int) -> None:
        """Take the token that was chosen."""
        self._matcher.consume_token(token)


def call_schema(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON schema of a call to one of the functions, each with a name and parameters.

    Raises:
        QsunError: parameters that are nested too deeply.
    """
    calls = []
    for number, function in enumerate(functions):
        place = "#/properties/arguments" if len(functions) == 1 else f"#/anyOf/{number}/properties/arguments"
        try:
            arguments = _moved(function.get("parameters") or {"type": "object"}, place)
        except RecursionError:
            raise QsunError(f"the JSON schema of {function['name']} is nested too deeply; use fewer levels") from None
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _moved(schema: Any, place: str) -> Any:
    """Return a schema as part of a larger one, at `place`: its references to its own parts lead there."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict) or isinstance(schema.get("$id"), str):  # below an $id they lead to what has it
        return schema
    moved = dict(schema)
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            moved[key] = {name: _moved(part, place) for name, part in value.items()}
        elif key == "$ref" and isinstance(value, str) and (value in ("", "#") or value.startswith("#/")):
            moved[key] = place + value[1:]
        elif key not in _DATA:
            moved[key] = _moved(value, place)
    return moved
