"""What a run will need before it starts: layers, disk, memory. The same numbers are shown by --dry-run and checked."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qsun.config import LayerSpec, QuantConfig
from qsun.data.calibration import Calibration, Sample
from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.model.skeleton import EMBEDDING, Skeleton

_INTERPRETER_BYTES = 480 << 20  # Python with torch and transformers, measured
_KEPT_MLP_LIMIT = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Estimates in bytes; disk is what the run needs at its peak, output what is left of it.

    prefill_tokens, of the calibration_tokens, are read by the `prefill_modules` that are not the base.
    """

    blocks: int
    quantized_layers: int
    full_precision_layers: int
    calibration_tokens: int
    prefill_modules: int
    prefill_tokens: int
    dtype: str
    device: str
    output_bytes: int
    disk_bytes: int
    peak_ram_bytes: int
    peak_vram_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    config: QuantConfig,
    shapes: dict[str, tuple[int, int]],
    specs: dict[str, LayerSpec],
    calibration: Calibration | None,
) -> Plan:
    """Estimate a run over calibration samples (None for a method that needs none)."""
    samples = () if calibration is None else calibration.samples
    read = [sample for sample in samples if sample.module is not None]
    quantized = [name for name, spec in specs.items() if spec.quantized]
    output = checkpoint.size_bytes(n for n in checkpoint.names() if n.removesuffix(".weight") not in quantized)
    output += sum(_layer_bytes(shapes[name], specs[name]) for name in quantized)
    on_gpu = skeleton.device.type == "cuda"
    working = _working_bytes(skeleton, checkpoint, config, shapes, samples)
    return Plan(
        blocks=len(skeleton.layers),
        quantized_layers=len(quantized),
        full_precision_layers=len(shapes) - len(quantized),
        calibration_tokens=sum(len(sample.tokens) for sample in samples),
        prefill_modules=len({sample.module for sample in read}),
        prefill_tokens=sum(sample.prefill_tokens for sample in read),
        dtype=str(skeleton.dtype).removeprefix("torch."),
        device=str(skeleton.device),
        output_bytes=output,
        disk_bytes=2 * output,
        peak_ram_bytes=_INTERPRETER_BYTES + (0 if on_gpu else working) + _largest_part(checkpoint, skeleton),
        peak_vram_bytes=working if on_gpu else 0,
    )


def check_disk(plan: Plan, directory: Path, written: int = 0) -> None:
    """Raise QsunError where the output's file system has too little room. written: bytes that are there already."""
    free, needed = shutil.disk_usage(directory).free, plan.disk_bytes - written
    if free < needed:
        raise QsunError(
            f"{directory} has {free / 1e9:.1f} GB free, but the run needs {needed / 1e9:.1f} GB; "
            "free some, or choose another --out"
        )


def _layer_bytes(shape: tuple[int, int], spec: LayerSpec) -> int:
    N, K = shape
    groups = 1 if spec.group_size == -1 else K // spec.group_size
    return N * K * spec.bits // 8 + groups * N * (16 + spec.bits) // 8 + 4 * K


def _largest_part(checkpoint: Checkpoint, skeleton: Skeleton) -> int:
    """Raw tensors of a block, or of the embedding, as they are read."""
    return max(checkpoint.size_bytes(checkpoint.names(skeleton.prefix(0))), checkpoint.size_bytes([EMBEDDING]))


def _working_bytes(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    config: QuantConfig,
    shapes: dict[str, tuple[int, int]],
    samples: tuple[Sample, ...],
) -> int:
    item = torch.finfo(skeleton.dtype).bits // 8
    block = sum(N * K for name, (N, K) in shapes.items() if name.startswith(skeleton.prefix(0))) * item
    vocabulary, hidden = checkpoint.shape(EMBEDDING)
    if not config.calibrated:
        return 2 * block + max((N * K * 4 for N, K in shapes.values()), default=0)
    tokens = sum(len(sample.tokens) for sample in samples)
    streams = 2 if config.method == "refined" else 1
    N, K = max(shapes.values(), key=lambda shape: shape[1])
    moments = 4 * K * K * streams + 4 * hidden * K * (streams - 1)
    factor = 2 * (8 if K <= 4096 else 4) * K * K + 4 * 4 * K * K + 10 * 4 * N * K  # at the peak, inside gptq
    kept = streams * (2 * tokens * hidden * item + min(tokens * K * item, _KEPT_MLP_LIMIT))
    kept += _prompt_numbers(skeleton, samples) * item
    return kept + max(2 * block + moments + factor, vocabulary * hidden * item)


def _prompt_numbers(skeleton: Skeleton, samples: tuple[Sample, ...]) -> int:
    """Numbers kept of the prompts: K and V of a block, and the hidden states of whoever reads them."""
    config = skeleton.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim
    return sum(sample.prefill_tokens for sample in samples) * (kv + config.hidden_size)
