"""The fixture `pretend_cuda`: a machine with two CUDA devices for tests of what runs on a GPU, without one."""

import importlib.util

import pytest
import torch


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Yield the Log of a pretended machine whose tensors say cuda:0 or cuda:1 and lie on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, and tests/gpu uses it")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, whose launches it replaces")
    import qsun.runtime.ops  # noqa: F401  (defines the operators that are replaced)
    from qsun.kernels import packed_cuda, packed_triton
    from qsun.quantization.methods import loops
    from tests.pretend_cuda import attention, cuda_api, tensors, triton_launches

    known = packed_triton.gpu_name, packed_triton.pdl_options, packed_cuda.available, loops._on_gpu  # of a device
    for each in known:
        each.cache_clear()
    for module in (cuda_api, triton_launches, attention):
        for owner, name, stand_in in module.patches():
            monkeypatch.setattr(owner, name, stand_in)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    tensors.STATE.__init__()
    with torch.no_grad(), tensors.PretendMode():
        yield tensors.STATE.log
    torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
    for each in known:
        each.cache_clear()
