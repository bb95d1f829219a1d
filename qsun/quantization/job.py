"""A request to quantize, checked: everything that can be refused is refused here, before work starts."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from qsun.config import LayerSpec, QuantConfig
from qsun.data.calibration import BUILTIN, Calibration, hold_out, read_calibration
from qsun.demo import calibration_file
from qsun.device import compute_dtype, default_device
from qsun.memory import clear_out_of_memory
from qsun.model.checkpoint import Checkpoint, check_full_precision
from qsun.model.formats import check_format
from qsun.model.locate import DEMO, find_model, load_tokenizer
from qsun.model.manifest import check_base_files
from qsun.model.output_dir import (
    Part,
    Shard,
    check_free,
    check_outside,
    existing_parent,
    lay_out,
    partial_path,
    written_bytes,
)
from qsun.model.quantization_config import check_fused, check_overrides
from qsun.model.skeleton import EMBEDDING, Skeleton, read_model_config
from qsun.model.stored_layers import check_weights
from qsun.quantization.plan import Plan, check_disk, make_plan, output_parts
from qsun.quantization.prefill_activations import PrefillPlan, plan_prefills
from qsun.runtime.rotary import rope_boundary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A checked request. parts: the tensors of each part of the output; shards: its files."""

    name: str
    out: Path
    config: QuantConfig
    checkpoint: Checkpoint
    skeleton: Skeleton
    specs: dict[str, LayerSpec]
    calibration: Calibration | None
    plan: Plan
    scale_dtype: torch.dtype
    prefill: PrefillPlan
    parts: dict[str, Part]
    shards: list[Shard]


@clear_out_of_memory()
def prepare(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    calibration: str | Path | Iterable[str | Path] | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    calibration_prefill: Iterable[str | Path] = (),
) -> Job:
    """Check everything that can be checked before work starts, and estimate what it will take. Writes nothing.

    Raises:
        QsunError: see `quantize`.
    """
    config = config or QuantConfig()
    out = Path(out)
    check_free(out, resume)
    checkpoint = Checkpoint(find_model(str(model)))
    check_outside(out, checkpoint.directory)
    check_full_precision(checkpoint)
    skeleton = _skeleton(checkpoint, config.dtype, default_device(device))
    if checkpoint.left_out:
        kind = (skeleton.config.model_type, len(checkpoint.left_out), checkpoint.left_out[0])
        log.warning("the text model (%s) is quantized; %d tensors of other parts, such as %s, are left out", *kind)
    shapes = skeleton.linear_shapes(config.lm_head)
    config = _fitting_groups(config, shapes)
    check_overrides(config, shapes)
    check_format(config, shapes)
    specs = {name: config.spec_for(name) for name in shapes}
    if "lm_head" in specs and not specs["lm_head"].quantized:  # an override takes back what --lm-head asked for
        config = config.replace(lm_head=False)
        del shapes["lm_head"], specs["lm_head"]
    check_fused(specs)
    check_weights(checkpoint, skeleton.model)
    check_base_files(checkpoint.directory)
    sources = _sources(str(model), calibration)
    prefill, samples = PrefillPlan(), None
    if config.calibrated:
        prefill = plan_prefills(map(str, calibration_prefill), sources, str(model), skeleton)
        for source in prefill.modules:
            check_weights(source.skeleton.checkpoint, source.skeleton.model)
        samples = _read_samples(skeleton, config, sources, prefill)
    elif list(calibration_prefill):
        log.warning("%s uses no calibration, so --calib-prefill has no effect", config.method)
    parts = output_parts(skeleton, specs, config.format)
    shards = lay_out(parts.values())
    plan = make_plan(skeleton, config, specs, samples, shards)
    check_disk(plan, existing_parent(partial_path(out)), written_bytes(out))
    scale_dtype = skeleton.base_dtype if config.scale_dtype == "auto" else getattr(torch, config.scale_dtype)
    if scale_dtype == torch.float32:
        scale_dtype = torch.float16
    return Job(str(model), out, config, checkpoint, skeleton, specs, samples, plan, scale_dtype, prefill, parts, shards)


def _skeleton(checkpoint: Checkpoint, dtype: str, device: torch.device) -> Skeleton:
    stored = checkpoint.dtype(EMBEDDING) if EMBEDDING in checkpoint else None
    width = read_model_config(checkpoint.directory).hidden_size
    return Skeleton(checkpoint, compute_dtype(dtype, device, stored, width), device)


def _fitting_groups(config: QuantConfig, shapes: dict[str, tuple[int, int]]) -> QuantConfig:
    """Return the settings; if the user named no group size, with the largest that fits every layer."""
    sizes = {K for name, (_, K) in shapes.items() if config.spec_for(name).quantized}
    fits = next((g for g in (128, 64, 32) if all(K % g == 0 for K in sizes)), -1)
    if "group_size" in config.model_fields_set or fits == config.group_size:
        return config
    log.warning("group_size %d does not divide all layers' inputs; %d is used", config.group_size, fits)
    return config.replace(group_size=fits)


def _sources(model: str, calibration: str | Path | Iterable[str | Path] | None) -> list[str]:
    if calibration is None:
        calibration = str(calibration_file()) if model == DEMO else BUILTIN
    return [str(calibration)] if isinstance(calibration, (str, Path)) else list(map(str, calibration))


def _read_samples(skeleton: Skeleton, config: QuantConfig, sources: list[str], prefill: PrefillPlan) -> Calibration:
    positions = skeleton.config.max_position_embeddings
    seq_len = min(config.seq_len, positions, rope_boundary(skeleton.config) or positions)
    tokenizer = load_tokenizer(skeleton.checkpoint.directory)
    found = read_calibration(
        sources, tokenizer, skeleton.config.vocab_size, config.samples, seq_len, config.seed, prefill.numbers
    )
    return hold_out(found) if config.polish else found
