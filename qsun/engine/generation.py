"""Generation over the seam: every prompt is prefilled by its own module, and one decode batch serves them all.

prompt t0 .. t(n-1):  prefill module -> KV of t0 .. t(n-2);  decode module <- t(n-1), -> every output token

A loop over the engine that `qsun serve` runs too.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.engine.config import EngineConfig, GenerateConfig
from qsun.engine.decode.fixed_slots import budget_for
from qsun.engine.decode.slot_memory import free_tokens
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.errors import QsunError
from qsun.memory import available_bytes
from qsun.model.locate import encode
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.kv_cache import kv_bytes_per_token
from qsun.runtime.prefill_module import PrefillModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """What one step gave one prompt: tokens, text that can be shown (may be empty), and why it ended, if it did.

    finish is "", "eos", "stop", "length" or "error": the model computed NaN or Inf for this prompt.
    """

    prompt: int
    tokens: tuple[int, ...]
    text: str
    finish: str = ""


def generate(
    prefills: PrefillModule | Sequence[PrefillModule],
    decode: DecodeModule,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    **settings: Any,
) -> list[Any]:
    """Answer prompts; rows of one decode batch may come from different prefill modules.

    Args:
        prefills: one module for all prompts, or one for each.
        decode: the shared decode module.
        prompts: strings, or token ids.
        settings: of GenerateConfig: max_new_tokens, temperature, top_p, top_k, seed, stop, eos ...
    Returns:
        For strings, strings, without special tokens unless skip_special_tokens is False; for token ids, lists of token
        ids that end with the EOS token where there was one.
    Raises:
        QsunError: an empty prompt, one too long for the model, or a setting out of range.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    texts = ["" for _ in prompts]
    for piece in generate_stream(prefills, decode, prompts, **settings):
        tokens[piece.prompt] += piece.tokens
        texts[piece.prompt] += piece.text
    return [text if isinstance(prompt, str) else ids for prompt, ids, text in zip(prompts, tokens, texts, strict=True)]


def generate_stream(
    prefills: PrefillModule | Sequence[PrefillModule],
    decode: DecodeModule,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    **settings: Any,
) -> Iterator[Piece]:
    """`generate`, piece by piece as tokens come. Everything that can be refused is refused before the first piece."""
    config = GenerateConfig.of(settings)
    if isinstance(prompts, str):
        raise QsunError(f"prompts is one string, {prompts!r:.40}; give a list of prompts")
    modules = [prefills] * len(prompts) if isinstance(prefills, PrefillModule) else list(prefills)
    if len(modules) != len(prompts):
        raise QsunError(f"{len(modules)} prefill modules for {len(prompts)} prompts; give one, or one for each prompt")
    wants_text = bool(config.sampling.stop) or any(isinstance(prompt, str) for prompt in prompts)
    wants_text = settings.get("detokenize", wants_text)
    if wants_text and decode.tokenizer is None:
        raise QsunError(f"{decode.directory} has no tokenizer; give prompts as token ids, and no stop strings")
    names = {id(module): str(number) for number, module in enumerate(modules)}
    requests = [
        Request(
            id=str(number),
            model=names[id(module)],
            tokens=_tokens(prompt, decode),
            sampling=config.sampling.replace(seed=seed, detokenize=wants_text),
            seconds=float("inf"),
        )
        for number, (prompt, module, seed) in enumerate(zip(prompts, modules, config.seeds(len(prompts)), strict=True))
    ]
    engine = _engine(decode, requests, config)
    for number, module in enumerate(modules):
        if names[id(module)] == str(number):
            engine.add_module(str(number), module)
    for request in requests:
        engine.check(request, f"prompt {request.id}")
    return _pieces(engine, requests)


def _tokens(prompt: Any, decode: DecodeModule) -> tuple[int, ...]:
    return tuple(encode(decode.tokenizer, prompt) if isinstance(prompt, str) else (int(token) for token in prompt))


def _engine(decode: DecodeModule, requests: Sequence[Request], config: GenerateConfig) -> Engine:
    """An engine that reads all prompts of a batch before it decodes, with as much KV as they need or there is room."""
    model = decode.model
    weight = model.model.embed_tokens.weight
    longest = max((request.kv_tokens for request in requests), default=1) + config.speculate
    wanted = budget_for(model, max(1, min(config.batch_size, len(requests))), longest, config.static)
    per_token = kv_bytes_per_token(model.config, weight.dtype, config.kv_dtype)
    tokens = min(
        wanted, max(longest, free_tokens(model, config.kv_dtype), available_bytes(weight.device) // 2 // per_token)
    )
    limits = EngineConfig(
        max_batch=config.batch_size,
        kv_bytes=max(1, tokens) * per_token,
        prefix_bytes=0,
        prefill_tokens=1 << 62,
        max_waiting=max(1, len(requests)),
        static=config.static,
        speculate=config.speculate,
        kv_dtype=config.kv_dtype,
        pass_tokens=config.prefill_chunk,
    )
    engine = Engine(decode, limits)
    if config.eos is not None:
        engine.eos = set(config.eos)
    return engine


def _pieces(engine: Engine, requests: list[Request]) -> Iterator[Piece]:
    """Long prompts first: prompts of like length are read together, and the cache does not grow."""
    engine.submit(*sorted(requests, key=lambda request: -len(request.tokens)))
    try:
        while not engine.idle:
            for update in engine.step():
                if update.error:
                    log.warning("prompt %s: %s", update.request, update.error)
                yield Piece(int(update.request), update.tokens, update.text, update.finish)
    finally:
        engine.adapters.close()
