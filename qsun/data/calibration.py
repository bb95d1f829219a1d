"""Calibration data: token sequences, and which of their positions a decode module will ever see.

A decode module is only fed response tokens and the last token of the prompt; the prompt's KV comes from a prefill
module. A sample is therefore a sequence and the length of the part that prefill reads; in plain text every position
counts.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qsun.data.chat import chat_tokens
from qsun.data.examples import assistant_turns, check_vocabulary, pair_example, tools_of, turn_example
from qsun.data.jsonl import check_no_pipe, file_text, text_of
from qsun.data.shapes import RowLeftOut
from qsun.data.sources import converted_rows, file_kind
from qsun.errors import QsunError
from qsun.model.locate import encode

log = logging.getLogger(__name__)
BUILTIN = "builtin"
HELD_OUT = 8  # one sample of so many, for polish
_PACKAGE = Path(__file__).parents[1]
_ROW, _READ_AT_MOST = 640, 64_000_000  # characters; a row counts as 640 at least, so 100,000 rows are read at most
_WHOLE_TEXT, _PIECE = 4 << 20, 1 << 16  # characters; a tokenizer takes 140 bytes for each that it reads at once


@dataclass(frozen=True)
class Sample:
    """The tokens of one sequence; prefill module number `module` (None: the base) reads the first `prefill_tokens`."""

    tokens: tuple[int, ...]
    prefill_tokens: int = 0
    module: int | None = None


@dataclass(frozen=True)
class Calibration:
    """Samples, the sources that they were drawn from, and the first one as readable text.

    held_out: samples that no pass sees; they decide how long polish learns.
    """

    samples: tuple[Sample, ...]
    source: str
    preview: str
    held_out: tuple[Sample, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens, of the part that prefill reads, and of the prefill module's number."""
        digest = hashlib.sha256()
        for sample in self.samples + self.held_out:
            reader = [] if sample.module is None else [sample.module]
            digest.update(json.dumps([sample.prefill_tokens, sample.tokens, *reader]).encode())
        return digest.hexdigest()

    @property
    def decode_tokens(self) -> int:
        return sum(len(s.tokens) - s.prefill_tokens for s in self.samples)


def hold_out(calibration: Calibration) -> Calibration:
    """Hold every eighth sample out. Raises QsunError where there are too few."""
    kept, held = (
        tuple(s for number, s in enumerate(calibration.samples, 1) if (number % HELD_OUT == 0) == wanted)
        for wanted in (False, True)
    )
    if not held:
        raise QsunError(
            f"polish holds one of {HELD_OUT} calibration samples out; {len(calibration.samples)} samples are too few: "
            "raise --samples"
        )
    return replace(calibration, samples=kept, held_out=held)


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
        sources: .txt files, .npy token ids [samples, length], what `source_rows` reads, or "builtin".
        tokenizer: of the model; may be None if every source is .npy.
        vocab_size: tokens must be below it.
        modules: number of the prefill module that reads each source's prompts; default: the base reads all of them.
    Raises:
        QsunError: an unreadable, empty or too short source, or a token outside the vocabulary.
    """
    names = list(sources)
    if not names:
        raise QsunError("calibration: no source is given")
    if samples < len(names):
        raise QsunError(f"--samples {samples} leaves some of {len(names)} calibration sources out; raise --samples")
    chosen: list[Sample] = []
    for number, name in enumerate(names):
        share = samples // len(names) + (number < samples % len(names))
        found = _read_source(name, tokenizer, share, seq_len, seed + number)
        tokens = [found.extremes] if isinstance(found, _Rows) else (s.tokens for s in found)
        check_vocabulary(tokens, vocab_size, tokenizer, f"calibration source {name}")
        drawn = _draw(found, share, seed + number, name)
        chosen += _read_by(modules[number], drawn, name) if modules else drawn
    text = list(chosen[0].tokens)
    preview = tokenizer.decode(text) if tokenizer is not None else " ".join(map(str, text))
    return Calibration(tuple(chosen), ", ".join(names), preview)


def builtin_text() -> Path:
    """Return the packaged general text: Python's language reference, prose with code (PSF licence)."""
    return Path(__file__).parent / "calibration.txt"


def _read_source(name: str, tokenizer: Any, share: int, seq_len: int, seed: int) -> "list[Sample] | _Rows":
    path = builtin_text() if name == BUILTIN else Path(name)
    if path.suffix.lower() == ".npy":
        return _read_npy(path, seq_len)
    if tokenizer is None:
        raise QsunError(
            f"calibration source {name} needs a tokenizer, and the model directory has none; give .npy token ids"
        )
    samples: list[Sample] = []
    if file_kind(str(path)) == ".txt":
        texts = [_read_text(path)]
    else:
        texts, samples = _read_rows(name, tokenizer, seq_len)
    if texts:
        drawn = _drawn_pieces(texts, share * seq_len, seed, name)
        samples += _windows(tokenizer, [token for text in drawn for token in encode(tokenizer, text)], seq_len, name)
    if not samples:
        raise QsunError(f"calibration source {name} is empty")
    return samples


def _draw(found: Sequence[Sample], count: int, seed: int, name: str) -> list[Sample]:
    packaged = name == BUILTIN or Path(name).is_relative_to(_PACKAGE)
    if len(found) < count and not packaged:
        log.warning("calibration source %s gives %d samples, fewer than the %d asked for", name, len(found), count)
    places = range(len(found))
    return [found[i] for i in (places if len(found) <= count else random.Random(seed).sample(places, count))]


