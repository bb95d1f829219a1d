"""The Cholesky factor of an inverse Hessian, in blocks: the same bits from any number of threads.

LAPACK's own factorizations give other last bits on other numbers of threads; products and factors of one small block do
not, and the rest is made of those. With J the reversal of rows, J H J = L L^T gives H^-1 = U^T U for U = J L^-1 J.
"""

import logging

import torch
from torch import Tensor

from qsun.errors import QsunError
from qsun.quantization.methods.moments import product

log = logging.getLogger(__name__)
_BLOCK = 64
_FLOAT32_FROM = 0.003  # damping that float32 can take; with less, float64 does, where it does not need gigabytes
_FLOAT64_UP_TO = 4096


def inverse_factor(hessian: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """Return the upper Cholesky factor U of the damped inverse Hessian, U^T U = (H + damp I)^-1, and the damp.

    A Hessian that is singular at `damp_percent` of its mean diagonal is damped ten times more until it factors.

    Raises:
        QsunError: the Hessian has NaN or Inf.
    """
    if not torch.isfinite(hessian).all():
        raise QsunError("the calibration statistics have NaN or Inf; check the model's weights and dtype")
    mean = hessian.diagonal().mean().item()
    while True:
        precise = damp_percent < _FLOAT32_FROM and len(hessian) <= _FLOAT64_UP_TO
        factor = _inverse_cholesky(hessian.double() if precise else hessian, damp_percent * mean)
        if factor is not None:
            return factor.flip(0, 1).float(), damp_percent * mean
        damp_percent = max(damp_percent * 10, 1e-4)
        log.warning("singular Hessian of size %d: damping raised to %g", hessian.shape[0], damp_percent)


def _inverse_cholesky(hessian: Tensor, damp: float) -> Tensor | None:
    """Return L^-1 of L L^T = J (H + damp I) J; None where that is not positive definite."""
    K = len(hessian)
    work = hessian.flip(0, 1)
    work.diagonal().add_(damp)
    identity = torch.eye(_BLOCK, dtype=work.dtype, device=work.device)
    inverses = []
    for start in range(0, K, _BLOCK):
        rows, block = slice(start, K), slice(start, min(start + _BLOCK, K))
        work[rows, block] -= product(work[rows, :start], work[block, :start].t())
        corner, failed = torch.linalg.cholesky_ex(work[block, block])
        if failed:
            return None
        inverse = torch.linalg.solve_triangular(corner, identity[: len(corner), : len(corner)], upper=False)
        inverses.append(inverse)
        work[block.stop :, block] = work[block.stop :, block] @ inverse.t()
    for start, inverse in zip(range(0, K, _BLOCK), inverses, strict=True):  # invert in place, from the top
        block = slice(start, start + len(inverse))
        work[block, :start] = -inverse @ product(work[block, :start], work[:start, :start])
        work[block, block] = inverse
        work[block, block.stop :] = 0
    return work
