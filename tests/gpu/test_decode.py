"""A decode step's own kernels on a CUDA device against float64, and inside a CUDA graph (`make gpu`)."""

import pytest
import torch
from torch.nn.functional import silu

from tests.kernels.decode_oracle import assert_close, attended, normed, rotated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(32, 8, 128), (16, 8, 64), (28, 4, 128), (8, 8, 96), (8, 2, 256), (7, 1, 80)]


@pytest.fixture
def decode():
    """The module, imported where there is a device: Triton is optional."""
    pytest.importorskip("triton")
    from qsun.kernels import decode_cuda

    return decode_cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 100, 4096, 8192])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(decode, offset, width, dtype):
    x, residual = (torch.randn(5, width, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.rand(width, device="cuda", dtype=dtype)
    assert_close(decode.rms_norm(x, weight, 1e-5, offset), normed(x, weight, 1e-5, offset))
    y, total = decode.add_rms_norm(x, residual, weight, 1e-5, offset)
    assert torch.equal(total, x + residual)
    assert_close(y, normed(total, weight, 1e-5, offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_activation(decode, dtype):
    gate_up = torch.randn(3, 2 * 14336, device="cuda", dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert_close(decode.silu_mul(gate_up), silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_rotation_and_the_kv_write(decode, heads, kv_heads, width, with_norms, dtype):
    on_device = {"device": "cuda", "dtype": dtype}
    qkv = torch.randn(3, (heads + 2 * kv_heads) * width, **on_device)
    angles = torch.randn(3, width // 2, device="cuda").repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = tuple(torch.rand(width, **on_device) for _ in range(2))
    columns = torch.tensor([0, 6, 3], device="cuda")
    keys, values = (torch.zeros(3, kv_heads, 7, width, **on_device) for _ in range(2))
    q = decode.rotate_and_store_kv(qkv, (cos, sin), (*norms, 1e-6) if with_norms else None, keys, values, columns)
    parts = qkv.double().unflatten(-1, (-1, width)).split([heads, kv_heads, kv_heads], 1)
    both = [normed(x, w, 1e-6, 0.0) if with_norms else x for x, w in zip(parts[:2], norms, strict=True)]
    queries, new_keys = (rotated(x, cos.double(), sin.double()) for x in both)
    assert_close(q, queries, 4)
    for row, column in enumerate(columns.tolist()):
        assert_close(keys[row, :, column], new_keys[row], 4)
        assert torch.equal(values[row, :, column].double(), parts[2][row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 50.0}], ids=["plain", "window", "softcap"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_attention(decode, heads, kv_heads, width, options, dtype):
    columns = torch.tensor([0, 63, 127, 128, 1000, 9000], device="cuda")
    shape = (len(columns), kv_heads, 9216, width)
    keys, values = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    q = torch.randn(len(columns), heads, width, device="cuda", dtype=dtype)
    first, second = (decode.decode_attention(q, keys, values, columns, width**-0.5, **options) for _ in range(2))
    assert torch.equal(first, second)
    assert_close(first, attended(q, keys, values, columns, width**-0.5, **options), 4)


def test_a_row_does_not_depend_on_the_others(decode):
    columns = torch.tensor([700, 3, 300], device="cuda")
    keys, values = (torch.randn(3, 8, 1024, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(3, 32, 128, device="cuda", dtype=torch.bfloat16)
    together = decode.decode_attention(q, keys, values, columns, 0.1)
    for row in range(3):
        alone = [x[row : row + 1] for x in (q, keys[:, :, :768], values[:, :, :768], columns)]
        assert torch.equal(decode.decode_attention(*alone, 0.1)[0], together[row])


def test_inside_a_cuda_graph(decode):
    columns = torch.tensor([5, 400], device="cuda")
    keys, values = (torch.randn(2, 8, 512, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(2, 32, 128, device="cuda", dtype=torch.bfloat16)
    decode.decode_attention(q, keys, values, columns, 0.1)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = decode.decode_attention(q, keys, values, columns, 0.1)
    for at in ([5, 400], [300, 7], [127, 128]):
        columns.copy_(torch.tensor(at))
        graph.replay()
        assert torch.equal(captured, decode.decode_attention(q, keys, values, columns, 0.1))
