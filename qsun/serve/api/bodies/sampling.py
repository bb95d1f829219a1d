"""What every request for text may ask for, whatever its endpoint."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from qsun.serve.api.bodies.fields import MOST_CHOICES, Body, Flag, Name, Natural, Positive, Real, Stops, Token, wrong

_Penalty = Annotated[Real, Field(ge=-2, le=2)]
_NOTHING: tuple[Any, ...] = (False, "", [], {})


class StreamOptions(Body):
    """continuous_usage_stats (vLLM's): the usage so far in every chunk."""

    include_usage: Flag = False
    continuous_usage_stats: Flag = False

    @model_validator(mode="after")
    def _usage_is_asked_for(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise wrong("stream_options", "continuous_usage_stats needs include_usage: true")
        return self


class SamplingBody(Body):
    """Beyond OpenAI's fields: those of vLLM that clients and load generators send."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_beam_search": _NOTHING,
        "length_penalty": (1, 1.0),
        "skip_special_tokens": (True,),
        "include_stop_str_in_output": _NOTHING,
        "bad_words": _NOTHING,
        "allowed_token_ids": _NOTHING,
        "logits_processors": _NOTHING,
        "truncate_prompt_tokens": _NOTHING,
        "prompt_logprobs": _NOTHING,
        "guided_json": _NOTHING,
        "guided_regex": _NOTHING,
        "guided_choice": _NOTHING,
        "guided_grammar": _NOTHING,
        "structured_outputs": _NOTHING,
    }

    model: Name
    max_tokens: Positive | None = None
    min_tokens: Natural = 0
    temperature: Annotated[Real, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(strict=True, ge=-1, le=1 << 31)] = 0  # -1: vLLM's word for all
    min_p: Annotated[Real, Field(ge=0, le=1)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[Real, Field(gt=0, le=100)] = 1.0
    logit_bias: Annotated[dict[int, Annotated[Real, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    n: Annotated[int, Field(strict=True, ge=1, le=MOST_CHOICES)] = 1
    seed: Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stops = []
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] = []
    ignore_eos: Flag = False
    stream: Flag = False
    stream_options: StreamOptions | None = None
    return_token_ids: Flag = False
    user: Annotated[str, Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "SamplingBody":
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "stream_options needs stream: true")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        """The most likely tokens wanted beside each token; None: no log-probabilities at all."""
        return None
