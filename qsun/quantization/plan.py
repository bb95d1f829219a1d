"""What a run writes and needs, known before it starts: the output's tensors, disk, memory. --dry-run shows it."""

import shutil
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch

from qsun.config import LayerSpec, QuantConfig
from qsun.data.calibration import Calibration, Sample
from qsun.errors import QsunError
from qsun.memory import human_bytes
from qsun.model.architectures import BLOCKS, block_prefix, kv_shape
from qsun.model.checkpoint import Checkpoint
from qsun.model.formats import pack_layer
from qsun.model.output_dir import Part, Shard, stored_as
from qsun.model.quantized import Quantized
from qsun.model.skeleton import EMBEDDING, HEAD, Skeleton, weight_shape
from qsun.quantization.polish_memory import polish_bytes

_INTERPRETER_BYTES = 560 << 20  # Python with torch and transformers and their heap, measured on a tiny model
_KEPT_MLP_LIMIT = 1 << 30
_ROUNDING = 5 * 4  # bytes a weight of rtn, in float32: weight, w / scale, dequantized, their difference and its square
REST = "rest"  # the part of all that is outside the blocks


@dataclass(frozen=True)
class Plan:
    """What a run needs; the peaks are estimates.

    prefill_tokens, of the calibration_tokens, are read by the `prefill_modules` that are not the base.
    """

    blocks: int
    quantized_layers: int
    full_precision_layers: int
    calibration_tokens: int
    prefill_modules: int
    prefill_tokens: int
    polish_steps: int
    dtype: str
    device: str
    output_bytes: int
    peak_ram_bytes: int
    peak_vram_bytes: int


def block_part(index: int) -> str:
    """Return the name of a block's part of the output."""
    return f"block-{index:05d}"


def output_parts(skeleton: Skeleton, specs: dict[str, LayerSpec], fmt: str) -> dict[str, Part]:
    """Return the tensors of each part of the output: one for each block, and the rest."""
    parts = {
        block_part(index): _part(skeleton, block_prefix(index), specs, fmt) for index in range(len(skeleton.layers))
    }
    return parts | {REST: _part(skeleton, "", specs, fmt)}


def _part(skeleton: Skeleton, prefix: str, specs: dict[str, LayerSpec], fmt: str) -> Part:
    checkpoint, part = skeleton.checkpoint, {}
    quantized = {name: spec for name, spec in specs.items() if name.startswith(prefix) and spec.quantized}
    known = skeleton.model.state_dict().keys() - ({HEAD} if skeleton.tied else set())
    for name in checkpoint.names(prefix):
        here = name in known and (prefix or not name.startswith(BLOCKS))
        if here and name.removesuffix(".weight") not in quantized:
            part[name] = checkpoint.headers[name]["dtype"], checkpoint.shape(name)
    for name, spec in quantized.items():
        if prefix or not name.startswith(BLOCKS):
            packed = _packed(weight_shape(skeleton.model, name), spec, fmt)
            part |= {f"{name}.{suffix}": stored for suffix, stored in packed.items()}
    return part


@cache
def _packed(shape: tuple[int, int], spec: LayerSpec, fmt: str) -> Part:
    """Return the tensors that `pack_layer` makes of a layer, by suffix, without computing them."""
    N, K = shape
    G = 1 if spec.group_size == -1 else K // spec.group_size
    q, zeros = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (shape, (G, N)))
    weights = Quantized(q, torch.empty(G, N, device="meta"), zeros)
    return {suffix: stored_as(tensor) for suffix, tensor in pack_layer(weights, spec, fmt).items()}


