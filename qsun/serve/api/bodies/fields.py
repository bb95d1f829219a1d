"""What all bodies share: null means unset, unknown fields are logged once, and booleans are not numbers."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

log = logging.getLogger(__name__)

MOST_CHOICES = 16  # prompts x n of one request
_MOST_STOPS = 16
_MOST_NAMES = 1000  # of unknown fields that are remembered

Text = Annotated[str, Field(max_length=1 << 22)]
Name = Annotated[str, Field(max_length=256)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[int, Field(strict=True, ge=1, le=1 << 31)]
Natural = Annotated[int, Field(strict=True, ge=0, le=1 << 31)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Token = Annotated[int, Field(strict=True, ge=0, le=1 << 31)]
Tokens = Annotated[list[Token], Field(max_length=1 << 20)]

_noted: set[str] = set()


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=_MOST_STOPS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


class Body(BaseModel):
    """A JSON object of a request.

    Attributes:
        unsupported: fields that would change the answer and cannot be done, with the values that change nothing.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), populate_by_name=True)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _keep_known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name in cls.unsupported.keys() & given.keys():
            if given.pop(name) not in cls.unsupported[name]:
                raise wrong(name, f"{name} is not supported; leave it out")
        known = {field.alias or name for name, field in cls.model_fields.items()} | cls.model_fields.keys()
        _note(given.keys() - known)
        return given


def wrong(field: str, message: str) -> PydanticCustomError:
    """Return the error of a field that a check of the whole body finds."""
    return PydanticCustomError("wrong_field", "{message}", {"message": message, "field": field})


def _note(names: set[str]) -> None:
    new = {str(name)[:64] for name in names} - _noted
    if new and len(_noted) < _MOST_NAMES:
        _noted.update(new)
        log.warning("unknown fields of requests are ignored: %s", ", ".join(sorted(map(repr, new))))
