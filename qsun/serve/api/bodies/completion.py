"""POST /v1/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from qsun.engine.config import MOST_LOGPROBS
from qsun.serve.api.bodies.fields import MOST_CHOICES, Flag, Natural, Text, Tokens, wrong
from qsun.serve.api.bodies.sampling import SamplingBody


def _listed(prompt: object) -> object:
    """One prompt as a list of one, be it text or tokens."""
    alone = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
    return [prompt] if alone else prompt


Prompts = Annotated[
    list[Text] | list[Annotated[Tokens, Field(min_length=1)]],
    Field(min_length=1, max_length=MOST_CHOICES),
    BeforeValidator(_listed, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
]


class CompletionBody(SamplingBody):
    """echo: the prompt is part of the answer, with the log-probabilities of its tokens where logprobs is set."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "suffix": ("",),
        "add_special_tokens": (True,),
        "response_format": ({"type": "text"},),
    }

    prompt: Prompts
    max_tokens: Natural | None = None  # type: ignore[assignment]
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Flag = False
    best_of: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _is_possible(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens", "max_tokens 0 leaves nothing to generate; use 1 or more, or set echo")
        if self.best_of not in (None, self.n):
            raise wrong("best_of", f"best_of {self.best_of} is not supported; leave it out")
        return self
