"""One set of prefill weights for many LoRA adapters, each of which acts on the rows of its own prompts.

    y = W x + scale * B A x, with B and A of the row's adapter

W is computed for all rows at once, whichever adapters they have. So are the low-rank products on a GPU, in a grouped
kernel, and on a CPU where adapters have one shape and few rows each; otherwise they go adapter by adapter, over rows
that lie side by side. A decode module that shares its weights is not changed: its layers are held by a second tree of
modules, so that nothing of an adapter is in a decode step.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qsun.adapters.adapter_weights import AdapterWeights, Run
from qsun.adapters.grouped_products import GroupedProducts
from qsun.model.architectures import Architecture, architecture_of, block_prefix
from qsun.model.skeleton import empty_model
from qsun.runtime.fused_block import FusedBlock
from qsun.runtime.fused_projections import GatedMLP, MergedPart

_ROWS_EACH = 3  # rows of an adapter, on average, up to which one product for all adapters is faster


Pair = tuple[Tensor, Tensor]


class RowAdapters:
    """The adapters of the pass that is being computed.

    Args:
        layers: names of all layers that an adapter may have.
    """

    def __init__(self, layers: Sequence[str]):
        self._grouped = GroupedProducts(layers)
        self.use([], torch.device("cpu"))

    def use(self, runs: Sequence[Run], device: torch.device) -> None:
        """Take the adapters of the next pass; rows without one are in no run."""
        self._runs, self._in_kernel = runs, GroupedProducts.serves(runs, device)
        self._grouped.begin(runs if self._in_kernel else ())

    def add(self, y: Tensor, x: Tensor, layer: str) -> None:
        """Add the low-rank products of x (B, T, in) to a layer's output y (B, T, out), in place."""
        if self._in_kernel:
            self._grouped.add(y, x, layer)
            return
        runs = [(rows, adapter.layers[layer]) for rows, adapter in self._runs if layer in adapter.layers]
        if _in_one_product(runs):
            _add_batched(y, x, runs)
            return
        for rows, (a, b) in runs:
            y[rows].view(-1, y.shape[-1]).addmm_(x[rows].flatten(0, 1) @ a.t(), b)


def _in_one_product(runs: Sequence[tuple[slice, Pair]]) -> bool:
    """Whether several adapters of one rank have adjoining rows, and so few each that a copy for each row is cheap."""
    if len(runs) < 2 or len({a.shape for _, (a, _) in runs}) > 1:
        return False
    adjoining = all(before.stop == after.start for (before, _), (after, _) in pairwise(runs))
    return adjoining and runs[-1][0].stop - runs[0][0].start <= _ROWS_EACH * len(runs)


def _add_batched(y: Tensor, x: Tensor, runs: Sequence[tuple[slice, Pair]]) -> None:
    """Add the products of all runs at once: a matrix for each row. On a CPU in bfloat16 up to 6 times as fast."""
    pairs = [pair for rows, pair in runs for _ in range(rows.stop - rows.start)]
    a, b = (torch.stack([pair[part] for pair in pairs]) for part in range(2))
    rows = slice(runs[0][0].start, runs[-1][0].stop)
    y[rows].baddbmm_(x[rows] @ a.transpose(1, 2), b)


class AdaptedLinear(nn.Module):
    """A linear layer, plus what the adapter of each row adds to it."""

    def __init__(self, layer: nn.Module, name: str, adapters: RowAdapters):
        super().__init__()
        self.layer, self.name, self.adapters = layer, name, adapters

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.adapters.add(y, x, self.name)
        return y


class AdaptedGatedMLP(nn.Module):
    """A GatedMLP whose gate and up projections, in one product, have adapters of their own."""

    def __init__(self, mlp: GatedMLP, names: Sequence[str], adapters: RowAdapters):
        super().__init__()
        self.gate_up, self.down_proj = mlp.gate_up, mlp.down_proj
        self.names, self.adapters = names, adapters

    def forward(self, x: Tensor) -> Any:
        gate, up = halves = self.gate_up(x).chunk(2, -1)
        for half, name in zip(halves, self.names, strict=True):
            self.adapters.add(half, x, name)
        return self.down_proj(nn.functional.silu(gate) * up)


class SharedPrefill:
    """Prefill weights that many adapters share.

    Args:
        model: transformers' causal LM, whose weights are shared and which is left as it is.

    Attributes:
        model: the same with a place for adapters at each linear layer of its blocks.
        skeleton: the model on the meta device, with plain linear layers.
    """

    def __init__(self, model: Any):
        self.model: Any = _same_weights(model)
        self.skeleton: Any = empty_model(model.config)
        architecture, blocks = architecture_of(model.config.model_type), self.model.model.layers
        names = [block_prefix(index) + name for index in range(len(blocks)) for name in architecture.linear_names()]
        self._adapters = RowAdapters(names)
        for index, block in enumerate(blocks):
            _adapt_block(block, block_prefix(index), architecture, self._adapters)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    @contextmanager
    def rows(self, adapters: Sequence[AdapterWeights | None]) -> Iterator[None]:
        """Within, passes of the model have so many rows, each with its adapter or none. Equal ones lie side by side."""
        runs, start = [], 0
        for adapter, group in groupby(adapters):
            end = start + len(list(group))
            if adapter is not None:
                runs.append((slice(start, end), adapter))
            start = end
        self._adapters.use(runs, self.device)
        try:
            yield
        finally:
            self._adapters.use([], self.device)


def _same_weights(model: Any) -> Any:
    """Return a second tree of modules over the same leaves, which hold all weights."""
    memo: dict[int, Any] = {id(model.config): model.config}
    for module in model.modules():
        if isinstance(module, MergedPart) or not any(True for _ in module.children()):
            memo[id(module)] = module
    twin = copy.deepcopy(model, memo)
    for index, block in enumerate(twin.model.layers):
        if isinstance(block, FusedBlock):  # for decode steps only
            twin.model.layers[index] = block.block
    return twin


def _adapt_block(block: nn.Module, prefix: str, architecture: Architecture, adapters: RowAdapters) -> None:
    mlp = block.get_submodule(architecture.mlp)
    gated = architecture.stages[2].layers if isinstance(mlp, GatedMLP) else ()
    if isinstance(mlp, GatedMLP):
        block.set_submodule(architecture.mlp, AdaptedGatedMLP(mlp, [prefix + name for name in gated], adapters))
    for name in architecture.linear_names():
        if name not in gated:
            block.set_submodule(name, AdaptedLinear(block.get_submodule(name), prefix + name, adapters))
