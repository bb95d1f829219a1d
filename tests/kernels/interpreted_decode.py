"""A decode step's norms, rotations and attention in Triton's interpreter against float64.

Run by test_interpreter.py in a process of its own.
"""

import pytest
import torch
from torch.nn.functional import gelu, silu

from qsun.kernels import decode_cuda
from qsun.kernels.decode_cuda import (
    add_rms_norm,
    attention_workspace_bytes,
    decode_attention,
    rms_norm,
    rotate_and_store_kv,
    silu_mul,
)
from qsun.kernels.workspace import Workspace
from tests.kernels.decode_oracle import assert_close, attended, normed, rotated

pytest_plugins = "tests.kernels.interpreter"

HALF, SINGLE = torch.float16, torch.float32
SHAPES = [(8, 2, 64), (1, 1, 64), (7, 1, 80), (4, 4, 96), (4, 1, 128), (2, 1, 256), (40, 2, 64)]


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (2, 1, 2048), (5, 1), (0, 64)], ids=str)
def test_norms(shape, offset, dtype):
    x, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    weight = torch.rand(shape[-1]).to(dtype)
    assert_close(rms_norm(x, weight, 1e-5, offset), normed(x, weight, 1e-5, offset))
    y, total = add_rms_norm(x, residual, weight, 1e-5, offset)
    assert torch.equal(total, x + residual)
    assert_close(y, normed(total, weight, 1e-5, offset))


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 1500), (0, 32)])
def test_gated_activation(rows, width, dtype):
    gate_up = torch.randn(rows, 2 * width).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert_close(silu_mul(gate_up), silu(gate) * up)
    assert_close(silu_mul(gate_up, gelu=True), gelu(gate, approximate="tanh") * up, 4)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(("with_norms", "offset"), [(False, 0.0), (True, 0.0), (True, 1.0)], ids=str)
@pytest.mark.parametrize("rotate", [False, True], ids=["nope", "rope"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 64), (3, 3, 96), (4, 1, 128), (2, 1, 256)])
def test_rotation_and_the_kv_write(heads, kv_heads, width, rotate, with_norms, offset, dtype):
    rows, capacity = 3, 7
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * width + 8).to(dtype)[:, :-8]
    angles = torch.randn(rows, width // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = [torch.rand(width).to(dtype) for _ in range(2)]
    columns = torch.tensor([0, 6, 3])
    caches = [torch.randn(rows + 1, kv_heads, capacity, width).to(dtype) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    q = rotate_and_store_kv(
        *(qkv, (cos, sin) if rotate else None, (*weights, 1e-6) if with_norms else None),
        *(cache[:rows] for cache in caches),
        columns,
        norm_offset=offset,
    )
    queries, keys, values = (
        part.double().unflatten(-1, (-1, width))
        for part in qkv.split([heads * width, kv_heads * width, kv_heads * width], -1)
    )
    if with_norms:
        queries, keys = (normed(x, w, 1e-6, offset) for x, w in zip((queries, keys), weights, strict=True))
    if rotate:
        queries, keys = (rotated(x, cos.double(), sin.double()) for x in (queries, keys))
    assert_close(q, queries, 4)
    for cache, old, new in zip(caches, before, (keys, values), strict=True):
        for row, column in enumerate(columns):
            assert_close(cache[row, :, column], new[row], 4)
            old[row, :, column] = cache[row, :, column]
        assert torch.equal(cache, old)  # nothing else was touched


def check(lengths, heads, kv_heads, width, dtype, window=None, softcap=None, capacity=None, scale=None, fp8=False):
    """Close to float64; twice with one poisoned workspace: the same bits, counters back at zero.

    fp8: keys and values are e4m3 with scales; the oracle sees the numbers that those stand for.
    """
    capacity = capacity or max(lengths)
    rows, columns = len(lengths), torch.tensor(lengths) - 1
    keys, values = (torch.randn(rows + 1, kv_heads, capacity, width).to(dtype) for _ in range(2))
    for cache in (keys, values):
        for row, column in enumerate(columns.tolist()):
            cache[row, :, column + 1 :] = float("nan")  # what is beyond a row's end is never read
    q = torch.randn(rows, heads, width).to(dtype)
    keys, values = keys[:rows], values[:rows]
    stored, kv_scales = (keys, values), None
    if fp8:
        spread = 2.0 ** torch.randint(-6, 1, (*keys.shape[:3], 1))
        (k, k_scales), (v, v_scales) = encoded(keys * spread), encoded(values * spread)
        stored, kv_scales = (k, v), (k_scales, v_scales)
        keys, values = k.double() * k_scales.double(), v.double() * v_scales.double()
    space = Workspace.allocate(*attention_workspace_bytes(rows, heads, kv_heads, width, capacity), "cpu")
    results = []
    for _ in range(2):
        space.buffer.fill_(255)
        options = {"window": window, "softcap": softcap, "workspace": space, "kv_scales": kv_scales}
        results.append(decode_attention(q, *stored, columns, scale or width**-0.5, **options))
        assert not space.counters.any()
    assert torch.equal(*results)
    wanted = attended(q, keys, values, columns, scale or width**-0.5, window, softcap)
    assert_close(results[0], wanted, 2 if dtype == HALF else 8 + (softcap or 0))
    return q, keys, values, columns, results[0]


def encoded(x):
    """float8_e4m3fn and (..., 1) float32 scales, by definition: the largest of each head becomes 448."""
    scales = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 64), (7, 1, 80), (4, 1, 128), (2, 1, 256)])
