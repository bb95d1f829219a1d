"""Quantize one block: fold AWQ's scales, then stage after stage collect statistics and quantize its linear layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsun.config import LayerSpec, QuantConfig
from qsun.errors import QsunError
from qsun.model.architectures import Architecture, Stage
from qsun.model.quantized import Quantized
from qsun.model.skeleton import linear_of
from qsun.quantization.activations import Stream
from qsun.quantization.methods.awq import awq, channel_scales
from qsun.quantization.methods.gptq import GptqOptions, gptq
from qsun.quantization.methods.grid import Grid
from qsun.quantization.methods.moments import Moments
from qsun.quantization.methods.refined import refined
from qsun.quantization.methods.rtn import rtn


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer and its error: |(W - Q) X|^2 / |W X|^2 over calibration, or of the weights alone for rtn."""

    weights: Quantized
    spec: LayerSpec
    error: float


def grid_of(spec: LayerSpec, scale_dtype: torch.dtype) -> Grid:
    return Grid(spec.bits, spec.group_size, spec.sym, scale_dtype)


def quantize_block(
    block: nn.Module,
    prefix: str,
    config: QuantConfig,
    scale_dtype: torch.dtype,
    architecture: Architecture,
    stream: Stream | None,
    full: Stream | None,
    step: Callable[[str], None],
) -> dict[str, LayerResult]:
    """Quantize a block's linear layers in place: their weights become what the integers stand for.

    Args:
        block: in full precision, entered by `stream` (which is None for rtn: no calibration).
        prefix: of layer names, e.g. "model.layers.0.".
        full: the full-precision model's stream, in its own copy of the block, where a method compares with it.
        step: called with a layer's name when it is done.
    Returns:
        Results by full layer name; layers that stay in full precision are absent.
    """
    if config.method.startswith("awq") and stream is not None:
        fold_scales(block, prefix, config, scale_dtype, architecture, stream)
        stream.forget()
    results: dict[str, LayerResult] = {}
    for number, stage in enumerate(architecture.stages):
        specs = {name: config.spec_for(prefix + name) for name in stage.layers}
        wanted = {name: spec for name, spec in specs.items() if spec.quantized}
        if not wanted:
            continue
        moments = None if stream is None else collect(stream, full, number, architecture)
        for name, spec in wanted.items():
            linear = linear_of(block, name)
            result = quantize_layer(linear.weight.data, moments, spec, config, scale_dtype, prefix + name)
            linear.weight.data = result.weights.dequantize().to(linear.weight.dtype)
            results[prefix + name] = result
            step(prefix + name)
    return results


def collect(stream: Stream, full: Stream | None, number: int, architecture: Architecture) -> Moments:
    """Second moments of a stage's input over the counted positions of all batches."""
    writes_residual = number in (1, 3) and architecture.output_added
    moments: Moments | None = None
    for index, batch in enumerate(stream.batches):
        x_full = full.stage_input(number, index) if full is not None else None
        x = stream.stage_input(number, index)
        gap = None
        if full is not None and writes_residual:
            gap = batch.rows(full.residual(number, index) - stream.residual(number, index))
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
    """|(W - Q) X|^2 / |W X|^2 from the mean of x x^T."""
    difference = weight - quantized
    wrong = ((difference @ hessian) * difference).sum()
    return float(wrong / ((weight @ hessian) * weight).sum().clamp(min=1e-30))


def fold_scales(
    block: nn.Module,
    prefix: str,
    config: QuantConfig,
    scale_dtype: torch.dtype,
    architecture: Architecture,
    stream: Stream,
) -> None:
    """AWQ's first half, in place: scale input columns up, and what produces the input down by as much."""
    for number, stage in enumerate(architecture.stages):
        spec = config.spec_for(prefix + stage.layers[0])
        if stage.producer is None or not spec.quantized:
            continue
        producer = block.get_submodule(stage.producer)
        if isinstance(producer, nn.Linear) and not config.spec_for(prefix + stage.producer).quantized:
            continue  # it is stored in the base's dtype, which could not hold the scaled weights exactly
        linears = [linear_of(block, name) for name in stage.layers]
        moments = collect(stream, None, number, architecture)
        weights = [linear.weight.data for linear in linears]
        scales = channel_scales(weights, moments.hessian(), moments.mean_absolute(), grid_of(spec, scale_dtype))
        achieved = _divide_producer(producer, scales, stage, architecture, stream)
        for linear in linears:
            linear.weight.data = (linear.weight.data.float() * achieved).to(linear.weight.dtype)
        stream.forget()


def _divide_producer(
    producer: nn.Module, scales: Tensor, stage: Stage, architecture: Architecture, stream: Stream
) -> Tensor:
    """Divide the producer's outputs by scales. Returns the scales that its stored dtype really took."""
    if isinstance(producer, nn.Linear):
        part, parts = stage.rows
        size = producer.weight.shape[0] // parts
        rows = slice(part * size, (part + 1) * size)
        divided = producer.weight.data[rows].float() / scales[:, None]
        producer.weight.data[rows] = divided.to(producer.weight.dtype)
        if producer.bias is not None:
            bias = (producer.bias.data[rows].float() / scales).to(stream.skeleton.base_dtype)  # as the file holds it
            producer.bias.data[rows] = bias.to(producer.bias.dtype)
        return scales
    norm: Any = producer
    old = norm.weight.data.float() + architecture.norm_offset
    stored = (old / scales - architecture.norm_offset).to(stream.skeleton.base_dtype)
    norm.weight.data = stored.to(norm.weight.dtype)
    new = stored.float() + architecture.norm_offset
    return torch.where(new == 0, torch.ones_like(new), old / new)
