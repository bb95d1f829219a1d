"""A pretended GPU on which our kernels do not run: modules load and answer without them, after one warning."""

import sys

import pytest
import torch
import triton

import qsun
from qsun.adapters.grouped_products import GroupedProducts
from qsun.kernels import decode_cuda, packed_cuda
from qsun.runtime.fused_block import FusedBlock, FusedNorm

HERE = torch.device("cuda", 0)
PROMPTS = [[5, 6, 7], [9], list(range(3, 40))]


class NoCompiler:
    """A kernel where Triton finds no C compiler."""

    def __getitem__(self, grid):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def old_triton(monkeypatch):
    """torch 2.6 to 2.8 bring Triton 3.2 to 3.4, which lacks what our kernels are written with."""
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    monkeypatch.delattr(triton, "constexpr_function")
    ours = [name for name in sys.modules if name.startswith("qsun.kernels.") and name.endswith("_triton")]
    for name in (*ours, "qsun.kernels.decode_cuda"):
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)


CASES = {
    "old triton": (old_triton, "Triton 3.4.0 is too old", "use 3.5 or later, which comes with torch 2.9"),
    "no triton": (lambda patch: patch.setitem(sys.modules, "triton", None), "triton cannot be imported", "pip install"),
    "no compiler": (
        lambda patch: patch.setattr(decode_cuda, "rms_norm_rows", NoCompiler()),
        "RuntimeError: Failed to find C compiler",
        "Triton needs a C compiler and Python's headers",
    ),
    "old GPU": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5)),
        "compute capability is 7.5",
        "below the 8.0 that they need",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_answers_without_the_kernels(case, tiny_model, tmp_path, pretend_cuda, monkeypatch, caplog):
    directory = tiny_model("llama", head_dim=64)
    config = qsun.QuantConfig(method="rtn", group_size=32, dtype="bfloat16")
    qsun.quantize(directory, tmp_path / "q", config)
    packed_cuda.available.cache_clear()
    breaks, *words = CASES[case]
    breaks(monkeypatch)
    pretend_cuda.clear()
    decode = qsun.load_decode(tmp_path / "q", "cuda", torch.bfloat16)
    layers = [layer for layer in decode.model.modules() if isinstance(layer, qsun.QuantLinear)]
    assert {layer.storage for layer in layers} == {"bytes"}
    assert not any(isinstance(part, FusedBlock | FusedNorm) for part in decode.model.modules())
    prefill = qsun.load_prefill(directory, decode)
    answers = qsun.generate(prefill, decode, PROMPTS, max_new_tokens=4, eos=())
    assert [len(answer) for answer in answers] == [4] * len(PROMPTS)
    assert not GroupedProducts.serves([object()], HERE)
    GroupedProducts.warm(8, torch.bfloat16, HERE)
    assert not pretend_cuda.launches
    (warning,) = [record.getMessage() for record in caplog.records if "Triton kernels" in record.getMessage()]
    assert all(word in warning for word in ("cuda:0", *words))
    assert "\n" not in warning


def test_each_device_is_asked_for_itself(pretend_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (8, 0))
    assert [packed_cuda.available(torch.device("cuda", index)) for index in (0, 1)] == [True, False]