def _read_by(module: int | None, samples: list[Sample], name: str) -> list[Sample]:
    if module is not None and not any(sample.prefill_tokens for sample in samples):
        raise QsunError(
            f"calibration source {name} has no prompts for its prefill module to read; give prompt/response or chat "
            "rows, or the base as its --calib-prefill"
        )
    return [replace(sample, module=module) for sample in samples]


def read_token_ids(path: Path, what: str) -> np.ndarray:
    """Return the integers of a .npy file, of any shape, read as they are used.

    Raises QsunError for anything else; what: the file's role.
    """
    check_no_pipe(path, what)
    if not path.is_file():
        raise QsunError(f"{what} file {path} does not exist")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise QsunError(f"{what} file {path} is not a valid .npy file: {error}") from None
    if not isinstance(ids, np.ndarray):
        ids.close()
        raise QsunError(f"{what} file {path} is an .npz archive; save one array as .npy")
    if ids.dtype.kind not in "iu":
        raise QsunError(f"{what} file {path} holds {ids.dtype}; save token ids, which are integers")
    return ids


class _Rows(Sequence[Sample]):
    """Samples of an array of token ids (rows, length), made when they are drawn: a Python int takes 32 bytes."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: Any) -> Any:
        return Sample(tuple(self.ids[place].tolist()))

    @property
    def extremes(self) -> tuple[int, int]:
        """The lowest and the highest token."""
        return int(self.ids.min()), int(self.ids.max())


def _read_npy(path: Path, seq_len: int) -> _Rows:
    ids = read_token_ids(path, "calibration")
    if ids.ndim != 2 or 0 in ids.shape:
        raise QsunError(
            f"calibration file {path} holds {ids.dtype} {list(ids.shape)}; it must be integers [samples, length]"
        )
    return _Rows(ids[:, :seq_len])


def _read_text(path: Path) -> str:
    text = file_text(path, "calibration")
    if not text.strip():
        raise QsunError(f"calibration file {path} is empty")
    return text


def _drawn_pieces(texts: list[str], tokens: int, seed: int, name: str) -> list[str]:
    """Return up to 4 MiB of text as it is; of more, pieces that the seed draws, with at least four times `tokens`."""
    characters = sum(map(len, texts))
    if characters <= _WHOLE_TEXT:
        return texts
    pieces = [text[i : i + _PIECE] for text in texts for i in range(0, len(text), _PIECE)]
    count = len(pieces) // max(1, characters // max(_WHOLE_TEXT, 16 * tokens))  # a token has about four characters
    drawn = [pieces[i] for i in sorted(random.Random(seed).sample(range(len(pieces)), count))]
    if count < len(pieces):
        log.warning(
            "calibration source %s: samples are drawn from %s of the %s characters of text that were read",
            name,
            f"{sum(map(len, drawn)):,}",
            f"{characters:,}",
        )
    return drawn


def _read_rows(name: str, tokenizer: Any, seq_len: int) -> tuple[list[str], list[Sample]]:
    """Return the texts of rows without prompts, and the samples of rows with one."""

    def convert(row: Mapping[str, Any], where: str) -> list[Sample | str]:
        if "messages" not in row and not {"prompt", "response"} <= row.keys():
            return [text_of(row, "text", where)]
        return [_row_sample(tokenizer, row, seq_len, where)]

    def weight(item: Sample | str) -> int:
        return max(_ROW, len(item)) if isinstance(item, str) else _ROW

    found = converted_rows(name, "calibration", convert, _READ_AT_MOST, weight)
    return [item for item in found if isinstance(item, str)], [item for item in found if isinstance(item, Sample)]


def _row_sample(tokenizer: Any, row: Mapping[str, Any], seq_len: int, where: str) -> Sample:
    """Cut a row's prompt and response to seq_len. In a chat, the last assistant turn is the response."""
    if "messages" not in row:
        example = pair_example(tokenizer, row, where)
    else:
        turn = assistant_turns(row, where)[-1]
        found = turn_example(tokenizer, row, turn, where)
        if found is None:  # the template rewrites earlier turns: count every position
            messages, tools = row["messages"][: turn + 1], tools_of(row, where)
            whole = chat_tokens(tokenizer, messages, tools=tools, add_generation_prompt=False, fixed_day=True)
            return Sample(tuple(whole[:-1][:seq_len]))
        example = found
    prefill = len(example.prompt) - 1  # the last prompt token is decode's first input
    tokens = (*example.prompt, *example.response[:-1])[:seq_len]  # the last response token is never an input
    if len(tokens) <= prefill:
        raise RowLeftOut(
            f"{where}: the prompt of {len(example.prompt)} tokens leaves no response within --seq-len {seq_len}"
        )
    return Sample(tokens, prefill)


def _windows(tokenizer: Any, tokens: list[int], seq_len: int, name: str) -> list[Sample]:
    """Cut running text; each window starts with the BOS that the tokenizer gives a text, if it does."""
    if len(tokens) < seq_len:
        raise QsunError(
            f"calibration source {name} is too short: {len(tokens)} tokens, and one sample is {seq_len}; "
            f"use --seq-len {max(2, len(tokens))} or more text"
        )
    first = [tokenizer.bos_token_id] if encode(tokenizer, "")[:1] == [tokenizer.bos_token_id] else []
    body, size = tokens[len(first) :], seq_len - len(first)
    return [Sample((*first, *body[i : i + size])) for i in range(0, len(body) - size + 1, size)]
