"""Calibration data: token sequences, and which of their positions a decode module will ever see.

A decode module is only fed response tokens and the last token of the prompt; the prompt's KV comes from a prefill
module. A sample is therefore its tokens and the length of the part that prefill reads; text has none, so that every
position counts.

Sources: .txt, .jsonl ({"text"}, {"messages"} or {"prompt", "response"}), .npy token ids [samples, length], a Hugging
Face data set, or the packaged text.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qsun.data.chat import assistant_turns, render_turn, rendered_tokens
from qsun.data.jsonl import read_rows, text_of
from qsun.errors import QsunError
from qsun.model.locate import encode

log = logging.getLogger(__name__)
BUILTIN = "builtin"


@dataclass(frozen=True)
class Sample:
    """tokens of one sequence; prefill module number `module` (None: the base) reads the first `prefill_tokens`."""

    tokens: tuple[int, ...]
    prefill_tokens: int = 0
    module: int | None = None


@dataclass(frozen=True)
class Calibration:
    """Samples ready for the walk, what they were made from, and the first one as readable text."""

    samples: tuple[Sample, ...]
    source: str
    preview: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens, of which part prefill reads, and of which prefill module does."""
        digest = hashlib.sha256()
        for sample in self.samples:
            reader = [] if sample.module is None else [sample.module]
            digest.update(json.dumps([sample.prefill_tokens, sample.tokens, *reader]).encode())
        return digest.hexdigest()

    @property
    def decode_tokens(self) -> int:
        return sum(len(s.tokens) - s.prefill_tokens for s in self.samples)


def read_calibration(
    sources: Iterable[str],
    tokenizer: Any,
    vocab_size: int,
    samples: int,
    seq_len: int,
    seed: int,
    modules: Sequence[int | None] = (),
) -> Calibration:
    """Read sources and draw `samples` sequences of at most `seq_len` tokens, an equal share from each source.

    Args:
        sources: paths, data set ids, or "builtin".
        tokenizer: of the model; may be None where every source is .npy.
        vocab_size: tokens must be below it.
        modules: number of the prefill module that reads each source's prompts; default: the base reads all of them.
    Raises:
        QsunError: an unreadable, empty or too short source, or a token outside the vocabulary; names file and line.
    """
    names = list(sources)
    if not names:
        raise QsunError("calibration: no source is given")
    chosen: list[Sample] = []
    for number, name in enumerate(names):
        share = samples // len(names) + (number < samples % len(names))
        found = _read_source(name, tokenizer, seq_len)
        _check_tokens(found, vocab_size, name)
        drawn = _draw(found, share, seed + number, name)
        chosen += _read_by(modules[number], drawn, name) if modules else drawn
    text = list(chosen[0].tokens)
    preview = tokenizer.decode(text) if tokenizer is not None else " ".join(map(str, text))
    return Calibration(tuple(chosen), ", ".join(names), preview)


def builtin_text() -> Path:
    """The packaged general text: Python's language reference, prose with code (PSF licence)."""
    return Path(__file__).parent / "calibration.txt"


def _read_source(name: str, tokenizer: Any, seq_len: int) -> list[Sample]:
    if name == BUILTIN:
        return _windows(_token_stream(tokenizer, [_read_text(builtin_text())]), seq_len, name)
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl", ".npy"):
        return _samples_of_rows(_data_set_rows(name), tokenizer, seq_len, name)
    if not path.is_file():
        raise QsunError(f"calibration file {name} does not exist")
    if suffix == ".npy":
        return _read_npy(path, seq_len)
    if tokenizer is None:
        raise QsunError(
            f"calibration file {name} is text, but the model directory has no tokenizer; give .npy token ids"
        )
    if suffix == ".txt":
        return _windows(_token_stream(tokenizer, [_read_text(path)]), seq_len, name)
    return _samples_of_rows(read_rows(path, "calibration"), tokenizer, seq_len, name)


def _draw(found: list[Sample], count: int, seed: int, name: str) -> list[Sample]:
    if len(found) < count and not Path(name).is_relative_to(Path(__file__).parents[1]) and name != BUILTIN:
        log.warning("calibration source %s gives %d samples, fewer than the %d asked for", name, len(found), count)
    if len(found) <= count:
        return found
    return random.Random(seed).sample(found, count)


def _read_by(module: int | None, samples: list[Sample], name: str) -> list[Sample]:
    if module is not None and not any(sample.prefill_tokens for sample in samples):
        raise QsunError(
            f"calibration source {name} has no prompts for its prefill module to read; give prompt/response or chat "
            "rows, or the base as its --calib-prefill"
        )
    return [replace(sample, module=module) for sample in samples]


