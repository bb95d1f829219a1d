"""The contenders of `qsun bench speed`: the same decode module in bfloat16, in int4 and in fewer or more bits."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from qsun.errors import QsunError
from qsun.eval.speed.model_shapes import ModelShape, known_shape
from qsun.kernels.layout import TILES
from qsun.memory import available_bytes
from qsun.model.architectures import BLOCKS, architecture_of
from qsun.model.quantized import Quantized
from qsun.model.skeleton import HEAD, empty_model
from qsun.quantization.methods.grid import Grid
from qsun.quantization.methods.rtn import rtn
from qsun.runtime.decode_module import dequantize_layers, load_decode
from qsun.runtime.fused_block import fuse_blocks
from qsun.runtime.fused_projections import merge_block, merge_projections
from qsun.runtime.kv_cache import kv_bytes_per_token
from qsun.runtime.quant_linear import QuantLinear

DTYPE = torch.bfloat16
GRID = Grid(bits=4, group_size=128, sym=True, scale_dtype=DTYPE)
SUN, QSUN, QSUN_HEAD = "sun", "qsun", "qsun+head"
HEADS = ("bf16", "int4", "both")
_ROWS = 8192  # of a matrix to draw or quantize at once: the whole head in float32 would take gigabytes


@dataclass(frozen=True)
class Contenders:
    """Decode modules that take turns, and the prefill module in front of them.

    Attributes:
        name: for titles. decode: variant -> causal LM; the variants are SUN, QSUN (int4), QSUN_HEAD (lm_head in int4
            too) and, for other bits, "qsun-2bit" and so on, with the head in bfloat16.
        prefill: the causal LM, in bfloat16, that reads prompts for all of them.
        head: variant -> how its lm_head is stored, "bf16" or "int4".
    """

    name: str
    decode: dict[str, Any]
    prefill: Any
    head: dict[str, str]


def made_contenders(
    shape: str, head: str, device: torch.device, seed: int = 0, bits: Sequence[int] = (4,)
) -> Contenders:
    """Make random weights of a known model's sizes in bfloat16, and round the same weights to fewer bits.

    Args:
        head: of int4, one of HEADS.
    Raises:
        QsunError: an unknown shape, a shape of several GPUs, an unknown head, or bits that are not supported.
    """
    if head not in HEADS:
        raise QsunError(f"lm-head {head!r} is not known; use one of {', '.join(HEADS)}")
    unknown = sorted(set(bits) - TILES.keys())
    if unknown:
        raise QsunError(f"bits {unknown[0]} is not supported; use {', '.join(map(str, TILES))}")
    sizes = known_shape(shape)
    config = shape_config(shape, sizes)
    weights = 2 * sum(p.numel() for name, p in empty_model(config).named_parameters() if not _is_tied(name, config))
    all_bytes = int(weights * (1 + sum(0.15 + each / 16 for each in set(bits))))
    check_memory(all_bytes, available_bytes(device), f"shape {shape} in bf16 and int4", "take a smaller one")
    reference = random_model(config, device, seed)
    decode = {SUN: reference}
    made = {each: quantized_model(reference, config, each) for each in dict.fromkeys(bits)}
    merge_projections(reference, config, dense=True)
    if device.type == "cuda":
        for model in (reference, *made.values()):
            fuse_blocks(model, config)
    if 4 in made and head != "int4":
        decode[QSUN] = made[4]
    if 4 in made and head != "bf16":
        decode[QSUN_HEAD] = with_int4_head(made[4])
    decode |= {f"{QSUN}-{each}bit": model for each, model in made.items() if each != 4}
    return Contenders(shape, decode, reference, {name: head_of(model) for name, model in decode.items()})


def loaded_contenders(directory: str, base: str | None, device: torch.device) -> Contenders:
    """Load a decode module and its base; without a base, its own weights dequantized to bfloat16.

    Raises:
        QsunError: the decode module is not quantized, or the base is, or its shape differs.
    """
    quantized: Any = load_decode(directory, device, DTYPE).model
    if not any(isinstance(module, QuantLinear) for module in quantized.modules()):
        raise QsunError(f"{directory} is not quantized; give the int4 decode module, and its base with --base")
    reference: Any
    if base is None:
        reference = load_decode(directory, device, DTYPE, keep_dense=False, merge=False).model
        dequantize_layers(reference)
    else:
        reference = load_decode(base, device, DTYPE).model
        if any(isinstance(module, QuantLinear) for module in reference.modules()):
            raise QsunError(f"base {base} is quantized; give the full-precision model")
        if _sizes(reference.config) != _sizes(quantized.config):
            raise QsunError(f"base {base} has {_sizes(reference.config)}, {directory} has {_sizes(quantized.config)}")
    if device.type == "cuda":  # where load_decode merges and fuses the int4 layers
        merge_projections(reference, reference.config, dense=True)
        fuse_blocks(reference, reference.config)
    variant = QSUN if head_of(quantized) == "bf16" else QSUN_HEAD
    decode = {SUN: reference, variant: quantized}
    return Contenders(
        Path(directory).name or directory, decode, reference, {name: head_of(model) for name, model in decode.items()}
    )


def shape_config(name: str, shape: ModelShape) -> Any:
    """Return transformers' config of a known shape: Qwen3 for names that begin with it, else Llama."""
    family = "qwen3" if name.startswith("qwen3") else "llama"
    return AutoConfig.for_model(
        family,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        tie_word_embeddings=shape.tied,
    )


