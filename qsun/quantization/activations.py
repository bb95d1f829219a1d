"""Hidden states carried through one block after another, and the inputs of each stage of a block.

A block is quantized stage by stage, and each stage's inputs depend on the stages before. Running the block from its
start for every stage would compute attention four times; instead the input of attention's last linear layer is kept
once it is known (and the MLP's, where memory allows), and the half it ends is replayed from there.

Decode positions attend to KV that a prefill module wrote. `Stream.share_kv` gives a stream, at the prompts' positions,
the K and V of another: of a prefill module's (prefill_kv.py), or of the full-precision base's where no prefill module
is named. That is what a decode module finds in its cache.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qsun.data.calibration import Sample
from qsun.model.architectures import Architecture
from qsun.model.skeleton import Skeleton
from qsun.runtime.decode_cache import CACHE_ARGUMENT

TOKENS_PER_BATCH = 4096
_KEEP_MLP_BYTES = 1 << 30  # of MLP inputs, the widest activations, kept for the block's output


@dataclass(frozen=True)
class Batch:
    """Right-padded samples, (B, T) each: tokens; counted, positions a decode module sees; prefilled, those before.

    module is the number of the prefill module that reads all their prompts; None: the base itself.
    """

    tokens: Tensor
    counted: Tensor
    prefilled: Tensor
    module: int | None = None

    @property
    def prompts(self) -> Tensor:
        """(B, longest prompt) tokens, without the last of each prompt; rows with shorter prompts run on."""
        return self.tokens[:, : int(self.prefilled.sum(1).max())]

    def rows(self, x: Tensor) -> Tensor:
        """(counted positions, features) of x: (B, T, features)."""
        return x.flatten(0, 1) if self.counted.all() else x[self.counted]


def make_batches(samples: tuple[Sample, ...], device: torch.device) -> list[Batch]:
    """Samples of one prefill module, sorted by length and padded together; causal attention sees no padding."""
    batches: list[Batch] = []
    waiting: list[Sample] = []
    for sample in sorted(samples, key=lambda s: (-1 if s.module is None else s.module, len(s.tokens))):
        full = (len(waiting) + 1) * len(sample.tokens) > TOKENS_PER_BATCH
        if waiting and (full or sample.module != waiting[0].module):
            batches.append(_pad(waiting, device))
            waiting = []
        waiting.append(sample)
    return [*batches, _pad(waiting, device)]


def _pad(samples: list[Sample], device: torch.device) -> Batch:
    length = max(len(s.tokens) for s in samples)
    tokens = torch.tensor([[*s.tokens, *[0] * (length - len(s.tokens))] for s in samples], device=device)
    position = torch.arange(length, device=device)
    ends = torch.tensor([[len(s.tokens)] for s in samples], device=device)
    starts = torch.tensor([[s.prefill_tokens] for s in samples], device=device)
    return Batch(tokens, (position >= starts) & (position < ends), position < starts, samples[0].module)


class KvWriter(Protocol):
    """What left K and V at the prompts of batches."""

    def written(self, number: int) -> "KeptKV":
        """Of a batch, in the block at hand."""
        ...


class Stream:
    """The hidden states of all batches, as one version of the model (quantized or full precision) has them."""

    def __init__(self, skeleton: Skeleton, batches: list[Batch], hidden: list[Tensor]):
        self.skeleton, self.batches, self.hidden = skeleton, batches, hidden
        self.architecture: Architecture = skeleton.architecture
        self._kv: dict[int, KeptKV] = {}
        self._writers: dict[int | None, KvWriter] = {}

    def share_kv(self, writer: KvWriter, module: int | None = None) -> None:
        """Attend, at the prompts that prefill module number `module` reads, to the K and V of this writer."""
        self._writers[module] = writer

    def written(self, number: int) -> "KeptKV":
        """The K and V that this stream computes in the block at hand."""
        if number not in self._kv or self._kv[number].keys is None:
            self.stage_input(1, number)
        return self._kv[number]

    def enter(self, index: int, block: nn.Module) -> None:
        """Work on a block; its inputs are the current hidden states."""
        self.index, self.block = index, block
        self.forget()

    def forget(self) -> None:
        """The block's weights changed: what was kept of its activations no longer holds."""
        self._attention_ends: dict[int, Tensor] = {}
        self._mlp_ends: dict[int, Tensor] = {}
        self._kv.clear()

    def stage_input(self, stage: int, batch: int) -> Tensor:
        """(B, T, K) input of a stage's linear layers, given the block's weights so far."""
        kept = {1: self._attention_ends, 3: self._mlp_ends}.get(stage, {})
        if batch in kept:
            return kept[batch]
        module = self.block.get_submodule(self.architecture.stages[stage].layers[0])
        seen: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])
            raise _StageReached

        handle = module.register_forward_pre_hook(stop)
        try:
            self._run(batch, until=stage)
        except _StageReached:
            pass
        finally:
            handle.remove()
        if stage == 1 or (stage == 3 and self._may_keep(seen[0])):
            kept[batch] = seen[0]
        return seen[0]

    def residual(self, stage: int, batch: int) -> Tensor:
        """The residual stream that the output of stage 1 (attention) or 3 (MLP) is added to."""
        if stage == 1:
            return self.hidden[batch]
        project = self.block.get_submodule(self.architecture.stages[1].layers[0])
        return self.hidden[batch] + project(self.stage_input(1, batch))

    def leave(self) -> None:
        """Carry the hidden states to the end of the block."""
        if any(batch.prefilled.any() for batch in self.batches):
            for number in range(len(self.batches)):  # the KV must be in place before attention is replayed
                self.stage_input(1, number)
        for number in range(len(self.hidden)):
            output = self._run(number)
            self.hidden[number] = output[0] if isinstance(output, tuple) else output
        self.forget()

    def _may_keep(self, example: Tensor) -> bool:
        return len(self.batches) * example.numel() * example.element_size() <= _KEEP_MLP_BYTES

    def _run(self, number: int, until: int = 4) -> Any:
        arguments = dict(self.skeleton.block_arguments(self.index, self.hidden[number]))
        if self.batches[number].prefilled.any():
            arguments[CACHE_ARGUMENT] = self._cache(number)
        with self._replayed(number, until):
            return self.block(self.hidden[number], **arguments)

    def _cache(self, number: int) -> "KeptKV":
        writer = self._writers.get(self.batches[number].module)
        if writer is None:
            return self._kv.setdefault(number, KeptKV())
        return _SplicedKV(writer.written(number), self.batches[number].prefilled)

    @contextmanager
    def _replayed(self, number: int, until: int) -> Iterator[None]:
        """Within, halves of the block that end before stage `until`, and whose last input is known, start there."""
        attention, mlp = self.architecture.attention, self.architecture.mlp
        originals = {attention: getattr(self.block, attention), mlp: getattr(self.block, mlp)}
        for name, ends, stage in ((attention, self._attention_ends, 1), (mlp, self._mlp_ends, 3)):
            if number in ends and stage < until:
                last = self.block.get_submodule(self.architecture.stages[stage].layers[0])
                setattr(self.block, name, _Replay(last, ends[number], returns_pair=stage == 1))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(self.block, name, original)


