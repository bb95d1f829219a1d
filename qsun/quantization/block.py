"""Quantize one block: fold AWQ's scales, then stage after stage collect statistics and quantize its linear layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsun.config import LayerSpec, QuantConfig
from qsun.errors import QsunError
from qsun.model.architectures import Stage, block_prefix
from qsun.model.quantized import Quantized
from qsun.model.skeleton import Skeleton, linear_of
from qsun.quantization.activations import Activations
from qsun.quantization.job import Job
from qsun.quantization.methods.awq import awq, channel_scales
from qsun.quantization.methods.gptq import GptqOptions, gptq
from qsun.quantization.methods.grid import Grid
from qsun.quantization.methods.moments import Moments
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
    job: Job, index: int, block: nn.Module, ours: Activations | None, full: Activations | None, step: Step
) -> dict[str, LayerResult]:
    """Quantize a block's linear layers in place: their weights become the dequantized integers.

    Args:
        block: in full precision; `ours` has started it (None for rtn: no calibration).
        full: the full-precision model's activations, in its own copy of the block, where a method compares with it.
        step: called with a layer's name when it is done.
    Returns:
        Results by full layer name; layers that stay in full precision are absent.
    """
    prefix, architecture = block_prefix(index), job.skeleton.architecture
    if job.config.method.startswith("awq") and ours is not None:
        fold_scales(job, index, block, ours)
        ours.clear()
    results: dict[str, LayerResult] = {}
    for number, stage in enumerate(architecture.stages):
        wanted = [name for name in stage.layers if job.specs[prefix + name].quantized]
        if not wanted:
            continue
        moments = None if ours is None else collect(ours, full, number)
        for name in wanted:
            linear = linear_of(block, name)
            spec = job.specs[prefix + name]
            result = quantize_layer(linear.weight.data, moments, spec, job.config, job.scale_dtype, prefix + name)
            linear.weight.data = result.weights.dequantize().to(linear.weight.dtype)
            results[prefix + name] = result
            step(prefix + name)
    return results


def collect(ours: Activations, full: Activations | None, number: int) -> Moments:
    """Return second moments of a stage's input over the counted positions of all batches."""
    stage, architecture = ours.architecture.stages[number], ours.architecture
    moments: Moments | None = None
    for index, batch in enumerate(ours.batches):
        x_full = full.stage_input(number, index) if full is not None else None
        x = ours.stage_input(number, index)
        gap = None
        if full is not None and stage.ends_half and architecture.output_added:
            gap = batch.rows(full.residual(number, index) - ours.residual(number, index))
        moments = moments or Moments.zeros(x.shape[-1], x.device)
        moments.add(batch.rows(x), None if x_full is None else batch.rows(x_full), gap)
    assert moments is not None  # there is always a batch
    return moments


def quantize_layer(
    weight: Tensor, moments: Moments | None, spec: LayerSpec, config: QuantConfig, scale_dtype: torch.dtype, name: str
) -> LayerResult:
    """Run the configured pass on one weight matrix. Raises QsunError naming the layer for NaN or Inf."""
    grid = grid_of(spec, scale_dtype)
    options = GptqOptions(
        config.damp_percent, config.desc_act, config.static_groups, config.scale_search, config.sweeps
    )
    weight = weight.float()
    if moments is None:
        quantized = rtn(weight, grid, scale_search=config.scale_search)
        error = (weight - quantized.dequantize()).square().sum() / weight.square().sum().clamp(min=1e-30)
        return LayerResult(quantized, spec, float(error))
    if not torch.isfinite(moments.absolute).all():
        raise QsunError(f"the input of {name} has NaN or Inf; try --dtype float32")
    hessian = moments.hessian()
    passes: Mapping[str, Callable[[], Quantized]] = {
        "gptq": lambda: gptq(weight, hessian, grid, options),
        "awq": lambda: awq(weight, hessian, grid),
        "awq+gptq": lambda: gptq(weight, hessian, grid, options),
        "refined": lambda: refined(weight, moments, grid, options),
    }
    quantized = passes[config.method]()
    return LayerResult(quantized, spec, output_error(weight, quantized.dequantize(), hessian))


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Return |(W - Q) X|^2 / |W X|^2 from the mean of x x^T."""
    difference = weight - quantized
    wrong = ((difference @ hessian) * difference).sum()
    return float(wrong / ((weight @ hessian) * weight).sum().clamp(min=1e-30))


def fold_scales(job: Job, index: int, block: nn.Module, ours: Activations) -> None:
    """Do AWQ's first half, in place: scale input columns up, and what produces the input down by as much."""
    prefix, specs = block_prefix(index), job.specs
    for number, stage in enumerate(ours.architecture.stages):
        spec = specs[prefix + stage.layers[0]]
        if stage.producer is None or not spec.quantized:
            continue
        producer = block.get_submodule(stage.producer)
        if isinstance(producer, nn.Linear) and not specs[prefix + stage.producer].quantized:
            continue  # it is stored in the base's dtype, which could not hold the scaled weights exactly
        linears = [linear_of(block, name) for name in stage.layers]
        moments = collect(ours, None, number)
        weights = [linear.weight.data for linear in linears]
        grid = grid_of(spec, job.scale_dtype)
        scales = channel_scales(weights, moments.hessian(), moments.mean_absolute(), grid)
        achieved = _divide_producer(producer, scales, stage, job.skeleton)
        for linear in linears:
            linear.weight.data = (linear.weight.data.float() * achieved).to(linear.weight.dtype)
        ours.clear()


def _divide_producer(producer: nn.Module, scales: Tensor, stage: Stage, skeleton: Skeleton) -> Tensor:
    """Divide the producer's outputs by scales. Returns the scales that its stored dtype really took."""
    if isinstance(producer, nn.Linear):
        part, parts = stage.rows
        size = producer.weight.shape[0] // parts
        rows = slice(part * size, (part + 1) * size)
        divided = producer.weight.data[rows].float() / scales[:, None]
        producer.weight.data[rows] = divided.to(producer.weight.dtype)
        if producer.bias is not None:
            bias = (producer.bias.data[rows].float() / scales).to(skeleton.base_dtype)  # as the file holds it
            producer.bias.data[rows] = bias.to(producer.bias.dtype)
        return scales
    norm: Any = producer
    offset = skeleton.architecture.norm_offset
    old = norm.weight.data.float() + offset
    stored = (old / scales - offset).to(skeleton.base_dtype)
    norm.weight.data = stored.to(norm.weight.dtype)
    new = stored.float() + offset
    return torch.where(new == 0, torch.ones_like(new), old / new)
