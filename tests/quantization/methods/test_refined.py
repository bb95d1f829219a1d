"""The compensated target against a float64 least-squares solution with explicit inputs."""

from itertools import product

import pytest
import torch

from qsun.config import LayerSpec, QuantConfig
from qsun.errors import QsunError
from qsun.quantization.block import output_errors, quantize_layers
from qsun.quantization.methods.gptq import GptqOptions, gptq
from qsun.quantization.methods.grid import Grid
from qsun.quantization.methods.moments import Moments, add_gram
from qsun.quantization.methods.refined import compensated_target, refined


def inputs(tokens=4000, K=48, hidden=24, seed=0):
    """Full-precision inputs, the same with a linear and a random error, and a residual gap that depends on them."""
    g = torch.Generator().manual_seed(seed)
    x_full = torch.randn(tokens, K, generator=g) @ torch.randn(K, K, generator=g) / K**0.5
    x = x_full + 0.1 * x_full @ torch.randn(K, K, generator=g) / K**0.5 + 0.02 * torch.randn(tokens, K, generator=g)
    gap = 0.1 * x @ torch.randn(K, hidden, generator=g) / K**0.5 + 0.02 * torch.randn(tokens, hidden, generator=g)
    return x_full, x, gap, torch.randn(hidden, K, generator=g)


def moments_of(x, x_full=None, gap=None):
    moments = Moments.zeros(x.shape[1], x.device, absolute=True)
    for start in range(0, len(x), 700):
        rows = slice(start, start + 700)
        moments.add(x[rows], None if x_full is None else x_full[rows], None if gap is None else gap[rows])
    return moments


