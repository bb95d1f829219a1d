"""The dtype that `auto` stands for."""

import pytest
import torch

from qsun import device
from qsun.device import compute_dtype
from qsun.errors import QsunError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("where", "stored", "width", "instructions", "expected"),
    [
        (CPU, torch.bfloat16, 512, True, torch.bfloat16),
        (CPU, torch.bfloat16, 511, True, torch.float32),
        (CPU, torch.bfloat16, 4096, False, torch.float32),
        (CPU, torch.float16, 4096, True, torch.float32),
        (CPU, torch.float32, 4096, True, torch.float32),
        (CPU, None, 4096, True, torch.float32),
        (GPU, torch.float16, 128, False, torch.float16),
        (GPU, torch.bfloat16, 128, False, torch.bfloat16),
        (GPU, None, 128, False, torch.float32),
    ],
)
def test_auto(where, stored, width, instructions, expected, monkeypatch):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: instructions)
    assert compute_dtype("auto", where, stored, width) == expected
    assert compute_dtype("float16", where, stored, width) == torch.float16


def test_an_unknown_dtype():
    with pytest.raises(QsunError, match="dtype 'int8' is not supported"):
        compute_dtype("int8", CPU, torch.bfloat16)
