"""Errors for users: one line that names the value, the limit and the fix."""

import difflib
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError  # kernels and their benches run without it


class QsunError(ValueError):
    """Bad input or an impossible request. The command line prints it as one line and exits with 2."""


class ResumeError(QsunError):
    """An interrupted run cannot be continued with these settings."""


class Diverged(QsunError):
    """The loss of a run of tuning is not finite."""


class OutOfMemory(QsunError):
    """Memory ran out, or is too little to begin; what other processes free may be enough."""


_MESSAGES = {
    "literal_error": "is not supported; use {expected}",
    "greater_than_equal": "is out of range; use {ge} or more",
    "greater_than": "is out of range; use more than {gt}",
    "less_than_equal": "is out of range; use {le} or less",
    "less_than": "is out of range; use less than {lt}",
    "finite_number": "is not a finite number",
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "is not a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "is not a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "is neither true nor false"),
    "string_type": "is not a string",
}


def one_line(error: "ValidationError", root: "type[BaseModel]") -> str:
    """Describe the first error of a validation: the value, what is allowed, the fix."""
    first = error.errors()[0]
    kind, context = first["type"], first.get("ctx", {})
    place = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    if kind == "value_error":
        text = str(context["error"])
        own = isinstance(context["error"], QsunError) or not place
        return text if own else f"{place} {shortened(repr(first['input']))} is invalid: {text}"
    if kind == "extra_forbidden":
        known = _known(root, [str(part) for part in first["loc"][:-1]])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown setting {place!r}; {hint}known are: {', '.join(known)}"
    if kind == "missing":
        return f"{place} is missing; add it"
    if kind in _MESSAGES:
        choices = str(context.get("expected", "")).replace("'", "")
        return (
            f"{place} {shortened(repr(first['input']))} {_MESSAGES[kind].format_map(context | {'expected': choices})}"
        )
    return f"{place} {shortened(repr(first['input']))} is invalid: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _is_branch(part: object) -> bool:
    """Whether pydantic made this name for a branch of a union."""
    return isinstance(part, str) and ("[" in part or part in ("int", "constrained-int", "constrained-float"))


def _known(root: "type[BaseModel]", path: list[str]) -> list[str]:
    """The settings of the section that a path leads to."""
    model = root
    for part in path:
        field = model.model_fields.get(part)
        inner = [] if field is None else _models_in(field.annotation)
        model = inner[0] if inner else model
    return sorted(model.model_fields)


def _models_in(annotation: Any) -> "list[type[BaseModel]]":
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def shortened(text: object, limit: int = 80) -> str:
    """Return a text on one line, cut to so many characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[:limit] + "..."
