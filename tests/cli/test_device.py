"""The --device option."""

import pytest
import torch

from qsun.cli.terminal.device import check_device
from qsun.errors import QsunError


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in (None, "cpu", "cuda", "cuda:0", "cuda:1"):
        check_device(device)
    with pytest.raises(QsunError, match="device 'cuda:7' is out of range; CUDA devices found: 2; use cuda:0 to cuda:1"):
        check_device("cuda:7")
