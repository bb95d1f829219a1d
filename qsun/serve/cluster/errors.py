"""A pydantic error as one line of qsun's: the value, what is allowed, the fix."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """The most telling error of a validation."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    if first["type"] == "extra_forbidden":
        known = _known(root, [str(part) for part in first["loc"][:-1]])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown setting {place!r}; {hint}known are: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{place} is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place} {_shown(first['input'])} is not taken: {message[:1].lower()}{message[1:]}"


def _is_branch(part: object) -> bool:
    """Names that pydantic gives to the branches of a union."""
    return isinstance(part, str) and ("[" in part or part == "int")


def _known(root: type[BaseModel], path: list[str]) -> list[str]:
    """Settings of the section that a path leads to."""
    model = root
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            continue
        inner = _models_in(field.annotation)
        model = inner[0] if inner else model
    return sorted(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _shown(value: object, limit: int = 80) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[:limit] + "..."
