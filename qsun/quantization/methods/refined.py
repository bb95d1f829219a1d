"""Refined: quantize towards what the full-precision block would have added, given what the quantized one is fed.

GPTQ makes Q x close to W x for the inputs x that reach the layer in the quantized model. But x is already wrong, and so
is the residual stream r that the product is added to. The block's output is right when

    r + Q x  =  r_full + W x_full,

so the best full-precision stand-in for W is the least-squares solution

    T = W + (W E[(x_full - x) x^T] + E[(r_full - r) x^T]) (E[x x^T] + lambda I)^-1,

and GPTQ with coordinate descent then quantizes T instead of W. Each layer takes back what earlier layers broke, with
two more second moments to keep and no gradient. The residual term applies to the layers that write to the residual
stream unnormalised (o_proj, down_proj); the input term to all.

T is rounded on a Hessian whose correlations are shrunk, each divided by 1 + shrinkage. GPTQ hides its errors in
directions that inputs seldom take. The exact Hessian makes it trust those too much: it is an estimate from few tokens,
and does not know how later layers' errors will move the inputs of what follows.

Sources: the input term is the asymmetric calibration of GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695), solved
here in closed form before rounding; the residual term and the choice of lambda are ours. lambda is K / tokens of the
mean diagonal: with few tokens for many inputs the regression would fit their noise (measured in docs/passes.md).
"""

from torch import Tensor

from qsun.model.quantized import Quantized
from qsun.quantization.methods.gptq import GptqOptions, gptq
from qsun.quantization.methods.grid import Grid
from qsun.quantization.methods.inverse_factor import inverse_factor
from qsun.quantization.methods.moments import Moments, product

_LEAST_RIDGE = 0.003


def refined(weight: Tensor, moments: Moments, grid: Grid, options: GptqOptions, shrinkage: float) -> Quantized:
    """Quantize the compensated target of a weight matrix.

    Args:
        weight: (N, K).
        moments: with drift or with what is missing.
        shrinkage: each input's entry of the Hessian's diagonal grows by so much of itself before anything is rounded.
    """
    hessian = moments.hessian()
    hessian.diagonal().mul_(1 + shrinkage)
    return gptq(compensated_target(weight, moments), hessian, grid, options)


def compensated_target(weight: Tensor, moments: Moments) -> Tensor:
    """Return T of the module's docstring, (N, K) float32; the weight itself if no difference was tracked."""
    weight = weight.float()
    wanted = moments.missing
    if moments.drift is not None:
        moved = weight @ moments.drift
        wanted = moved if wanted is None else moved + wanted
    if wanted is None:
        return weight
    hessian = moments.hessian()
    hessian.diagonal().add_(1e-12)  # of inputs that are all zero
    factor, _ = inverse_factor(hessian, max(_LEAST_RIDGE, len(hessian) / moments.tokens))
    return weight + product(product(wanted / moments.tokens, factor.t()), factor)