def _check_tokens(samples: list[Sample], vocab_size: int, name: str) -> None:
    for sample in samples:
        low, high = min(sample.tokens), max(sample.tokens)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise QsunError(
                f"calibration source {name} has token {bad}, outside the model's vocabulary of {vocab_size}"
            )


def _read_npy(path: Path, seq_len: int) -> list[Sample]:
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise QsunError(f"calibration file {path} is not a sound .npy file: {error}") from None
    if not isinstance(ids, np.ndarray):
        ids.close()
        raise QsunError(f"calibration file {path} is an .npz archive; save one array as .npy")
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise QsunError(
            f"calibration file {path} holds {ids.dtype} {list(ids.shape)}; it must be integers [samples, length]"
        )
    return [Sample(tuple(row)) for row in ids[:, :seq_len].tolist()]


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise QsunError(f"calibration file {path}, line {line}: not valid UTF-8 ({error.reason})") from None
    if not text.strip():
        raise QsunError(f"calibration file {path} is empty")
    return text


def _data_set_rows(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a Hugging Face data set, `id` or `id:split`; a folder on disk works as well."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise QsunError(
            f"calibration source {name!r} is no .txt, .jsonl or .npy file; for data sets, pip install 'qsun[data]'"
        ) from None

    path, _, split = name.partition(":")
    try:
        data = load_dataset(path, split=split or "train", streaming=True)
        yield from ((f"data set {name}, row {number}", row) for number, row in enumerate(data))
    except (OSError, ValueError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise QsunError(
            f"calibration source {name!r} is no .txt, .jsonl or .npy file, and cannot be loaded as a data set: {reason}"
        ) from None


def _samples_of_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], tokenizer: Any, seq_len: int, name: str
) -> list[Sample]:
    if tokenizer is None:
        raise QsunError(
            f"calibration source {name} is text, but the model directory has no tokenizer; give .npy token ids"
        )
    texts: list[str] = []
    samples: list[Sample] = []
    for where, row in rows:
        if "messages" in row:
            samples.append(_chat_sample(tokenizer, row, seq_len, where))
        elif "prompt" in row and "response" in row:
            prompt = encode(tokenizer, text_of(row, "prompt", where))
            response = rendered_tokens(tokenizer, text_of(row, "response", where))
            samples.append(_decode_sample(prompt, [*response, *_end(tokenizer)], seq_len, where))
        elif "text" in row:
            texts.append(text_of(row, "text", where))
        else:
            raise QsunError(f"{where}: needs 'text', 'messages', or 'prompt' and 'response'; it has {', '.join(row)}")
        if len(samples) + len(texts) >= _ROWS_AT_MOST:
            break
    if texts:
        samples += _windows(_token_stream(tokenizer, texts), seq_len, name)
    if not samples:
        raise QsunError(f"calibration source {name} is empty")
    return samples


_ROWS_AT_MOST = 100_000  # a streamed data set can be endless


def _chat_sample(tokenizer: Any, row: Mapping[str, Any], seq_len: int, where: str) -> Sample:
    """The last assistant turn is the response; all before it, as the model's template renders it, is the prompt."""
    prompt, whole = render_turn(tokenizer, row, assistant_turns(row["messages"], where)[-1], where)
    if not whole.startswith(prompt):
        prompt = ""  # a template that rewrites earlier turns: count every position
    head = rendered_tokens(tokenizer, prompt) if prompt else []
    tail = rendered_tokens(tokenizer, whole[len(prompt) :])
    return _decode_sample(head, tail, seq_len, where)


def _decode_sample(prompt: list[int], response: list[int], seq_len: int, where: str) -> Sample:
    """The last prompt token is decode's first input; the last response token is never an input."""
    tokens, prefill = (prompt + response)[:-1], max(len(prompt) - 1, 0)
    tokens = tokens[:seq_len]
    if len(tokens) <= prefill:
        raise QsunError(f"{where}: the prompt of {len(prompt)} tokens leaves no response within --seq-len {seq_len}")
    return Sample(tuple(tokens), prefill)


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _token_stream(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    if tokenizer is None:
        raise QsunError("text calibration needs a tokenizer, and the model directory has none; give .npy token ids")
    return [token for text in texts for token in encode(tokenizer, text)]


def _windows(tokens: list[int], seq_len: int, name: str) -> list[Sample]:
    if len(tokens) < seq_len:
        raise QsunError(
            f"calibration source {name} is too short: {len(tokens)} tokens, and one sample is {seq_len}; "
            f"use --seq-len {max(2, len(tokens))} or more text"
        )
    return [Sample(tuple(tokens[i : i + seq_len])) for i in range(0, len(tokens) - seq_len + 1, seq_len)]
