"""Quantize one block: fold AWQ's scales, then stage after stage collect statistics and quantize its linear layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsun.config import LayerSpec, QuantConfig
from qsun.errors import QsunError
from qsun.model.architectures import Stage, block_prefix
from qsun.model.quantized import Quantized
from qsun.model.skeleton import linear_of
from qsun.quantization.activations import Activations
from qsun.quantization.job import Job
from qsun.quantization.methods.awq import awq, channel_scales
from qsun.quantization.methods.gptq import GptqOptions, gptq
from qsun.quantization.methods.grid import Grid
from qsun.quantization.methods.moments import Moments, ordered_sum
from qsun.quantization.methods.refined import refined
from qsun.quantization.methods.rtn import rtn

Step = Callable[[str], None]


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer and its error: |(W - Q) X|^2 / |W X|^2 over calibration, or of the weights alone for rtn."""

    weights: Quantized
    spec: LayerSpec
    error: float


def grid_of(spec: LayerSpec, scale_dtype: torch.dtype) -> Grid:
    return Grid(spec.bits, spec.group_size, spec.sym, scale_dtype)


def quantize_block(
    job: Job, index: int, block: nn.Module, ours: Activations | None, reference: Activations | None, step: Step
) -> tuple[dict[str, LayerResult], dict[str, Tensor]]:
    """Quantize a block's linear layers in place: their weights become the dequantized integers.

    Args:
        block: in full precision; `ours` has started it (None for rtn: no calibration).
        reference: the full-precision model's activations, in its own copy of the block; `refined` compares with them.
        step: called with a layer's name when it is done.
    Returns:
        Results by full layer name; layers that stay in full precision are absent. And by full name, as they are to be
        stored, the tensors that a fold changed; all others that are not quantized are the base's.
    """
    prefix, architecture = block_prefix(index), job.skeleton.architecture
    folded: dict[str, Tensor] = {}
    if job.config.method.startswith("awq") and ours is not None:
        folded = fold_scales(job, index, block, ours)
        ours.clear()
    results: dict[str, LayerResult] = {}
    for number, stage in enumerate(architecture.stages):
        wanted = [name for name in stage.layers if job.specs[prefix + name].quantized]
        if not wanted:
            continue
        spec, linears = job.specs[prefix + wanted[0]], [linear_of(block, name) for name in wanted]
        weights = [linear.weight.data for linear in linears]
        target = reference if job.config.method == "refined" else None
        moments = None if ours is None else collect(ours, target, number, weights)
        found = quantize_layers(weights, moments, spec, job.config, job.scale_dtype, prefix + wanted[0])
        for name, linear, result in zip(wanted, linears, found, strict=True):
            linear.weight.data = result.weights.dequantize().to(linear.weight.dtype)
            results[prefix + name] = result
            step(prefix + name)
    return results, folded


def collect(
    ours: Activations,
    reference: Activations | None,
    number: int,
    weights: Sequence[Tensor] = (),
    absolute: bool = False,
) -> Moments:
    """Return second moments of a stage's input over the counted positions of all batches; absolute: mean |x| as well.

    weights: (N_i, K) in full precision. Fewer outputs than inputs make it cheaper to know what those outputs lack than
    how the inputs moved: (N, K) sums instead of (K, K).
    """
    stage, architecture = ours.architecture.stages[number], ours.architecture
    moments: Moments | None = None
    for index, batch in enumerate(ours.batches):
        x_reference = None if reference is None else batch.rows(reference.stage_input(number, index))
        x = batch.rows(ours.stage_input(number, index))
        missing = None
        if reference is not None and stage.ends_half and architecture.output_added:
            missing = batch.rows(reference.residual(number, index) - ours.residual(number, index))
        if x_reference is not None and sum(map(len, weights)) < x.shape[-1]:
            lacking = torch.cat([nn.functional.linear(x_reference - x, weight) for weight in weights], 1)
            missing, x_reference = lacking if missing is None else lacking + missing, None
        moments = moments or Moments.zeros(x.shape[-1], x.device, absolute)
        moments.add(x, x_reference, missing)
    assert moments is not None  # there is always a batch
    return moments


def quantize_layers(
    weights: list[Tensor],
    moments: Moments | None,
    spec: LayerSpec,
    config: QuantConfig,
    scale_dtype: torch.dtype,
    name: str,
) -> list[LayerResult]:
    """Run the configured pass on weight matrices (N_i, K) that share an input, as one of all their rows.

    Args:
        spec: of all of them, as engines fuse them into one layer (`check_fused`).
        name: of the first.
    Raises:
        QsunError: NaN or Inf in the statistics.
    """
    weight, rows = torch.cat([weight.float() for weight in weights]), [len(weight) for weight in weights]
    if moments is None:
        quantized = rtn(weight, grid_of(spec, scale_dtype), scale_search=config.scale_search)
        parts = zip(weight.split(rows), quantized.split(rows), strict=True)
        return [LayerResult(part, spec, weight_error(original, part.dequantize())) for original, part in parts]
    compared = {"full-precision input": moments.drift, "full-precision output": moments.missing}
    for what, sums in ({"input": moments.gram.diagonal()} | compared).items():
        if sums is not None and not torch.isfinite(sums).all():
            raise QsunError(f"the {what} of {name} has NaN or Inf; try --dtype float32")
    hessian = moments.hessian()
    quantized = _pass(weight, moments, hessian, grid_of(spec, scale_dtype), config)
    errors = output_errors(weight, quantized.dequantize(), hessian, rows)
    return [LayerResult(part, spec, error) for part, error in zip(quantized.split(rows), errors, strict=True)]


