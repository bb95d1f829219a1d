"""The grouped low-rank products of LoRA on a CUDA device against float64 (`make gpu`)."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


@pytest.fixture
def oracle():
    """Imported where there is a device: Triton is optional."""
    pytest.importorskip("triton")
    from tests.kernels import lora_oracle

    return lora_oracle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("ranks", "lengths", "N", "K"),
    [
        ([16] * 16, [64] * 16, 4096, 4096),  # 16 adapters, prompts of 64 tokens
        ([16, 8, 64, 4], [1, 700, 31, 300], 14336, 4096),
        ([16, 0, 33], [500, 20, 1], 4096, 14336),
        ([256, 1], [70, 5], 1030, 1000),
        ([16], [1], 576, 576),
    ],
    ids=str,
)
def test_products(oracle, ranks, lengths, N, K, dtype):
    oracle.check(oracle.Draw(ranks, lengths, N, K, dtype, gap=8, first=3, seed=N + K, device="cuda"))
