"""Divergence of a quantized model's next-token distribution from the full-precision one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsun.data.calibration import read_calibration, read_token_ids
from qsun.data.examples import TokenExample, check_vocabulary
from qsun.errors import QsunError
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.skeleton import read_model_config
from qsun.runtime.logits import log_probabilities, position_pieces
from qsun.runtime.seam import IGNORED, SeamBatch, collate, decode_hidden, prefill_batch

_TOKENS_AT_ONCE = 4096  # of a forward pass


@dataclass(frozen=True)
class Divergence:
    """A decode module against its full-precision one, over all compared positions.

    Attributes:
        positions: how many. mean_kl, p99_kl: KL(full precision || ours), nats, and its 99th percentile.
        top1: share of positions at which both have the same most likely token.
        loss, reference_loss: mean negative log-likelihood of the following tokens, nats; its exp is the perplexity.
    """

    positions: int
    mean_kl: float
    p99_kl: float
    top1: float
    loss: float
    reference_loss: float


@torch.no_grad()
def mean_divergence(model: nn.Module, reference: nn.Module, windows: Tensor) -> float:
    """Return the mean KL(reference || model) over all positions of token windows (B, T), in nats."""
    total = 0.0
    for ours, theirs, _ in _on_text(model, reference, windows):
        total += float(_kl(ours, theirs).double().sum())
    return total / windows.numel()


@torch.no_grad()
def text_divergence(model: nn.Module, reference: nn.Module, windows: Tensor) -> Divergence:
    """Compare on running text: every window (B, T) is read from its start, and its last token predicts nothing."""
    sums = _Sums()
    for ours, theirs, following in _on_text(model, reference, windows):
        known = following != IGNORED
        sums.add(ours[known], theirs[known], following[known])
    return sums.result()


@torch.no_grad()
def response_divergence(
    prefill: Any, decode: Any, reference: Any, examples: Sequence[TokenExample], batch_size: int = 32
) -> Divergence:
    """Compare at decode positions: both decoders read the responses behind the KV of the same prefill module."""
    sums = _Sums()
    for batch in _batches(examples, batch_size, decode.device):
        wanted = batch.labels != IGNORED
        hidden = [decode_hidden(each, batch, prefill_batch(prefill, batch))[wanted] for each in (decode, reference)]
        for ours, theirs, following in _in_pieces((decode, reference), hidden, batch.labels[wanted]):
            sums.add(ours, theirs, following)
    return sums.result()


def _on_text(model: Any, reference: Any, windows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield log-probabilities (P, vocabulary) of both and the following tokens (P,); IGNORED after a window's last."""
    for part in windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1])):
        following = torch.cat([part[:, 1:], torch.full_like(part[:, :1], IGNORED)], 1).flatten()
        hidden = [each.model(input_ids=part).last_hidden_state.flatten(0, 1) for each in (model, reference)]
        yield from _in_pieces((model, reference), hidden, following)


def _in_pieces(
    models: tuple[Any, Any], hidden: Sequence[Tensor], following: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for piece in position_pieces(len(following), models[0].config.vocab_size):
        ours, theirs = (log_probabilities(each, h[piece]) for each, h in zip(models, hidden, strict=True))
        yield ours, theirs, following[piece]


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return KL(theirs || ours) of each position, (P,), from log-probabilities (P, vocabulary)."""
    return (theirs.exp() * (theirs - ours)).sum(-1)


class _Sums:
    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._agree = self._count = 0
        self._loss = self._reference_loss = 0.0

    def add(self, ours: Tensor, theirs: Tensor, following: Tensor) -> None:
        """Add positions: log-probabilities (P, vocabulary) of both, and the tokens (P,) that follow."""
        self._kl.append(_kl(ours, theirs).cpu())
        self._agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self._count += len(following)
        self._loss -= float(ours.gather(-1, following[:, None]).double().sum())
        self._reference_loss -= float(theirs.gather(-1, following[:, None]).double().sum())

    def result(self) -> Divergence:
        kl = torch.cat(self._kl).double()
        p99 = float(kl.kthvalue(max(1, math.ceil(0.99 * len(kl)))).values)
        losses = self._loss / self._count, self._reference_loss / self._count
        return Divergence(self._count, float(kl.mean()), p99, self._agree / self._count, *losses)


def _batches(examples: Sequence[TokenExample], size: int, device: torch.device) -> Iterator[SeamBatch]:
    """Yield batches of responses of similar length, which need little padding."""
    by_length = sorted(examples, key=lambda e: (len(e.response), len(e.prompt)))
    first = 0
    while first < len(by_length):
        part = by_length[first : first + size]
        longest = max(max(len(e.prompt), len(e.response)) for e in part)  # each of the two has a pass of its own
        part = part[: max(1, _TOKENS_AT_ONCE // longest)]
        yield collate(part).to(device)
        first += len(part)


def read_windows(valid: Path, model: str, count: int, length: int) -> torch.Tensor:
    """Read (count, length) token ids: consecutive windows of a .npy of ids, or of any calibration source.

    Raises:
        QsunError: fewer or shorter windows than asked for, windows that the model has no positions for, or a token
            outside its vocabulary.
    """
    if count < 1 or length < 2:
        raise QsunError(f"windows {count}x{length} are out of range; use 1 or more, of 2 or more tokens")
    directory = find_model(model)
    config = read_model_config(directory)
    if length > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise QsunError(
            f"windows of {length} tokens go over the {most} positions of {model}; use {most} or fewer tokens"
        )
    if valid.suffix == ".npy":
        ids = torch.from_numpy(read_token_ids(valid, "text").astype(np.int64)).flatten()
        if len(ids) < count * length:
            raise QsunError(f"{valid} has {len(ids)} tokens; {count} windows of {length} need {count * length}")
        windows = ids[: count * length].view(count, length)
        check_vocabulary(windows.tolist(), config.vocab_size, None, str(valid))
        return windows
    found = read_calibration([str(valid)], load_tokenizer(directory), config.vocab_size, count, length, seed=1)
    shortest = min(len(sample.tokens) for sample in found.samples)
    if shortest < length:
        raise QsunError(
            f"{valid} has a row of {shortest} tokens, and a window is {length}; give running text, or shorter windows"
        )
    if len(found.samples) < count:
        given = len(found.samples)
        raise QsunError(
            f"{valid} gives {given} windows of {length} tokens, not {count}; give more text, or use {given}"
        )
    return torch.tensor([sample.tokens for sample in found.samples])