def test_fp8_attention(heads, kv_heads, width, dtype):
    check([1, 63, 65], heads, kv_heads, width, dtype, fp8=True)


@pytest.mark.parametrize("options", [{}, {"window": 33}, {"softcap": 5.0}], ids=str)
def test_fp8_attention_over_several_splits(options):
    check([300, 1, 257], 4, 2, 64, HALF, capacity=320, fp8=True, **options)


@pytest.mark.parametrize("rotate", [False, True], ids=["nope", "rope"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_the_fp8_kv_write(dtype, rotate):
    """Keys and values within half a step of e4m3 of those of the plain write; a head of zeros; nothing else."""
    rows, heads, kv_heads, width = 3, 4, 2, 96
    qkv = (torch.randn(rows, (heads + 2 * kv_heads) * width) * torch.tensor([1e-4, 1.0, 300.0])[:, None]).to(dtype)
    qkv[1, -width:] = 0
    angles = torch.randn(rows, width // 2).repeat(1, 2)
    rotation = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotate else None
    columns, shape = torch.tensor([0, 6, 3]), (rows + 1, kv_heads, 7, width)
    plain = [torch.zeros(shape, dtype=dtype)[:rows] for _ in range(2)]
    wanted = rotate_and_store_kv(qkv, rotation, None, *plain, columns)
    bits = [torch.full(shape, 3, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.full((*shape[:3], 1), 7.0) for _ in range(2)]
    stored = [b.view(torch.float8_e4m3fn)[:rows] for b in bits]
    q = rotate_and_store_kv(qkv, rotation, None, *stored, columns, tuple(s[:rows] for s in scales))
    assert torch.equal(q, wanted)
    for b, s, reference in zip(bits, scales, plain, strict=True):
        for row, column in enumerate(columns):
            exact = reference[row, :, column].double()
            got = b.view(torch.float8_e4m3fn)[row, :, column].double() * s[row, :, column].double()
            largest = exact.abs().amax(-1, keepdim=True)
            assert torch.allclose(s[row, :, column].double(), largest.clamp(min=1e-12) / 448, rtol=1e-6)
            half = torch.maximum(exact.abs() / 16, largest / 448 / 1024)  # of a step: 3 bits, or that of subnormals
            assert ((got - exact).abs() <= 1.001 * half + 1e-12).all()
            cast, cast_scales = encoded(exact)  # rounded alike, but for ties that float32 decides
            further = (got - exact).abs() - (cast.double() * cast_scales.double() - exact).abs()
            assert (further.abs() <= 1e-5 * exact.abs() + 1e-12).all()
            b[row, :, column], s[row, :, column] = 3, 7.0
        assert (b == 3).all() and (s == 7).all()


def test_a_nan_stays_one_in_fp8():
    """Of all bits set, as a GPU's own are: a sum that overflows must not make a number of it.

    Before the last cast, which loses every NaN in the interpreter (on a GPU it does not).
    """
    width, nan = 64, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(SINGLE)
    qkv = torch.randn(1, 3 * width)
    qkv[0, [width, 2 * width]] = nan  # of the key and the value
    uncast = [torch.zeros(1, 1, 1, width) for _ in range(2)]
    scales = tuple(torch.zeros(1, 1, 1, 1) for _ in range(2))
    rotate_and_store_kv(qkv, None, None, *uncast, torch.tensor([0]), scales)
    for kept, scale, x in zip(uncast, scales, qkv[0, width:].split(width), strict=True):
        assert kept[..., 0].isnan().all()
        cast = (x[1:] / scale).to(torch.float8_e4m3fn).float()
        assert torch.equal(kept[..., 1:], cast)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_attention(heads, kv_heads, width, dtype):
    check([1, 63, 64, 65], heads, kv_heads, width, dtype)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("lengths", [[128, 129], [300, 1, 257], [700]], ids=str)
def test_attention_over_several_splits(lengths, dtype):
    check(lengths, 4, 2, 64, dtype, capacity=704)


@pytest.mark.parametrize("window", [1, 33, 128, 1000])
def test_sliding_windows(window):
    check([5, 300, 640], 4, 2, 64, HALF, window=window)


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_soft_caps_and_scales(softcap):
    check([40, 200], 4, 2, 128, SINGLE, softcap=softcap, scale=0.3)


def test_large_scores_do_not_overflow():
    check([200], 2, 1, 64, HALF, scale=30.0)


def test_more_columns_than_splits(monkeypatch):
    monkeypatch.setattr(decode_cuda, "_MOST_SPLITS", 3)
    check([384, 385, 1000], 2, 1, 64, SINGLE)


def test_a_row_does_not_depend_on_the_others():
    q, keys, values, columns, together = check([300, 10, 500], 4, 2, 64, HALF, capacity=512)
    for row in range(3):
        alone = decode_attention(
            *(x[row : row + 1] for x in (q, keys[:, :, : int(columns[row]) + 1], values, columns)), scale=64**-0.5
        )
        assert torch.equal(alone[0], together[row])


def test_heads_that_are_not_supported():
    for heads, kv_heads, width in ((3, 2, 64), (2, 2, 72), (2, 2, 512)):
        q, keys = torch.zeros(1, heads, width), torch.zeros(1, kv_heads, 8, width)
        with pytest.raises(ValueError, match="use a multiple"):
            decode_attention(q, keys, keys, torch.tensor([3]), 1.0)