def test_moments_are_the_sums_they_say():
    x_full, x, gap, _ = inputs(K=600)  # more than one tile of the Hessian
    moments = moments_of(x, x_full, gap)
    x, x_full, gap = x.double(), x_full.double(), gap.double()
    assert moments.tokens == len(x)
    for ours, exact in (
        (moments.hessian(), x.t() @ x / len(x)),
        (moments.mean_absolute(), x.abs().mean(0)),
        (moments.drift, (x_full - x).t() @ x),
        (moments.missing, gap.t() @ x),
    ):
        assert torch.allclose(ours.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_sums_of_bfloat16_activations():
    """The Gram matrix is that of the rounded activations; what only corrects a weight may be rounded in each batch."""
    x_full, x, gap, _ = (each.bfloat16() for each in inputs(K=160))
    moments = moments_of(x, x_full, gap)
    x, missing = x.double(), gap.double()
    exact = x.t() @ x
    assert (moments.hessian().double() * len(x) - exact).abs().max() < 1e-6 * exact.abs().max()
    for ours, exact in ((moments.drift, (x_full.double() - x).t() @ x), (moments.missing, missing.t() @ x)):
        assert ours.dtype == torch.float32
        assert (ours.double() - exact).abs().max() < 2**-8 * exact.abs().max()


def test_gram_leaves_the_upper_tiles_alone():
    gram = torch.full((1100, 1100), float("nan"))
    gram.tril_()
    gram[torch.triu(torch.ones(1100, 1100), 1).bool()] = 7.0
    gram.tril_().add_(torch.triu(torch.full((1100, 1100), 7.0), 1))
    gram = torch.where(torch.isnan(gram), torch.zeros(()), gram)
    add_gram(gram, torch.ones(3, 1100))
    assert gram[0, 1099] == 7.0
    assert gram[1099, 0] == 3.0


def test_target_is_the_least_squares_solution():
    x_full, x, gap, weight = inputs(tokens=60_000)
    target = compensated_target(weight, moments_of(x, x_full, gap)).double()
    wanted = x_full.double() @ weight.double().t() + gap.double()
    exact = torch.linalg.solve(x.double().t() @ x.double(), x.double().t() @ wanted).t()
    ours, theirs, before = ((x.double() @ w.t() - wanted).square().mean() for w in (target, exact, weight.double()))
    assert ours < 1.03 * theirs
    assert ours < 0.2 * before


def test_without_drift_the_target_is_the_weight():
    _, x, _, weight = inputs()
    assert torch.equal(compensated_target(weight, moments_of(x)), weight)


def test_few_tokens_do_not_fit_noise():
    """With as many tokens as inputs and no real drift, the target must stay near the weight."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 48, generator=g)
    noise = 0.3 * torch.randn(64, 48, generator=g)
    weight = torch.randn(24, 48, generator=g)
    target = compensated_target(weight, moments_of(x, x + noise))
    fresh, fresh_noise = torch.randn(4000, 48, generator=g), 0.3 * torch.randn(4000, 48, generator=g)
    wanted = (fresh + fresh_noise) @ weight.t()
    assert (fresh @ target.t() - wanted).square().mean() < 1.3 * (fresh @ weight.t() - wanted).square().mean()


def test_refined_gives_outputs_closer_to_full_precision_than_gptq():
    x_full, x, gap, weight = inputs()
    moments, grid = moments_of(x, x_full, gap), Grid(4, 48, True)
    wanted = x_full @ weight.t() + gap

    def wrong(quantized):
        return float((x @ quantized.dequantize().t() - wanted).square().mean())

    found = refined(weight, moments, grid, GptqOptions(), 0.0)
    assert wrong(found) < 0.5 * wrong(gptq(weight, moments.hessian(), grid))


@pytest.mark.parametrize("shrinkage", [0.0, 0.25])
def test_shrinkage_divides_every_correlation(shrinkage):
    """What gptq makes of a Hessian depends on its correlations and not on its size; a column of zeros has none."""
    _, x, _, weight = inputs()
    x[:, 7] = 0
    exact = x.double().t() @ x.double() / len(x)
    own = exact.diagonal().sqrt()
    correlations = (exact / own / own[:, None]).nan_to_num() / (1 + shrinkage)
    expected = (correlations.fill_diagonal_(1) * own * own[:, None]).float()
    expected[7, 7] = 0
    grid, options = Grid(3, 16, True), GptqOptions(damp_percent=1e-3)
    found, wanted = refined(weight, moments_of(x), grid, options, shrinkage), gptq(weight, expected, grid, options)
    assert (found.q == wanted.q).float().mean() > 0.99


def test_shrinkage_is_that_of_the_settings_and_only_of_refined():
    _, x, _, weight = inputs(tokens=256, K=64)
    spec, moments = LayerSpec(3, 64, True), moments_of(x)
    made = {}
    for method, shrinkage in product(("gptq", "refined"), (0.0, 0.25)):
        config = QuantConfig(method=method, group_size=64, shrinkage=shrinkage)
        made[method, shrinkage] = quantize_layers([weight], moments, spec, config, torch.float16, "up")[0].weights.q
    assert torch.equal(made["gptq", 0.0], made["gptq", 0.25])
    assert torch.equal(made["gptq", 0.0], made["refined", 0.0])  # no difference from full precision was tracked
    assert not torch.equal(made["refined", 0.0], made["refined", 0.25])


def test_shrinkage_helps_on_fresh_inputs_where_tokens_are_few():
    plain, shrunk = 0.0, 0.0
    for seed in range(8):
        _, x, _, weight = inputs(tokens=20_064, seed=seed)
        few, fresh = moments_of(x[:64]), x[64:].t() @ x[64:]
        found = [refined(weight, few, Grid(3, 16, True), GptqOptions(), shrinkage) for shrinkage in (0.0, 0.25)]
        errors = [output_errors(weight, each.dequantize(), fresh, [len(weight)])[0] for each in found]
        plain, shrunk = plain + errors[0], shrunk + errors[1]
    assert shrunk < 0.95 * plain


def test_output_error_is_relative_to_the_output():
    _, x, _, weight = inputs()
    moved = weight + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    exact = (x @ (weight - moved).t()).square().sum() / (x @ weight.t()).square().sum()
    (ours,) = output_errors(weight, moved, moments_of(x).hessian(), [len(weight)])
    assert abs(ours - float(exact)) < 1e-3 * float(exact)


@pytest.mark.parametrize("method", ["awq", "gptq", "refined"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_no_numbers_name_the_layer(method, value):
    x_full, x, gap, weight = inputs(tokens=8, K=64)
    x[5, 3] = value
    config, moments = QuantConfig(method=method, group_size=64), moments_of(x, x_full, gap)
    with pytest.raises(QsunError, match=r"the input of layers\.0\.up has NaN or Inf; try --dtype float32"):
        quantize_layers([weight], moments, LayerSpec(4, 64, True), config, torch.float16, "layers.0.up")


@pytest.mark.parametrize(("sums", "what"), [("drift", "full-precision input"), ("missing", "full-precision output")])
def test_what_is_compared_with_must_be_numbers_too(sums, what):
    """Full precision may overflow where the quantized module does not."""
    x_full, x, gap, weight = inputs(tokens=8, K=64)
    moments = moments_of(x, x_full, gap)
    getattr(moments, sums)[2, 3] = torch.nan
    config = QuantConfig(method="refined", group_size=64)
    with pytest.raises(QsunError, match=rf"the {what} of layers\.0\.up has NaN or Inf; try --dtype float32"):
        quantize_layers([weight], moments, LayerSpec(4, 64, True), config, torch.float16, "layers.0.up")