def random_model(config: Any, device: torch.device, seed: int) -> Any:
    """Make a causal LM in bfloat16 with stable activations: norms are 1, rows have unit variance."""
    model = empty_model(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        if _is_tied(name, config):
            continue
        owner, _, leaf = name.rpartition(".")
        made = torch.ones(parameter.shape, dtype=DTYPE, device=device)
        if made.ndim == 2:
            for rows in made.split(_ROWS):
                rows.normal_(0, made.shape[1] ** -0.5, generator=generator)
        elif leaf == "bias":
            made.zero_()
        setattr(model.get_submodule(owner), leaf, nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    return model.to(device)


def quantized_model(reference: Any, config: Any, bits: int = 4) -> Any:
    """Return the model with the linear layers of its blocks rounded to so many bits (group 128, symmetric).

    Everything else, including the head of tied embeddings, is shared with the given one and takes no memory.
    """
    architecture = architecture_of(config.model_type)
    keep_dense = _bytes(reference) < available_bytes() / 2
    model = empty_model(config)
    for name, parameter in reference.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if owner.rpartition(".")[0].startswith(BLOCKS) and parameter.ndim == 2:
            continue
        setattr(model.get_submodule(owner), leaf, parameter)
    for block, source in zip(model.model.layers, reference.model.layers, strict=True):
        for name in architecture.linear_names():
            linear: Any = source.get_submodule(name)
            block.set_submodule(name, QuantLinear(rounded(linear.weight, bits), linear.bias, bits, DTYPE, keep_dense))
        merge_block(block, architecture, silu=getattr(config, "hidden_act", None) == "silu")
    return model.to(reference.device)


def with_int4_head(model: Any) -> Any:
    """Return a view of a model with an int4 output projection; blocks and embedding are shared."""
    view = copy.copy(model)
    view._modules = dict(model._modules)
    head = model.lm_head
    view.lm_head = QuantLinear(rounded(head.weight), None, 4, DTYPE, _bytes(head) < available_bytes() / 2)
    return view


def rounded(weight: Tensor, bits: int = 4) -> Quantized:
    """Round (N, K) weights to nearest, a few rows at a time."""
    grid = replace(GRID, bits=bits)
    parts = [rtn(rows, grid, scale_search=False) for rows in weight.split(_ROWS)]
    q, scales, zeros = (torch.cat([part[i] for part in parts], min(i, 1)) for i in range(3))  # type: ignore[misc]
    return Quantized(q, scales, zeros)


def head_of(model: Any) -> str:
    """Return how the output projection is stored."""
    return f"int{model.lm_head.bits}" if isinstance(model.lm_head, QuantLinear) else "bf16"


def weight_bytes(model: Any, rows: int) -> int:
    """Return the bytes of weights that a decode step reads: every matrix once, and `rows` rows of the embedding."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            total += rows * module.embedding_dim * module.weight.element_size()
        elif isinstance(module, QuantLinear):
            total += module.read_bytes(rows)
        else:
            total += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    return total


def kv_bytes(config: Any, batch: int, context: int) -> int:
    """Return the bytes of keys and values of `batch` rows of `context` tokens."""
    return batch * context * kv_bytes_per_token(config, DTYPE)


def check_memory(needed: int, free: int, what: str, fix: str) -> None:
    """Raise QsunError if more bytes are needed than are free."""
    if needed > free:
        raise QsunError(f"{what} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; {fix}")


def _is_tied(name: str, config: Any) -> bool:
    return name == HEAD and bool(config.tie_word_embeddings)


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _sizes(config: Any) -> str:
    return f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size}"
