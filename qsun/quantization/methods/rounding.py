"""Rounding of weights to a grid, and of scales to what a file can hold."""

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-20  # a subnormal fp16; an all-zero group must not divide by zero
LARGEST_SCALE = 65000.0


def round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to what the file will hold (fp16, or bf16 values that fp16 holds), never zero."""
    small = scales.abs() < SMALLEST_SCALE
    scales = torch.where(small, torch.where(scales < 0, -SMALLEST_SCALE, SMALLEST_SCALE), scales)
    return scales.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(dtype).to(torch.float16).float()


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """Return the nearest grid integers, as floats; scales and zeros broadcast against weight."""
    return (weight / scales).round_().add_(zeros).clamp_(0, top)
