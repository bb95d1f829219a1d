"""Hidden states carried through one block after another, and the inputs of each stage of a block.

A block is quantized stage by stage, and each stage's inputs depend on the stages before. Running the block from its
start for every stage would compute attention four times; instead the input of attention's last linear layer is kept
once it is known (and the MLP's, where memory allows), and the half it ends is replayed from there; attention's output
is kept as soon as a later stage asks for its input, because by then all of attention is quantized.

Decode positions attend to KV that a prefill module wrote. `Activations.attend_to` takes K and V at the prompts'
positions from another source: a prefill module (prefill_activations.py), or the full-precision base where no prefill
module is named. A decode module finds the same in its cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qsun.data.calibration import Sample
from qsun.model.architectures import ATTENTION_END, MLP_END, Architecture
from qsun.model.skeleton import Skeleton
from qsun.runtime.kv_cache import CACHE_ARGUMENT

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
        """Return (counted positions, features) of x: (B, T, features)."""
        return x.flatten(0, 1) if self.counted.all() else x[self.counted]


def make_batches(samples: tuple[Sample, ...], device: torch.device) -> list[Batch]:
    """Pad samples of one prefill module together, sorted by length; causal attention sees no padding."""
    batches: list[Batch] = []
    waiting: list[Sample] = []
    for sample in sorted(samples, key=lambda s: (-1 if s.module is None else s.module, len(s.tokens))):
        filled = (len(waiting) + 1) * len(sample.tokens) > TOKENS_PER_BATCH
        if waiting and (filled or sample.module != waiting[0].module):
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


class KvSource(Protocol):
    """Has K and V at the prompts of batches."""

    def kv(self, number: int) -> "RecordedKV":
        """Return those of a batch, in the current block."""
        ...


class Activations:
    """The hidden states of all batches, as one version of the model (quantized or full precision) computes them."""

    def __init__(self, skeleton: Skeleton, batches: list[Batch], hidden: list[Tensor]):
        self.skeleton, self.batches, self.hidden = skeleton, batches, hidden
        self.architecture: Architecture = skeleton.architecture
        self._kv: dict[int, RecordedKV] = {}
        self._sources: dict[int | None, KvSource] = {}

    def attend_to(self, source: KvSource, module: int | None = None) -> None:
        """Attend to the K and V of this source at the prompts that prefill module number `module` reads."""
        self._sources[module] = source

    def kv(self, number: int) -> "RecordedKV":
        """Return the K and V computed here, in the current block."""
        if number not in self._kv or self._kv[number].keys is None:
            self.stage_input(ATTENTION_END, number)
        return self._kv[number]

    def start_block(self, index: int, block: nn.Module) -> None:
        """Work on a block; its inputs are the current hidden states."""
        self.index, self.block = index, block
        self.clear()

    def clear(self) -> None:
        """Drop what is kept of the block's activations, because its weights changed."""
        self._attention_ends: dict[int, Tensor] = {}
        self._attention_outputs: dict[int, Tensor] = {}
        self._mlp_ends: dict[int, Tensor] = {}
        self._kv.clear()

    def stage_input(self, stage: int, batch: int) -> Tensor:
        """Return the (B, T, K) input of a stage's linear layers, given the block's weights so far."""
        kept = {ATTENTION_END: self._attention_ends, MLP_END: self._mlp_ends}.get(stage, {})
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
        if stage == ATTENTION_END or (stage == MLP_END and self._may_keep(seen[0])):
            kept[batch] = seen[0]
        return seen[0]

    def residual(self, stage: int, batch: int) -> Tensor:
        """Return the residual stream that the output of ATTENTION_END or MLP_END is added to."""
        if stage == ATTENTION_END:
            return self.hidden[batch]
        return self.hidden[batch] + self._attention_output(batch)

    def _attention_output(self, batch: int) -> Tensor:
        """Return what attention gives, (B, T, hidden); its last layer is quantized by the time of the first call."""
        if batch not in self._attention_outputs:
            project = self.block.get_submodule(self.architecture.stages[ATTENTION_END].layers[0])
            self._attention_outputs[batch] = project(self.stage_input(ATTENTION_END, batch))
        return self._attention_outputs[batch]

    def finish_block(self) -> None:
        """Carry the hidden states to the end of the block."""
        if any(batch.prefilled.any() for batch in self.batches):
            for number in range(len(self.batches)):  # the KV must be in place before attention is replayed
                self.stage_input(ATTENTION_END, number)
        for number in range(len(self.hidden)):
            output = self._run(number)
            self.hidden[number] = output[0] if isinstance(output, tuple) else output
        self.clear()

    def _may_keep(self, example: Tensor) -> bool:
        return len(self.batches) * example.numel() * example.element_size() <= _KEEP_MLP_BYTES

    def _run(self, number: int, until: int = MLP_END + 1) -> Any:
        arguments = dict(self.skeleton.block_arguments(self.index, self.hidden[number]))
        if self.batches[number].prefilled.any():
            arguments[CACHE_ARGUMENT] = self._cache(number)
        with self._replayed(number, until):
            return self.block(self.hidden[number], **arguments)

    def _cache(self, number: int) -> "RecordedKV":
        source = self._sources.get(self.batches[number].module)
        if source is None:
            return self._kv.setdefault(number, RecordedKV())
        return _SplicedKV(source.kv(number), self.batches[number].prefilled)

    @contextmanager
    def _replayed(self, number: int, until: int) -> Iterator[None]:
        """Start halves of the block at their last input, where that is known and comes before stage `until`."""
        attention, mlp = self.architecture.attention, self.architecture.mlp
        originals = {attention: getattr(self.block, attention), mlp: getattr(self.block, mlp)}
        if number in self._attention_ends and until > ATTENTION_END:
            setattr(self.block, attention, _Known(self._attention_output(number), None))
        if number in self._mlp_ends and until > MLP_END:
            last = self.block.get_submodule(self.architecture.stages[MLP_END].layers[0])
            setattr(self.block, mlp, _Known(last(self._mlp_ends[number])))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(self.block, name, original)


class _StageReached(Exception):
    """Raised once the wanted input is known: the rest of the block need not run."""


class _Known(nn.Module):
    """Half a block whose output is known already: one value, or the tuple of several."""

    def __init__(self, *outputs: Any):
        super().__init__()
        self.outputs = outputs

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


class RecordedKV:
    """A block's KV cache that records what attention computed. K, V: (B, heads, T, head_dim)."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _SplicedKV(RecordedKV):
    """A cache that prefill filled: its K and V at the prompt's positions, our own after them.

    Those of the prompt may be shorter than the batch, but reach the end of its longest prompt.
    """

    def __init__(self, prompt: RecordedKV, prefilled: Tensor):
        self.prompt, self.prefilled = prompt, prefilled[:, None, :, None]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.prompt.keys is not None and self.prompt.values is not None  # the source ran first
        return self._splice(self.prompt.keys, keys), self._splice(self.prompt.values, values)

    def _splice(self, theirs: Tensor, ours: Tensor) -> Tensor:
        length = theirs.shape[2]
        prompt = torch.where(self.prefilled[:, :, :length], theirs, ours[:, :, :length])
        return torch.cat([prompt, ours[:, :, length:]], 2)
