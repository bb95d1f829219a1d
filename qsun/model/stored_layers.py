"""The layers that a directory stores as integers: which they are, their settings, and reading them back."""

import torch
from torch import nn

from qsun.config import GROUP_SIZES, LayerSpec
from qsun.errors import QsunError
from qsun.model.architectures import block_prefix
from qsun.model.checkpoint import Checkpoint
from qsun.model.formats import SUFFIXES, unpack_layer
from qsun.model.quantized import Quantized
from qsun.model.skeleton import Skeleton, linear_of


def read_quantized_layer(
    checkpoint: Checkpoint, name: str, fmt: str, in_features: int, device: torch.device | None = None
) -> tuple[Quantized, LayerSpec]:
    """Read one layer's integers and its settings, unpacked on the device.

    fmt: as quantization_config.stored_format returns it.
    """
    spec = layer_spec(checkpoint, name, fmt, in_features)
    present = _present(checkpoint, name, fmt)
    loaded = checkpoint.load(f"{name}.{suffix}" for suffix in present)
    return unpack_layer({suffix: loaded[f"{name}.{suffix}"].to(device) for suffix in present}, spec, fmt), spec


def quantized_layer_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the layers that are stored as integers."""
    ends = (".qweight", ".weight_packed")
    return sorted(name.rpartition(".")[0] for name in checkpoint.names() if name.endswith(ends))


def layer_spec(checkpoint: Checkpoint, name: str, fmt: str, in_features: int) -> LayerSpec:
    """Return a layer's settings from the shapes of its tensors, whatever the configuration of another tool says.

    GPTQ and AWQ always store zero points, so sym is False for them whatever the zeros are.
    """
    if fmt == "compressed-tensors":
        words = checkpoint.shape(f"{name}.weight_packed")[1]
        groups = checkpoint.shape(f"{name}.weight_scale")[1]
        bits, sym = words * 32 // in_features, f"{name}.weight_zero_point" not in checkpoint
    else:
        groups = checkpoint.shape(f"{name}.scales")[0]
        bits, sym = checkpoint.shape(f"{name}.qweight")[0] * 32 // in_features, False
        bits = 4 if fmt == "awq" else bits
    if groups == 0 or in_features % groups or (groups > 1 and in_features // groups not in GROUP_SIZES):
        raise QsunError(
            f"{name}: {groups} groups of {in_features} inputs are not supported; sizes are 32, 64, 128 or all"
        )
    size = in_features // groups
    return LayerSpec(bits, size if size in GROUP_SIZES else -1, sym)


def _present(checkpoint: Checkpoint, name: str, fmt: str) -> list[str]:
    return [suffix for suffix in SUFFIXES[fmt.removesuffix("_v2")] if f"{name}.{suffix}" in checkpoint]


def bits_per_weight(checkpoint: Checkpoint, shapes: dict[str, tuple[int, int]]) -> float:
    """Return the bits on disk for each weight of these linear layers, without biases."""
    stored = sum(
        checkpoint.size_bytes(n for n in checkpoint.names(name + ".") if not n.endswith(".bias")) for name in shapes
    )
    return 8 * stored / sum(N * K for N, K in shapes.values())


def load_quantized_block(skeleton: Skeleton, checkpoint: Checkpoint, index: int, fmt: str) -> nn.Module:
    """Return a block of a quantized checkpoint with dequantized weights, in the computation's dtype."""
    prefix = block_prefix(index)
    tensors = {}
    for name, _ in skeleton.layers[index].named_parameters():
        layer = (prefix + name).removesuffix(".weight")
        if prefix + name in checkpoint:
            tensors[name] = checkpoint.load([prefix + name])[prefix + name]
        else:
            features = linear_of(skeleton.layers[index], name.removesuffix(".weight")).in_features
            tensors[name] = read_quantized_layer(checkpoint, layer, fmt, features)[0].dequantize()
    return skeleton.fill(skeleton.layers[index], tensors, prefix)
