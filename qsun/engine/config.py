"""Settings of the engine, of one request's tokens, and of a call of `qsun.generate`."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from qsun.config import Settings
from qsun.errors import QsunError
from qsun.runtime.sampling import row_seed

MOST_LOGPROBS = 20
_Positive = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]
_Strings = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda given: (given,) if isinstance(given, str) else tuple(given)),
]


class Sampling(Settings):
    """How one request's tokens are chosen and when it ends.

    Attributes:
        temperature: 0 is greedy. top_p, top_k: what sampling keeps; 1.0 and 0 keep all.
        stop: strings that end the answer, which ends before them.
        ignore_eos: go on past the model's end token.
        logprobs: None for none; otherwise the log-probability of each token and of this many most likely ones, of the
            model's own distribution, before all other settings.
        detokenize: make text, in which `stop` is looked for. skip_special_tokens: leave special tokens out of it.
    """

    max_new_tokens: _Positive = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: _Count = 0
    seed: int = 0
    stop: _Strings = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True


class EngineConfig(Settings):
    """Limits of the engine.

    Attributes:
        max_batch: requests that prefill or decode at a time.
        kv_bytes: of the decode batch's KV; 0: a quarter of what is free on its device when the engine is made, so load
            prefill modules before. KV of prompts that are being read lies beside it, at most as much again.
        prefix_bytes: of the prefix cache; 0: none.
        prefill_tokens: prompt tokens read between two decode steps. pass_tokens: most in one forward pass.
        max_waiting: requests in the queues; one more is refused.
        partitioned: decode each model's requests in a batch of their own, in turns: conventional serving, to compare.
        static: fixed shapes of a decode step, as CUDA graphs need; None: on a GPU.
    """

    max_batch: _Positive = 64
    kv_bytes: _Count = 0
    prefix_bytes: _Count = 256 << 20
    prefill_tokens: _Positive = 512
    max_waiting: _Positive = 256
    partitioned: bool = False
    static: bool | None = None
    pass_tokens: _Positive = 2048


class GenerateConfig(Settings):
    """How to generate.

    Attributes:
        sampling: of every prompt; its fields (max_new_tokens, temperature, stop ...) are settings of the call as well.
        seed: one for the call (prompt i then uses a draw of its own, by i), or one for each prompt.
        eos: tokens that end a row; None: the model's own; () for none.
        batch_size: prompts that are decoded together.
        prefill_chunk: tokens that a prefill module reads at a time.
        static: decode from a cache of fixed size, as a CUDA graph needs; None: on a GPU.
    """

    sampling: Sampling = Sampling()
    seed: int | Sequence[int] = 0
    eos: Sequence[int] | None = None
    batch_size: _Positive = 64
    prefill_chunk: _Positive = 2048
    static: bool | None = None

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "GenerateConfig":
        """Return the settings of a call, those of Sampling among them."""
        own = set(cls.model_fields) - {"sampling"}
        each = set(Sampling.model_fields) - {"seed", "logprobs", "detokenize"}
        unknown = sorted(set(settings) - own - each)
        if unknown:
            raise QsunError(f"unknown setting {unknown[0]!r}; known are: {', '.join(sorted(own | each))}")
        sampling = Sampling(**{name: settings[name] for name in each & set(settings)})
        return cls(sampling=sampling, **{name: settings[name] for name in own & set(settings)})

    def seeds(self, prompts: int) -> list[int]:
        """Return a seed for each prompt."""
        if isinstance(self.seed, int):
            return [row_seed(self.seed, number) for number in range(prompts)]
        if len(self.seed) != prompts:
            raise QsunError(f"{len(self.seed)} seeds for {prompts} prompts; give one, or one for each prompt")
        return list(self.seed)