def _pass(weight: Tensor, moments: Moments, hessian: Tensor, grid: Grid, config: QuantConfig) -> Quantized:
    options = GptqOptions(
        config.damp_percent, config.desc_act, config.static_groups, config.scale_search, config.sweeps
    )
    passes: Mapping[str, Callable[[], Quantized]] = {
        "gptq": lambda: gptq(weight, hessian, grid, options),
        "awq": lambda: awq(weight, hessian, grid),
        "awq+gptq": lambda: gptq(weight, hessian, grid, options),
        "refined": lambda: refined(weight, moments, grid, options, config.shrinkage),
    }
    return passes[config.method]()


def weight_error(weight: Tensor, quantized: Tensor) -> float:
    """Return |W - Q|^2 / |W|^2."""
    return _ratio((weight - quantized).square().sum(1), weight.square().sum(1))


def output_errors(weight: Tensor, quantized: Tensor, hessian: Tensor, rows: list[int]) -> list[float]:
    """Return |(W - Q) X|^2 / |W X|^2 of matrices stacked by rows, from the mean of x x^T."""
    wrong, right = (((w @ hessian) * w).sum(1).split(rows) for w in (weight - quantized, weight))
    return [_ratio(*sums) for sums in zip(wrong, right, strict=True)]


def _ratio(wrong: Tensor, right: Tensor) -> float:
    return ordered_sum(wrong) / max(ordered_sum(right), 1e-30)


def fold_scales(job: Job, index: int, block: nn.Module, ours: Activations) -> dict[str, Tensor]:
    """Do AWQ's first half, in place: scale input columns up, and what produces the input down by as much.

    Returns:
        The folded norms and biases by full name, in the dtype that the base stores them in.
    """
    prefix, specs = block_prefix(index), job.specs
    folded: dict[str, Tensor] = {}
    for number, stage in enumerate(ours.architecture.stages):
        spec = specs[prefix + stage.layers[0]]
        if stage.producer is None or not spec.quantized:
            continue
        producer = block.get_submodule(stage.producer)
        if isinstance(producer, nn.Linear) and not specs[prefix + stage.producer].quantized:
            continue  # it is stored in the base's dtype, which could not hold the scaled weights exactly
        changed = "bias" if isinstance(producer, nn.Linear) else "weight"  # the linear's weight is quantized
        key = f"{prefix}{stage.producer}.{changed}"
        stored = job.checkpoint.load([key])[key].to(job.skeleton.device) if key in job.checkpoint else None
        linears = [linear_of(block, name) for name in stage.layers]
        moments = collect(ours, None, number, absolute=True)
        weights = [linear.weight.data for linear in linears]
        grid = grid_of(spec, job.scale_dtype)
        scales = channel_scales(weights, moments.hessian(), moments.mean_absolute(), grid)
        achieved = _divide_producer(producer, scales, stage, stored, job.skeleton.architecture.norm_offset)
        if stored is not None:
            folded[key] = stored
        for linear in linears:
            linear.weight.data = (linear.weight.data.float() * achieved).to(linear.weight.dtype)
        ours.clear()
    return folded


def _divide_producer(
    producer: nn.Module, scales: Tensor, stage: Stage, stored: Tensor | None, norm_offset: float
) -> Tensor:
    """Divide the producer's outputs by scales. Returns the scales that its stored dtype really took.

    stored: a norm's weight, or a linear layer's bias if it has one, as the base stores it; divided in place.
    """
    if isinstance(producer, nn.Linear):
        part, parts = stage.rows
        size = producer.weight.shape[0] // parts
        rows = slice(part * size, (part + 1) * size)
        divided = producer.weight.data[rows].float() / scales[:, None]
        producer.weight.data[rows] = divided.to(producer.weight.dtype)
        if stored is not None:
            stored[rows] = (stored[rows].float() / scales).to(stored.dtype)
            producer.bias.data[rows] = stored[rows].to(producer.bias.dtype)
        return scales
    assert stored is not None  # a norm has a weight
    norm: Any = producer
    old = stored.float() + norm_offset
    stored.copy_(old / scales - norm_offset)
    norm.weight.data = stored.to(norm.weight.dtype)
    new = stored.float() + norm_offset
    return torch.where(new == 0, torch.ones_like(new), old / new)