class _StageReached(Exception):
    """The wanted input was seen; the rest of the block need not run."""


class _Replay(nn.Module):
    """Half a block, from the known input of its last linear layer on."""

    def __init__(self, last: nn.Module, known: Tensor, returns_pair: bool):
        super().__init__()
        self.last, self.known, self.returns_pair = last, known, returns_pair

    def forward(self, *_: Any, **__: Any) -> Any:
        output = self.last(self.known)
        return (output, None) if self.returns_pair else output


class KeptKV:
    """Passed to a block as its KV cache: keeps what attention computed. K, V: (B, heads, T, head_dim)."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _SplicedKV(KeptKV):
    """As a cache that prefill filled: its K and V at the prompt's positions, our own after them.

    What was written may be shorter than the batch, but reaches the end of its longest prompt.
    """

    def __init__(self, written: KeptKV, prefilled: Tensor):
        self.written, self.prefilled = written, prefilled[:, None, :, None]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.written.keys is not None and self.written.values is not None  # the writer ran first
        return self._splice(self.written.keys, keys), self._splice(self.written.values, values)

    def _splice(self, theirs: Tensor, ours: Tensor) -> Tensor:
        length = theirs.shape[2]
        prompt = torch.where(self.prefilled[:, :, :length], theirs, ours[:, :, :length])
        return torch.cat([prompt, ours[:, :, length:]], 2)


def tokens_in(batches: list[Batch]) -> int:
    """Positions computed, padding included."""
    return sum(math.prod(batch.tokens.shape) for batch in batches)
