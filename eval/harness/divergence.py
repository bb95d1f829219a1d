"""Divergence of a quantized model's next-token distribution from the full-precision one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsun.data.calibration import read_calibration
from qsun.data.examples import TokenExample
from qsun.errors import QsunError
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.skeleton import read_model_config
from qsun.runtime.seam import IGNORED, SeamBatch, seam_logits
from qsun.tuning.examples import collate

_WINDOWS_AT_ONCE = 16
_TOKENS_AT_ONCE = 4096  # log-probabilities of two models over a large vocabulary are gigabytes


@torch.no_grad()
def log_probabilities(model: nn.Module, windows: Tensor) -> Tensor:
    """(B, T, vocabulary) float32 log-probabilities for token windows (B, T)."""
    parts = [model(input_ids=part).logits.float().log_softmax(-1) for part in windows.split(_WINDOWS_AT_ONCE)]
    return torch.cat(parts)


@torch.no_grad()
def mean_divergence(model: nn.Module, reference: Tensor, windows: Tensor) -> float:
    """Mean KL(reference || model) over all positions, in nats; reference: log-probabilities of the same windows."""
    total = 0.0
    for start in range(0, len(windows), _WINDOWS_AT_ONCE):
        ours = log_probabilities(model, windows[start : start + _WINDOWS_AT_ONCE])
        theirs = reference[start : start + _WINDOWS_AT_ONCE]
        total += float((theirs.exp() * (theirs - ours)).sum())
    return total / windows.numel()


def perplexity(log_probs: Tensor, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first."""
    taken = log_probs[:, :-1].gather(-1, windows[:, 1:, None])
    return math.exp(-float(taken.double().mean()))


@dataclass(frozen=True)
class Divergence:
    """A decode module against its full-precision one, over all positions that were compared.

    Attributes:
        positions: how many. mean_kl, p99_kl: KL(full precision || ours), nats, and its 99th percentile.
        top1: share of positions at which both find the same token likeliest.
        loss, reference_loss: mean negative log-likelihood of the tokens that follow, nats; exp of it is the perplexity.
    """

    positions: int
    mean_kl: float
    p99_kl: float
    top1: float
    loss: float
    reference_loss: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def text_divergence(model: nn.Module, reference: nn.Module, windows: Tensor) -> Divergence:
    """On running text: every window (B, T) is read from its start; its first token is predicted by nothing."""
    sums = _Positions()
    for part in windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1])):
        ours, theirs = (log_probabilities(each, part)[:, :-1].flatten(0, 1) for each in (model, reference))
        sums.add(ours, theirs, part[:, 1:].flatten())
    return sums.result()


@torch.no_grad()
def response_divergence(
    prefill: nn.Module, decode: nn.Module, reference: nn.Module, examples: Sequence[TokenExample], batch_size: int = 32
) -> Divergence:
    """At decode positions: both decoders read the responses behind the KV that the same prefill module wrote."""
    sums = _Positions()
    for batch in _batches(examples, batch_size, _device_of(decode)):
        wanted = batch.labels != IGNORED
        ours, theirs = (_log_softmax(seam_logits(prefill, each, batch)[wanted]) for each in (decode, reference))
        sums.add(ours, theirs, batch.labels[wanted])
    return sums.result()


@torch.no_grad()
def mean_response_loss(
    prefill: nn.Module, decode: nn.Module, examples: Sequence[TokenExample], batch_size: int = 32
) -> float:
    """Mean negative log-likelihood of a response token, nats, through the seam."""
    total, count = 0.0, 0
    for batch in _batches(examples, batch_size, _device_of(decode)):
        wanted = batch.labels != IGNORED
        found = _log_softmax(seam_logits(prefill, decode, batch)[wanted])
        total -= float(found.gather(-1, batch.labels[wanted][:, None]).double().sum())
        count += int(wanted.sum())
    return total / count


class _Positions:
    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._agree = self._count = 0
        self._loss = self._reference_loss = 0.0

    def add(self, ours: Tensor, theirs: Tensor, following: Tensor) -> None:
        """Log-probabilities (P, vocabulary) of both, and the tokens (P,) that follow."""
        self._kl.append((theirs.exp() * (theirs - ours)).sum(-1).cpu())
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
    """Examples of like responses together: less padding where logits are computed."""
    by_length = sorted(examples, key=lambda e: (len(e.response), len(e.prompt)))
    first = 0
    while first < len(by_length):
        longest = len(by_length[min(first + size, len(by_length)) - 1].response)
        count = max(1, min(size, _TOKENS_AT_ONCE // longest))
        yield collate(by_length[first : first + count]).to(device)
        first += count


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _device_of(model: Any) -> torch.device:
    return model.model.embed_tokens.weight.device


def read_windows(valid: Path, model: str, count: int, length: int) -> torch.Tensor:
    """(count, length) token ids: consecutive windows of a .npy of ids, or any calibration source in its order."""
    if valid.suffix == ".npy":
        ids = torch.from_numpy(np.load(valid, allow_pickle=False).astype(np.int64)).flatten()
        if len(ids) < count * length:
            raise QsunError(f"{valid} has {len(ids)} tokens; {count} windows of {length} need {count * length}")
        return ids[: count * length].view(count, length)
    directory = find_model(model)
    vocabulary = read_model_config(directory).vocab_size
    found = read_calibration([str(valid)], load_tokenizer(directory), vocabulary, count, length, seed=1)
    if len(found.samples) < count:
        raise QsunError(
            f"{valid} gives {len(found.samples)} windows of {length} tokens; use --windows {len(found.samples)}"
        )
    return torch.tensor([sample.tokens for sample in found.samples])