def make_plan(
    skeleton: Skeleton,
    config: QuantConfig,
    specs: dict[str, LayerSpec],
    calibration: Calibration | None,
    shards: list[Shard],
) -> Plan:
    """Plan a run over calibration samples (None for a method that needs none)."""
    samples = () if calibration is None else calibration.samples
    shapes = {name: weight_shape(skeleton.model, name) for name in specs}
    read = [sample for sample in samples if sample.module is not None]
    quantized = [name for name, spec in specs.items() if spec.quantized]
    working = _working_bytes(skeleton, config, shapes, samples)
    ram, vram = (0, working) if skeleton.device.type == "cuda" else (working, 0)
    if config.polish and calibration is not None:
        ram, vram = map(max, (ram, vram), polish_bytes(skeleton, specs, calibration))
    return Plan(
        blocks=len(skeleton.layers),
        quantized_layers=len(quantized),
        full_precision_layers=len(shapes) - len(quantized),
        calibration_tokens=sum(len(sample.tokens) for sample in samples),
        prefill_modules=len({sample.module for sample in read}),
        prefill_tokens=sum(sample.prefill_tokens for sample in read),
        polish_steps=config.polish,
        dtype=str(skeleton.dtype).removeprefix("torch."),
        device=str(skeleton.device),
        output_bytes=sum(shard.size_bytes for shard in shards),
        peak_ram_bytes=_INTERPRETER_BYTES + max(ram + _largest_read(skeleton.checkpoint), _rest_bytes(shards)),
        peak_vram_bytes=vram,
    )


def check_disk(plan: Plan, directory: Path, written: int = 0) -> None:
    """Raise QsunError where the output's file system has too little room. written: bytes that are there already."""
    free, needed = shutil.disk_usage(directory).free, plan.output_bytes - written
    if free < needed:
        raise QsunError(
            f"{directory} has {human_bytes(free)} free, but the run needs {human_bytes(needed)}; "
            "free some, or choose another --out"
        )


def _largest_read(checkpoint: Checkpoint) -> int:
    """Return the bytes of a block, or of the embedding, as they are read."""
    return max(checkpoint.size_bytes(checkpoint.names(block_prefix(0))), checkpoint.size_bytes([EMBEDDING]))


def _rest_bytes(shards: list[Shard]) -> int:
    """Return the bytes of all that is outside the blocks, which is written at once: embedding and head."""
    spans = (span for shard in shards for name, span in shard.spans.items() if not name.startswith(BLOCKS))
    return sum(end - start for start, end in spans)


def _working_bytes(
    skeleton: Skeleton, config: QuantConfig, shapes: dict[str, tuple[int, int]], samples: tuple[Sample, ...]
) -> int:
    item = torch.finfo(skeleton.dtype).bits // 8
    block = sum(N * K for name, (N, K) in shapes.items() if name.startswith(block_prefix(0))) * item
    vocabulary, hidden = skeleton.checkpoint.shape(EMBEDDING)
    stages = _stage_shapes(skeleton, shapes)
    if not config.calibrated:
        head = prod(shapes.get("lm_head", (0, 0)))
        return max(2 * block + _ROUNDING * max(map(prod, stages)), (item + _ROUNDING) * head)
    tokens = sum(len(sample.tokens) for sample in samples)
    streams = 2 if config.method == "refined" else 1
    heads = [shape for name, shape in shapes.items() if not name.startswith(BLOCKS)]
    at_peak = max(_pass_bytes(N, K, hidden, streams) for N, K in stages + heads)
    K = max(K for _, K in shapes.values())
    kept = streams * min(tokens * K * item, _KEPT_MLP_LIMIT)
    base_reads = any(sample.module is None and sample.prefill_tokens for sample in samples)
    kept += (2 if base_reads else streams) * 3 * tokens * hidden * item  # a second stream writes the prompts' KV
    kept += _prompt_numbers(skeleton, samples) * item
    return kept + max(2 * block + at_peak, vocabulary * hidden * item)


def _stage_shapes(skeleton: Skeleton, shapes: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the shapes that passes work on in a block: all rows of a stage's layers at once."""
    stages = [[shapes[block_prefix(0) + name] for name in stage.layers] for stage in skeleton.architecture.stages]
    return [(sum(N for N, _ in stage), stage[0][1]) for stage in stages]


def _pass_bytes(N: int, K: int, hidden: int, streams: int) -> int:
    """Return what the moments of a stage and, at its peak, gptq take."""
    moments = 4 * K * K * streams + 4 * hidden * K * (streams - 1)
    return moments + 2 * (8 if K <= 4096 else 4) * K * K + 4 * 4 * K * K + 10 * 4 * N * K


def _prompt_numbers(skeleton: Skeleton, samples: tuple[Sample, ...]) -> int:
    """Count what is kept of the prompts: K and V of a block, and the hidden states of their prefill modules."""
    _, heads, width = kv_shape(skeleton.config)
    return sum(sample.prefill_tokens for sample in samples) * (2 * heads * width + skeleton.config.hidden_size)
