"""Generation over the seam: every prompt is prefilled by its own module, and one decode batch serves them all.

prompt t0 .. t(n-1):  prefill module -> KV of t0 .. t(n-2);  decode module <- t(n-1), -> every output token
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsun.errors import QsunError
from qsun.model.locate import encode, load_tokenizer
from qsun.runtime.decode_cache import DecodeCache
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.decode_step import DecodeStep
from qsun.runtime.prefill_module import PrefillModule
from qsun.runtime.row_text import RowText
from qsun.runtime.sampling import Sampler, row_seed
from qsun.runtime.seam import prefilled_rows

_PREFILL_TOKENS = 8192  # padding included, in one forward pass of a prefill module
_COLUMNS = 64  # a static cache's size is a multiple of this


@dataclass(frozen=True)
class GenerateConfig:
    """How to generate.

    Attributes:
        max_new_tokens: for each prompt.
        temperature: 0 is greedy. top_p, top_k: what sampling keeps; 1.0 and 0 keep all.
        seed: one for the call (prompt i then uses a draw of its own, by i), or one for each prompt.
        stop: strings that end a row; the result ends before them.
        skip_special_tokens: leave special tokens out of texts, in which `stop` is looked for.
        eos: tokens that end a row; None: the model's own; () for none.
        batch_size: prompts that are decoded together.
        prefill_chunk: tokens that a prefill module reads at a time.
        static: decode from a cache of fixed size, as a CUDA graph needs; None: on a GPU.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | Sequence[int] = 0
    stop: Sequence[str] = ()
    skip_special_tokens: bool = True
    eos: Sequence[int] | None = None
    batch_size: int = 64
    prefill_chunk: int = 2048
    static: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, good, limit in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("prefill_chunk", self.prefill_chunk >= 1, "1 or more"),
        ):
            if not good:
                raise QsunError(f"{name} {getattr(self, name)!r} is out of range; use {limit}")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "GenerateConfig":
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise QsunError(f"unknown setting {unknown[0]!r}; known are: {', '.join(sorted(known))}")
        return cls(**settings)


