"""The layers that a directory stores as integers: which they are, their settings, and reading them back."""

import logging
from typing import Any, get_args

import torch
from torch import nn

from qsun.config import GROUP_SIZES, Bits, LayerSpec
from qsun.errors import QsunError
from qsun.model.architectures import BLOCKS, block_prefix
from qsun.model.checkpoint import Checkpoint
from qsun.model.formats import SUFFIXES, stored_shapes, unpack_layer
from qsun.model.quantized import Quantized
from qsun.model.skeleton import HEAD, Skeleton, linear_of

log = logging.getLogger(__name__)
_WORDS = ("qweight", "qzeros", "weight_packed", "weight_zero_point")
_OPTIONAL = ("g_idx", "weight_g_idx", "weight_zero_point")
# Of activations and the KV cache, which are not quantized here.
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


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


def layer_spec(
    checkpoint: Checkpoint, name: str, fmt: str, in_features: int, out_features: int | None = None
) -> LayerSpec:
    """Return a layer's settings from the shapes of its tensors, whatever the configuration of another tool says.

    GPTQ and AWQ always store zero points, so sym is False for them whatever the zeros are.

    Args:
        out_features: compared where it is given.
    Raises:
        QsunError: a tensor is missing, or of another shape or type than the format has, as in older versions of it.
    """
    packed, scale = ("weight_packed", "weight_scale") if fmt == "compressed-tensors" else ("qweight", "scales")
    for suffix in SUFFIXES[fmt.removesuffix("_v2")]:
        if suffix not in _OPTIONAL and f"{name}.{suffix}" not in checkpoint:
            raise QsunError(f"{checkpoint.directory} has no tensor {name}.{suffix}; download the model again")
    shape = checkpoint.shape(f"{name}.{scale}")
    if len(shape) != 2:
        raise QsunError(f"{name}.{scale} is {list(shape)}; only scales for each group or output are supported")
    groups, N = shape if scale == "scales" else shape[::-1]
    if out_features not in (None, N):
        raise QsunError(f"{name} has {N} outputs, but config.json says {out_features}; is it that of another model?")
    bits = 8 * checkpoint.size_bytes([f"{name}.{packed}"]) // max(1, N * in_features)
    if bits not in get_args(Bits) or (fmt == "awq" and bits != 4):
        raise QsunError(f"{name}: {bits} bits are not supported in format {fmt}; use 2, 3, 4 or 8, in awq 4")
    _check_shapes(checkpoint, name, fmt, bits, (N, in_features), groups)
    sym = fmt == "compressed-tensors" and f"{name}.weight_zero_point" not in checkpoint
    if groups == 0 or in_features % groups or (groups > 1 and in_features // groups not in GROUP_SIZES):
        raise QsunError(
            f"{name}: {groups} groups of {in_features} inputs are not supported; sizes are 32, 64, 128 or all"
        )
    size = in_features // groups
    return LayerSpec(bits, size if size in GROUP_SIZES else -1, sym)


def _check_shapes(checkpoint: Checkpoint, name: str, fmt: str, bits: int, shape: tuple[int, int], groups: int) -> None:
    wanted = stored_shapes(fmt, bits, shape, groups)
    for suffix in _present(checkpoint, name, fmt):
        found, dtype = checkpoint.shape(f"{name}.{suffix}"), checkpoint.headers[f"{name}.{suffix}"]["dtype"]
        words = "I32" if suffix in _WORDS else dtype
        if (found, dtype) != (wanted[suffix], words):
            raise QsunError(
                f"{name}.{suffix} is {dtype} {list(found)}, but {bits} bits for {shape[0]} x {shape[1]} weights are "
                f"{words} {list(wanted[suffix])}; quantize the model again, with qsun or a current version of its tool"
            )


def check_weights(
    checkpoint: Checkpoint, model: Any, fmt: str = "", prefixes: tuple[str, ...] = ("",)
) -> tuple[list[str], list[str]]:
    """Compare a directory with its config.json, and warn of tensors outside of the blocks that the model does not use.

    Args:
        model: the causal LM that config.json describes, whose layers are all plain; only shapes are read.
        fmt: of layers stored as integers, as quantization_config.stored_format returns it; empty for full precision.
        prefixes: compare only names that begin with one of these.
    Returns:
        The layers stored as integers, and the names of the model's tensors besides theirs.
    Raises:
        QsunError: a tensor is missing or of another shape, or blocks hold one that the model does not have.
    """
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if name.startswith(prefixes)}
    if model.config.tie_word_embeddings and HEAD not in checkpoint:
        wanted.pop(HEAD, None)
    layers = [layer for layer in quantized_layer_names(checkpoint) if fmt and f"{layer}.weight" in wanted]
    theirs = set()
    for layer in layers:
        N, K = wanted.pop(f"{layer}.weight")
        layer_spec(checkpoint, layer, fmt, K, N)  # which raises
        theirs |= {f"{layer}.{suffix}" for suffix in (*SUFFIXES[fmt.removesuffix("_v2")], *_UNUSED)}
    for name, shape in wanted.items():
        if name not in checkpoint:
            raise QsunError(f"{checkpoint.directory} has no tensor {name}; is config.json that of another model?")
        if checkpoint.shape(name) != shape:
            raise QsunError(f"{name} is {list(checkpoint.shape(name))}, but config.json says {list(shape)}")
    names = {name for name in checkpoint.names() if name.startswith(prefixes)}
    _check_unknown(checkpoint, sorted(names - theirs - wanted.keys()), model, layers)
    return layers, list(wanted)


def _check_unknown(checkpoint: Checkpoint, unknown: list[str], model: Any, layers: list[str]) -> None:
    # AutoGPTQ once stored zeros as the bias of every layer.
    unknown = [n for n in unknown if n.removesuffix(".bias") not in layers or checkpoint.load([n])[n].any()]
    inside = next((name for name in unknown if name.startswith(BLOCKS)), None)
    if inside is not None:
        raise QsunError(
            f"{checkpoint.directory} has {inside}, which a {model.config.model_type} model of "
            f"{model.config.num_hidden_layers} blocks does not; is config.json that of another model?"
        )
    if unknown:
        log.warning("%d tensors that the model does not use, such as %s, are left out", len(unknown), unknown[0])


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
            weights, _ = read_quantized_layer(checkpoint, layer, fmt, features, skeleton.device)
            tensors[name] = weights.dequantize()
    return skeleton.fill(skeleton.layers[index], tensors, prefix)
