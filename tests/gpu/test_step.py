"""Whole decode steps in fused blocks on a CUDA device, against transformers' own blocks (`make gpu`)."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("bits", [4, 2, None], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@torch.no_grad()
def test_the_logits_of_the_blocks_themselves(family, bits, kv_dtype):
    pytest.importorskip("triton")
    if kv_dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    from tests.gpu import fused_steps

    fused_steps.check(family, bits, kv_dtype)