@dataclass(frozen=True)
class Piece:
    """What one step gave one prompt: tokens, text that can be shown (may be empty), and why it ended, if it did.

    finish is "", "eos", "stop" or "length".
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
    wants_text = bool(config.stop) or any(isinstance(prompt, str) for prompt in prompts)
    tokenizer = load_tokenizer(decode.directory) if wants_text else None
    if wants_text and tokenizer is None:
        raise QsunError(f"{decode.directory} has no tokenizer; give prompts as token ids, and no stop strings")
    ids = [_prompt_tokens(p, number, tokenizer, decode, config) for number, p in enumerate(prompts)]
    seeds = _seeds(config, len(prompts))
    return _batches(modules, decode, ids, seeds, tokenizer, config)


def _prompt_tokens(prompt: Any, number: int, tokenizer: Any, decode: DecodeModule, config: GenerateConfig) -> list[int]:
    ids = encode(tokenizer, prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    check_tokens(ids, decode, config.max_new_tokens, f"prompt {number}")
    return ids


def check_tokens(ids: Sequence[int], decode: DecodeModule, max_new_tokens: int, name: str) -> None:
    """Raise QsunError for a prompt that is empty, too long for the model with its answer, or no token ids of it."""
    model: Any = decode.model
    limit, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if not ids:
        raise QsunError(f"{name} is empty; the decode module must be fed at least one token")
    if len(ids) + max_new_tokens - 1 > limit:
        raise QsunError(
            f"{name} has {len(ids)} tokens, and max_new_tokens {max_new_tokens} goes over the model's "
            f"{limit} positions; " + (f"use {limit + 1 - len(ids)} or less" if len(ids) <= limit else "shorten it")
        )
    if min(ids) < 0 or max(ids) >= vocabulary:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise QsunError(f"{name} has token {bad}, outside the model's vocabulary of {vocabulary}")


def _seeds(config: GenerateConfig, count: int) -> list[int]:
    if isinstance(config.seed, int):
        return [row_seed(config.seed, number) for number in range(count)]
    if len(config.seed) != count:
        raise QsunError(f"{len(config.seed)} seeds for {count} prompts; give one, or one for each prompt")
    return list(config.seed)


def _batches(
    modules: list[PrefillModule],
    decode: DecodeModule,
    ids: list[list[int]],
    seeds: list[int],
    tokenizer: Any,
    config: GenerateConfig,
) -> Iterator[Piece]:
    for first in range(0, len(ids), config.batch_size):
        batch = range(first, min(first + config.batch_size, len(ids)))
        skip = config.skip_special_tokens
        texts = [None if tokenizer is None else RowText(tokenizer, config.stop, skip) for _ in batch]
        sampler = Sampler(config.temperature, config.top_p, config.top_k, [seeds[i] for i in batch])
        step = start_batch([modules[i] for i in batch], decode, [ids[i] for i in batch], config)
        last = torch.tensor([ids[i][-1] for i in batch], device=step.starts.device)
        for piece in _decode(step, last, sampler, texts, eos_tokens(decode, config), config.max_new_tokens):
            yield dataclasses.replace(piece, prompt=first + piece.prompt)


@torch.no_grad()
def start_batch(
    modules: Sequence[PrefillModule], decode: DecodeModule, ids: Sequence[Sequence[int]], config: GenerateConfig
) -> DecodeStep:
    """Prefill all rows and gather their KV in one cache; the result is fed the last token of each prompt."""
    model: Any = decode.model
    weight = model.model.embed_tokens.weight
    device = weight.device
    lengths = [len(row) - 1 for row in ids]
    filled = max(lengths)
    static = device.type == "cuda" if config.static is None else config.static
    columns = -(-(filled + config.max_new_tokens) // _COLUMNS) * _COLUMNS
    cache = DecodeCache(len(ids), filled, columns, weight, static)
    for rows in _prefill_groups(modules, lengths):
        prompts = [list(ids[row][:-1]) for row in rows]
        written = prefilled_rows(modules[rows[0]].model, prompts, config.prefill_chunk)
        for row, layers in zip(rows, written, strict=True):
            cache.place(row, layers)
    starts = torch.tensor([filled - length for length in lengths], device=device)
    return DecodeStep(model, cache, starts)


def _prefill_groups(modules: Sequence[PrefillModule], lengths: list[int]) -> Iterator[list[int]]:
    """Rows that one module reads together: of like length, and not too many tokens."""
    by_module: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[row]:
            by_module.setdefault(id(modules[row].model), []).append(row)
    for rows in by_module.values():
        group: list[int] = []
        for row in rows:
            if group and (len(group) + 1) * lengths[row] > _PREFILL_TOKENS:
                yield group
                group = []
            group.append(row)
        yield group


def _decode(
    step: DecodeStep, tokens: Tensor, sampler: Sampler, texts: list[RowText | None], eos: set[int], limit: int
) -> Iterator[Piece]:
    rows = list(range(len(tokens)))  # prompt of each place in the batch
    done: set[int] = set()
    for count in range(1, limit + 1):
        tokens = sampler(step(tokens))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row not in done:
                piece = _piece(row, token, texts[row], eos, count == limit)
                if piece.finish:
                    done.add(row)
                yield piece
        running = [place for place, row in enumerate(rows) if row not in done]
        if not running:
            return
        if 2 * len(running) <= len(rows) and not step.cache.static:
            places = torch.tensor(running, device=tokens.device)
            step.keep(places)
            sampler.keep(running)
            rows, tokens = [rows[place] for place in running], tokens[places]


def _piece(row: int, token: int, text: RowText | None, eos: set[int], last: bool) -> Piece:
    stopped = text is not None and token not in eos and text.add(token)
    finish = "eos" if token in eos else "stop" if stopped else "length" if last else ""
    shown = "" if text is None else text.rest(stopped) if finish else text.fresh()
    return Piece(row, (token,), shown, finish)


def eos_tokens(decode: DecodeModule, config: GenerateConfig) -> set[int]:
    """Tokens that end a row."""
    if config.eos is not None:
        return set(config.eos)
    model: Any = decode.model
    own = model.generation_config.eos_token_id
    own = model.config.eos_token_id if own is None else own
    return set() if own is None else set(own) if isinstance(own, (list, tuple)) else {own}
