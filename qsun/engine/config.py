"""Settings of the engine, of one request's tokens, and of a call of `qsun.generate`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from qsun.config import Settings
from qsun.errors import QsunError
from qsun.runtime.tokens.sampling import row_seed

if TYPE_CHECKING:
    import torch

MOST_LOGPROBS = 20
MOST_DRAFTED = 32
FP8_CAPABILITY = (8, 9)  # of the first GPUs that convert e4m3
_Positive = Annotated[int, Field(ge=1)]
_Natural = Annotated[int, Field(ge=0)]
_RowSeed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]  # what torch's manual_seed accepts
_CallSeed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]  # leaves room for the seeds of further rows
_Strings = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda given: (given,) if isinstance(given, str) else tuple(given)),
]
_Tokens = Annotated[tuple[_Natural, ...], BeforeValidator(tuple)]
_Biases = Annotated[
    tuple[tuple[_Natural, Annotated[float, Field(allow_inf_nan=False)]], ...],
    BeforeValidator(lambda given: tuple(given.items() if isinstance(given, Mapping) else given)),
]
_KVDtype = Literal["auto", "fp8"]
_Logprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None
_BY_PROMPT = {"seed", "logprobs", "prompt_logprobs", "constraint"}


class Sampling(Settings):
    """How one request's tokens are chosen and when it ends.

    Attributes:
        max_new_tokens: 0 only scores the prompt (prompt_logprobs).
        temperature: 0 is greedy. top_p, top_k, min_p: what sampling keeps; 1.0, 0 and 0.0 keep all.
        repetition_penalty, frequency_penalty, presence_penalty, logit_bias: see LogitShaping.
        stop: strings that end the answer, which ends before them. stop_token_ids: tokens that do, with finish "stop".
        ignore_eos: go on past the model's end token.
        min_new_tokens: no end token and no stop string ends the answer before.
        constraint: see Constraint; of this request alone, as it remembers tokens.
        logprobs: None for none; otherwise the log-probability of each token and of this many most likely ones, of the
            model's own distribution, before all other settings.
        prompt_logprobs: the same of the prompt's tokens but the first, in the first update: t(i) is scored by the
            decode module, fed with t(i-1) on the prefill module's KV of t(0) .. t(i-2).
        detokenize: make text, in which `stop` is looked for. skip_special_tokens: leave special tokens out of it.
    """

    max_new_tokens: _Natural = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: _Natural = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    logit_bias: _Biases = ()
    seed: _RowSeed = 0
    stop: _Strings = ()
    stop_token_ids: _Tokens = ()
    ignore_eos: bool = False
    min_new_tokens: _Natural = 0
    constraint: Any = None
    logprobs: _Logprobs = None
    prompt_logprobs: _Logprobs = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if not self.max_new_tokens and self.prompt_logprobs is None:
            raise QsunError("max_new_tokens 0 is out of range; use 1 or more, or 0 with prompt_logprobs")
        if self.min_new_tokens > self.max_new_tokens:
            raise QsunError(f"min_new_tokens {self.min_new_tokens} is over max_new_tokens {self.max_new_tokens}")
        return self

    @property
    def shapes_logits(self) -> bool:
        """Whether anything changes the logits before a token is chosen."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return bool(penalties or self.logit_bias or self.min_new_tokens or self.constraint is not None)


class EngineConfig(Settings):
    """Limits of the engine.

    Attributes:
        max_batch: requests that prefill or decode at a time.
        kv_bytes: of the decode batch's KV; 0: a quarter of what is free on its device when the engine is made, so load
            prefill modules before. KV of prompts that are being read lies beside it, at most as much again.
        prefix_bytes: of the prefix cache; 0: none.
        prefill_tokens: prompt tokens read between two decode steps. pass_tokens: most in one forward pass.
        max_waiting: requests in the queues; one more is refused.
        max_adapters: LoRA adapters in memory; the least recently used goes first, and comes back when it is needed.
        partitioned: decode each model's requests in a batch of their own, in turns: conventional serving, to compare.
        static: fixed shapes of a decode step, as CUDA graphs need; None: on a GPU.
        speculate: most tokens that a row drafts in a step (drafts.py); 0: none. Steps then have no fixed shapes.
        kv_dtype: of the decode batch's KV. fp8 (e4m3, a scale for each head of each token) takes about half the bytes
            of 16 bits; steps that our GPU kernels do not compute dequantize all of it. Prompts' KV before is not.
    """

    max_batch: _Positive = 64
    kv_bytes: _Natural = 0
    prefix_bytes: _Natural = 256 << 20
    prefill_tokens: _Positive = 512
    max_waiting: _Positive = 256
    max_adapters: _Positive = 32
    partitioned: bool = False
    static: bool | None = None
    pass_tokens: _Positive = 2048
    speculate: Annotated[int, Field(ge=0, le=MOST_DRAFTED)] = 0
    kv_dtype: _KVDtype = "auto"

    @property
    def of_batches(self) -> tuple[bool | None, int, str]:
        """The settings of a DecodeBatch."""
        return self.static, self.speculate, self.kv_dtype


class GenerateConfig(Settings):
    """How to generate.

    Attributes:
        sampling: of every prompt; its fields (max_new_tokens, temperature, stop ...) are settings of the call as well.
        seed: one for the call (prompt i then uses a draw of its own, by i), or one for each prompt.
        eos: tokens that end a row; None: the model's own; () for none.
        batch_size: prompts that are decoded together.
        prefill_chunk: tokens that a prefill module reads at a time.
        static: decode from a cache of fixed size, as a CUDA graph needs; None: on a GPU.
        speculate, kv_dtype: see EngineConfig.
    """

    sampling: Sampling = Sampling()
    seed: _CallSeed | Sequence[int] = 0  # Sampling bounds those of a sequence
    eos: Sequence[int] | None = None
    batch_size: _Positive = 64
    prefill_chunk: _Positive = 2048
    static: bool | None = None
    speculate: Annotated[int, Field(ge=0, le=MOST_DRAFTED)] = 0
    kv_dtype: _KVDtype = "auto"

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "GenerateConfig":
        """Return the settings of a call, those of Sampling among them."""
        own = set(cls.model_fields) - {"sampling"}
        each = set(Sampling.model_fields) - _BY_PROMPT
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


def check_steps(config: EngineConfig | GenerateConfig, device: "torch.device") -> None:
    """Raise QsunError for settings that a device cannot follow; ask before anything is loaded on it."""
    if config.speculate and (config.static or device.type == "cuda"):
        raise QsunError("speculate is not supported on a GPU or with static=True yet; use 0")
    if config.kv_dtype == "fp8" and device.type == "cuda":
        import torch

        able = torch.cuda.get_device_capability(device)
        if able < FP8_CAPABILITY:
            needed, has = (".".join(map(str, each)) for each in (FP8_CAPABILITY, able))
            raise QsunError(f"kv_dtype fp8 needs compute capability {needed}, and {device} has {has}; use auto")
