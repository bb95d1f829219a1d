"""What an engine compiles and captures before it serves, so that no request waits for it."""

from typing import Any

import torch

from qsun.adapters.adapter_module import AdapterModule
from qsun.adapters.grouped_products import GroupedProducts
from qsun.adapters.shared_prefill import AdaptedGatedMLP
from qsun.engine.decode.decode_step import on_device
from qsun.engine.engine import Engine
from qsun.kernels.launch_table import choose_launch, dequantize_above_m
from qsun.runtime.quant_linear import QuantLinear


def warm(engine: Engine) -> int:
    """Capture the decode steps of every batch, and compile the products of prefill modules and adapters, on a GPU.

    Takes the engine's whole KV budget from the device. On a CPU there is nothing to do.

    Returns:
        How many graphs there are.
    """
    if engine.device.type != "cuda":
        return 0
    most = min(engine.config.prefill_tokens, engine.config.pass_tokens)
    with on_device(engine.device):
        for model in {id(owner.module.model): owner.module.model for owner in engine.modules.values()}.values():
            _warm_products(model, most)
        _warm_products(engine.decode.model, most)  # which scores prompts
        adapters = [owner.module for owner in engine.modules.values() if isinstance(owner.module, AdapterModule)]
        for rank in {adapter.rank for adapter in adapters if adapter.rank}:
            GroupedProducts.warm(rank, engine.dtype, engine.device)
    batches = {id(batch): batch for batch in map(engine.batch_of, engine.modules)}
    return sum(batch.warm(engine.config.max_batch) for batch in batches.values())


@torch.no_grad()
def _warm_products(model: Any, most: int) -> None:
    """Run one layer of each shape once with each launch that up to `most` rows choose."""
    adapted = {mlp.gate_up for mlp in model.modules() if isinstance(mlp, AdaptedGatedMLP)}
    products: dict[Any, tuple[QuantLinear, Any]] = {}
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            shape = (layer.out_features, layer.in_features, layer.group_size, layer.bits)
            gated = layer.gated and layer not in adapted
            product = layer.silu_mul if gated else layer
            compiled = gated, layer.zeros is None, layer.bias is None, layer.dtype, layer.storage
            products[*shape, *compiled] = layer, product
    for layer, product in products.values():
        for rows in _rows_of_launches(layer, most):
            product(torch.zeros(rows, layer.in_features, dtype=layer.dtype, device=layer.scales.device))


def _rows_of_launches(layer: QuantLinear, most: int) -> list[int]:
    """Return a number of rows for each launch, and one that is dequantized for."""
    if layer.storage != "triton":
        return []
    from qsun.kernels.packed_triton import gpu_name

    gpu = gpu_name(layer.scales.device)
    limit = dequantize_above_m(gpu)
    shape = (layer.out_features, layer.in_features, layer.group_size)
    launches = {choose_launch(rows, *shape, gpu, layer.bits): rows for rows in range(1, min(most, limit) + 1)}
    return [*launches.values(), *([limit + 1] if most > limit else [])]
