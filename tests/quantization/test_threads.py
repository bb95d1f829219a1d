"""A decode module does not depend on the number of threads, nor on the run."""

import hashlib

import numpy as np
import pytest
import torch

import qsun


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def digests(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.suffix == ".safetensors" or path.name == "qsun.json"
    }


@pytest.mark.parametrize("method", ["refined", "gptq"])
def test_the_same_bytes(method, tiny_model, tmp_path, threads):
    # LAPACK factors a matrix of 320 otherwise on two threads than on one; 600 rows are three tiles of the loops.
    model = tiny_model("llama", hidden_size=320, intermediate_size=608, num_attention_heads=5, num_key_value_heads=1)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 100, (16, 96)))
    config = qsun.QuantConfig(method=method, group_size=32, samples=16, seq_len=96)
    found = []
    for run, count in enumerate((1, 2, 2)):
        threads(count)
        qsun.quantize(model, tmp_path / f"out{run}", config, tmp_path / "ids.npy", device="cpu")
        found.append(digests(tmp_path / f"out{run}"))
    assert len(found[0]) == 2
    assert found[0] == found[1]
    assert found[1] == found[2]


@pytest.mark.parametrize("damp", [0.01, 0.001], ids=["float32", "float64"])
@pytest.mark.parametrize(("inputs", "outputs"), [(1536, 576), (2048, 256)])
def test_long_sums_of_the_passes_are_the_same_bits(inputs, outputs, damp, threads):
    """MKL splits a product that sums over more than about 512 among its threads, on some CPUs."""
    from qsun.quantization.methods.inverse_factor import inverse_factor
    from qsun.quantization.methods.moments import Moments
    from qsun.quantization.methods.refined import compensated_target

    random = torch.Generator().manual_seed(0)
    x, missing = (torch.randn(3000, width, generator=random) for width in (inputs, outputs))
    weight = torch.randn(outputs, inputs, generator=random)
    found = []
    for count in (1, 2):
        threads(count)
        moments = Moments.zeros(inputs, x.device)
        moments.add(x, None, missing)
        hessian = moments.hessian()
        found.append((hessian, compensated_target(weight, moments), inverse_factor(hessian, damp)[0]))
    assert all(map(torch.equal, *found))
